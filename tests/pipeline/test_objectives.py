"""Every registered objective from shards to a report, and on its own, by the commands a user types."""

import base64
import json
import shutil
import sys

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cli import main
from pretrain.encoder import load_encoder
from tests.drawing import write_pool
from tests.evaluate.sets import write_classification
from tests.pretrain.tiny import CASES, MODEL

SETTINGS = {
    "model": MODEL,
    "samples_seen": 24,
    "batch_size": 8,
    "warmup": 1,
    "device": "cpu",
    "workers": 2,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`shards/`, and `eval/` with a set that has a train split."""
    place = tmp_path_factory.mktemp("objectives")
    write_pool(place / "shards", shards=2, per_shard=8)
    root = write_classification(place / "eval", n=24)
    shutil.copytree(root / "test", root / "train")
    return place


def winnow(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["winnow", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_run_and_pretrain(name, folder, tmp_path, monkeypatch, capsys):
    """`winnow run` with two processes and `winnow pretrain` with one: equal losses, and a report of what was drawn."""
    recipe = {
        "pool": f"{folder}/shards",
        "subsets": {"all": {}},
        "reshard": None,
        "pretrain": SETTINGS | {"objective": name} | CASES[name],
        "evaluate": {"data": f"{folder}/eval", "protocols": ["zeroshot", "knn"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(recipe["pretrain"] | {"workers": 1}))
    out, alone = tmp_path / "run", tmp_path / "alone"
    winnow(monkeypatch, capsys, "run", tmp_path / "recipe.yaml", "--out", out, "--executor", "serial")
    words = ("pretrain", out / "pool", "--config", tmp_path / "pretrain.yaml", "--out", alone, "--executor", "serial")
    winnow(monkeypatch, capsys, *words)

    losses = []
    for made in (out / "checkpoints" / "all" / "seed-0", alone / "model" / "seed-0"):
        lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "lr" in line])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)

    made = out / "checkpoints" / "all" / "seed-0"
    rows = pq.read_table(out / "scores" / "scores.parquet").to_pylist()
    text = load_encoder(str(made), device="cpu").has_text
    assert {row["protocol"] for row in rows} == ({"zeroshot", "knn"} if text else {"knn"})
    page = (out / "report" / "report.html").read_text()
    drawn = [base64.b64encode(file.read_bytes()).decode() for file in made.glob("*.png")]
    assert len(drawn) == (name == "diffusion") and all(png in page for png in drawn)
    assert ("Pictures drawn" in page) == bool(drawn)

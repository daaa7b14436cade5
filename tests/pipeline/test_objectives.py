"""Every registered objective from shards to a report, and on its own, by the commands a user types."""

import base64
import json
import shutil
import sys
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
import yaml

from tests.drawing import write_pool
from tests.evaluate.sets import write_classification
from tests.pretrain.tiny import CASES, MODEL
from winnow.pipeline.cli import main
from winnow.pretrain.encoder import load_encoder
from winnow.pretrain.objectives.contrastive.clip import CLIP

SETTINGS = {
    "model": MODEL,
    "samples_seen": 24,
    "batch_size": 8,
    "warmup_steps": 1,
    "parallel": {"device": "cpu"},
    "logging": {"every": 1},
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
    """`winnow run` on two processes, `winnow pretrain` on one, and CLIP by each on the other: equal losses; what was
    drawn is shown."""
    recipe = {
        "pool": f"{folder}/shards",
        "subsets": {"all": {}},
        "reshard": None,
        "pretrain": SETTINGS | {"objective": name} | CASES[name],
        "evaluate": {"data": f"{folder}/eval", "protocols": ["zeroshot", "knn"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(recipe["pretrain"]))
    losses, out = [], tmp_path / "run-2"
    for command, workers in [("run", 2), ("pretrain", 1), ("run", 1), ("pretrain", 2)][: 4 if name == "clip" else 2]:
        target = tmp_path / f"{command}-{workers}"
        what = (
            [tmp_path / "recipe.yaml"] if command == "run" else [out / "pool", "--config", tmp_path / "pretrain.yaml"]
        )
        given = ("--set", f"{'pretrain.' * (command == 'run')}parallel.num_processes={workers}")
        winnow(monkeypatch, capsys, command, *what, *given, "--executor", "serial", "--out", target)
        made = target / ("checkpoints/all" if command == "run" else "model") / "seed-0"
        lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
        assert [line["workers"] for line in lines if line.get("event") == "start"] == [workers]
        losses.append([line["loss"] for line in lines if "lr" in line])
    assert len(losses[0]) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-3)

    made = out / "checkpoints" / "all" / "seed-0"
    rows = pq.read_table(out / "scores" / "scores.parquet").to_pylist()
    text = load_encoder(str(made), device="cpu").has_text
    assert {row["protocol"] for row in rows} == ({"zeroshot", "knn"} if text else {"knn"})
    page = (out / "report" / "report.html").read_text()
    drawn = [base64.b64encode(file.read_bytes()).decode() for file in made.glob("*.png")]
    assert len(drawn) == (name == "diffusion") and all(png in page for png in drawn)
    assert ("Images drawn" in page) == bool(drawn)


class Measured(CLIP):
    """CLIP that looks at a measured column."""

    columns = ("caption.words",)
    seen: ClassVar[list] = []

    def views(self, sample, rng):
        self.seen.append((sample.text, sample.columns["caption.words"], len(sample.member("txt"))))
        return super().views(sample, rng)


def test_an_objective_reads_measured_columns(folder, tmp_path, monkeypatch, capsys):
    """In a recipe, also one that reshards: each sample has the value of its caption, and its other members."""
    recipe = {
        "pool": f"{folder}/shards",
        "measures": {"caption": {}},
        "subsets": {"all": {}, "short": {"basic": {"language": None, "min_words": 3}}},
        "pretrain": SETTINGS | {"objective": "tests.pipeline.test_objectives:Measured"},
    }
    recipe["pretrain"] |= {"parallel": {"device": "cpu", "num_workers": 0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    Measured.seen.clear()
    winnow(monkeypatch, capsys, "run", tmp_path / "recipe.yaml", "--executor", "serial", "--out", tmp_path / "run")
    assert len(Measured.seen) >= 48
    assert all(words == len(text.split()) and size == len(text.encode()) for text, words, size in Measured.seen)

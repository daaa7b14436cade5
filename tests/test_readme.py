"""The README's commands, run as they are written (small inputs in place of the names in capitals)."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import yaml

from tests.drawing import write_pool
from tests.evaluate.sets import write_classification
from tests.pretrain.tiny import MODEL
from winnow.pipeline.cli import main
from winnow.pipeline.recipe.load import parse_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Every `winnow` command of the README's code blocks, split as a shell does."""
    lines = [line for line in README.splitlines() if line.startswith(".venv/bin/winnow ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def winnow(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["winnow", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, words


def test_single_stage_commands(tmp_path, monkeypatch, capsys):
    chain = [words for words in commands() if words[0] not in ("plan", "run", "ls", "doctor")]
    assert [words[0] for words in chain] == ["index", "measure", "curate", "reshard", "pretrain", "evaluate"]
    write_pool(tmp_path / "SHARDS", shards=2, per_shard=8)
    write_classification(tmp_path / "EVALSETS", n=12)
    (tmp_path / "filters.yaml").write_text("basic: {language: null, min_side: 8, max_aspect: 1.05}\n")
    settings = {"model": MODEL, "samples_seen": 16, "batch_size": 4, "warmup_steps": 1}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    for words in chain:
        winnow([*words, "--executor", "serial"], monkeypatch)
    out = capsys.readouterr().out
    assert "basic(" in out and "acc1" in out
    assert 0 < len(np.load("work/subset/subset.npy")) < 16
    loaded = re.search(r'create_model_and_transforms\("(.*?)"\)', README)
    assert loaded
    model, _, _ = open_clip.create_model_and_transforms(loaded[1])
    assert model.visual.output_dim == MODEL["embed_dim"]


SMALL = [
    "demo.pool=120",
    "demo.trusted=40",
    "demo.target=30",
    "demo.test=12",
    "demo.train=6",
    "demo.shard_size=60",
    "scorer.train.samples_seen=32",
    "scorer.train.batch_size=16",
    "scorer.train.warmup_steps=1",
    "pretrain.samples_seen=32",
    "pretrain.batch_size=16",
    "pretrain.warmup_steps=1",
    "pretrain.parallel.runs_per_launch=9",
    "reshard.samples_per_shard=50",
]
CLUSTERS = (
    "subsets.clusters-and-clip-score={all: [{image_cluster: {target: 'demo:target', clusters: 8}}, "
    "{clip_score: {fraction: 0.45}}]}"
)


def test_the_quickstart_small_on_ray(tmp_path, monkeypatch, capsys, ray_session):
    """All of it on Ray, with the trainings by Ray Train and DeepSpeed, on less data."""
    whole = [words for words in commands() if words[0] in ("plan", "run")]
    assert [words[0] for words in whole] == ["plan", "run"]
    sets = [part for item in (*SMALL, CLUSTERS) for part in ("--set", item)]
    monkeypatch.chdir(ROOT)
    for words in whole:
        winnow([*words, *sets, "--out", str(tmp_path)], monkeypatch)
    out = capsys.readouterr().out
    assert "units to do" in out and "vs none" in out
    report = re.search(r"^Report: (.*)$", out, re.MULTILINE)
    assert report and "clusters-and-clip-score" in Path(report[1]).read_text()


def test_listing_commands(monkeypatch, capsys):
    for words in commands():
        if words[0] in ("ls", "doctor"):
            winnow(words, monkeypatch)
    assert "clip_score" in capsys.readouterr().out


def test_the_example_recipe_is_valid(tmp_path, monkeypatch):
    """But for the folders it names, which are made here."""
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "pool: shards/" in block)
    write_pool(tmp_path / "shards", shards=1, per_shard=1)
    write_pool(tmp_path / "targets" / "imagenet", shards=1, per_shard=1)
    (tmp_path / "evalsets").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(text, "README.md", [])
    assert list(recipe.subsets) == ["none", "clip-30", "images", "both"]
    assert recipe.pretrain.batch_size == 4096

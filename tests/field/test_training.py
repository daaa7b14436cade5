"""Reports about training; tests/field/README.md names them."""

import json

import open_clip
import pytest
import yaml

from tests.field.helpers import index, sample, winnow, write_tar
from tests.pretrain.tiny import DIE_AT, MODEL, NARROW


def write_config(path, processes=1, **changes):
    """A small training, as a user writes it. All of these tests' configurations come from here."""
    parallel = {"device": "cpu", "num_processes": processes, "num_workers": 0, "max_failures": 0}
    values = {"model": MODEL, "samples_seen": 48, "batch_size": 8, "lr": 1e-2, "warmup_steps": 2}
    values |= {"parallel": parallel, "checkpoint": {"save_every": 2}}
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """13 samples: no multiple of the batch."""
    folder = tmp_path_factory.mktemp("training")
    write_tar(folder / "shards" / "0.tar", [member for i in range(13) for member in sample(f"{i:02}", i)])
    index(folder / "shards", folder / "pool", budget=0)
    return folder / "pool"


def pretrain(pool, out, **changes):
    out.mkdir(exist_ok=True)
    config = write_config(out / "config.yaml", **changes)
    return winnow("pretrain", pool, "--config", config, "--out", out / "run", "--executor", "serial")


@pytest.mark.parametrize("objective", ["clip", "simclr"])
def test_a_batch_of_one_is_refused_where_the_loss_needs_others(pool, tmp_path, objective):
    model = NARROW if objective == "simclr" else MODEL
    status, printed = pretrain(pool, tmp_path, objective=objective, model=model, batch_size=1, samples_seen=4)
    assert status == 2 and "batch_size 1" in printed


def test_a_batch_that_cannot_be_shared_evenly_is_refused(pool, tmp_path):
    status, printed = pretrain(pool, tmp_path, processes=3)
    assert status == 2 and "evenly" in printed


def test_a_loss_that_is_no_number_ends_the_training_and_leaves_no_checkpoint(pool, tmp_path):
    status, printed = pretrain(pool, tmp_path, lr=1e20, samples_seen=160)
    assert status == 1 and "not finite" in printed
    assert not (tmp_path / "run" / "manifest.json").exists()
    status, printed = winnow("evaluate", tmp_path / "run" / "model" / "seed-0", "--data", tmp_path, "--out", tmp_path)
    assert status != 0


def learning_rates(out):
    lines = [json.loads(line) for line in (out / "run" / "model" / "seed-0" / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def test_a_training_that_died_goes_on_as_if_it_had_not(pool, tmp_path, monkeypatch):
    """The schedule of the learning rate, the order of the samples and the optimizer's state go on too."""
    changes = {"objective": "tests.pretrain.tiny:Dying"}
    assert pretrain(pool, tmp_path / "whole", **changes)[0] == 0
    monkeypatch.setenv(DIE_AT, "4")
    assert pretrain(pool, tmp_path / "halves", **changes)[0] != 0
    monkeypatch.delenv(DIE_AT)
    status, printed = pretrain(pool, tmp_path / "halves", **changes)
    assert status == 0, printed
    whole, halves = (tmp_path / name / "run" / "model" / "seed-0" for name in ("whole", "halves"))
    assert (whole / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    before, after = learning_rates(tmp_path / "whole"), learning_rates(tmp_path / "halves")
    assert {step: after[step] for step in before if step in after} == {s: before[s] for s in before if s in after}
    assert max(after) == max(before) == 6
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{whole}")
    assert model.visual.image_size == (32, 32)

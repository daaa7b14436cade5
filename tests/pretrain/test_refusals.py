"""Trainings that would learn from what is not there: refused before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.drawing import sample, uid_of, write_tar
from tests.pretrain.tiny import NARROW, config
from winnow.infra.errors import UsageError
from winnow.infra.pool.index import IndexStage
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.launch import launch
from winnow.pretrain.loop import Job

BRIGHTNESS = {"objective": "tests.pretrain.tiny:Brightness"}  # its loss does not compare samples


def pool_of(folder: Path, captions: list[str | None]) -> str:
    """A pool of images with these captions; None for no caption at all."""
    samples = [sample(i) for i in range(len(captions))]
    for item, text in zip(samples, captions, strict=True):
        item["members"] |= {"txt": (text or "").encode()}
        if text is None:
            del item["members"]["txt"]
    write_tar(folder / "shards" / "0.tar", samples)
    execute(IndexStage((str(folder / "shards"),), str(folder / "pool"), captions=False), SerialExecutor())
    return str(folder / "pool")


def train(pool: str, out: Path, settings: PretrainConfig, subset: str | None = None) -> None:
    launch([Job(settings, pool, subset, str(out), seed=0, key="key")], via="local")


def test_a_batch_that_would_compare_a_sample_with_its_copy(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [f"text {i}" for i in range(5)])
    for settings in ({}, {"objective": "simclr", "model": NARROW}):
        with pytest.raises(
            UsageError, match=r"holds 5 distinct samples, and each batch of 8 .* batch_size of at most 5"
        ):
            train(pool, tmp_path / "refused", config(**settings))
    assert not (tmp_path / "refused" / "model.safetensors").exists()
    # A subset that lists three samples three times each has nine, and three distinct ones.
    uids = np.repeat(np.array([tuple(int(uid_of(i)[k : k + 16], 16) for k in (0, 16)) for i in range(3)], "u8,u8"), 3)
    np.save(tmp_path / "subset.npy", np.sort(uids))
    with pytest.raises(UsageError, match="holds 3 distinct samples"):
        train(pool, tmp_path / "refused", config(), str(tmp_path / "subset.npy"))
    train(pool, tmp_path / "clip", config(batch_size=5, samples_seen=10, warmup_steps=1))
    train(pool, tmp_path / "brightness", config(**BRIGHTNESS, samples_seen=16, warmup_steps=1))


@pytest.mark.parametrize("captions", [[""] * 8, [None] * 8, [" ", "\n", "\t", "", None, " \u3000", "", ""]])
def test_captions_that_are_all_empty(tmp_path: Path, captions: list[str | None]) -> None:
    pool = pool_of(tmp_path, captions)
    with pytest.raises(UsageError, match="every caption is empty, and the objective learns from captions"):
        train(pool, tmp_path / "clip", config(samples_seen=16, warmup_steps=1))
    train(pool, tmp_path / "brightness", config(**BRIGHTNESS, samples_seen=16, warmup_steps=1))


def test_one_caption_is_enough(tmp_path: Path) -> None:
    train(pool_of(tmp_path, [*[""] * 7, "a dog"]), tmp_path / "clip", config(samples_seen=16, warmup_steps=1))

"""Samples of a pool against webdataset, and how their members are read."""

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds

from tests.drawing import sample, write_tar
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import SAMPLE, Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute


@pytest.fixture
def shard(tmp_path):
    """Six samples with an image, a caption, a json, a mask and, for some, an array."""
    samples = [sample(i) for i in range(6)]
    for i, item in enumerate(samples):
        item["members"]["mask.png"] = b"mask %d" % i
        if i % 2:
            item["members"]["npy"] = b"array %d" % i
    write_tar(tmp_path / "shards" / "0.tar", samples)
    execute(IndexStage((str(tmp_path / "shards"),), str(tmp_path / "pool")), SerialExecutor())
    return Pool.open(str(tmp_path / "pool")).shards[0]


@pytest.fixture
def reads(monkeypatch):
    """How many ranges each call of `read_ranges` asked for."""
    counts, read = [], storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda url, at, sizes: counts.append(len(at)) or read(url, at, sizes))
    return counts


def test_members_agree_with_webdataset(shard):
    expected = list(wds.WebDataset(shard.tars[0], shardshuffle=False, empty_check=False))
    found = list(shard.samples(shard.table(SAMPLE)))
    assert len(found) == len(expected) == 6
    for mine, theirs in zip(found, expected, strict=True):
        assert dict(mine.members) == {ext: data for ext, data in theirs.items() if not ext.startswith("__")}
        assert (mine.key, mine.text) == (theirs["__key__"], theirs["txt"].decode())


def test_columns_and_images(shard):
    table = shard.table([*SAMPLE, "original_width"]).append_column("score", pa.array(np.arange(6) / 2))
    found = list(shard.samples(table, ["original_width", "score"]))
    assert [item.columns["score"] for item in found] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert found[3].columns["original_width"] == 24 and found[3].image().size == (24, 20)
    assert found[3].uid == table["uid"][3].as_py()


def test_images_are_read_together_and_other_members_one_by_one(shard, reads):
    found = list(shard.samples(shard.table(SAMPLE)))
    assert reads == []
    for item in found:
        item.image()
    assert reads == [6]
    assert found[1].member("npy") == b"array 1" and found[3].member("npy") == b"array 3"
    assert reads == [6, 1, 1]
    together = list(shard.samples(shard.table(SAMPLE), together=("npy",)))
    assert [item.member("npy") for item in together if "npy" in item.members] == [b"array %d" % i for i in (1, 3, 5)]
    assert reads == [6, 1, 1, 3]
    with pytest.raises(KeyError):
        found[0].member("npy")


def test_any_extension_of_any_rows(shard):
    table = shard.table().take(pa.array([5, 0, 3]))
    assert shard.member_bytes(table, "mask.png") == [b"mask 5", b"mask 0", b"mask 3"]
    assert shard.member_bytes(table, "npy") == [b"array 5", b"", b"array 3"]
    assert shard.member_bytes(table, "jpg") == shard.image_bytes(table)
    assert shard.member_bytes(table.slice(1, 1), "wav") == [b""]


def test_a_tar_that_got_shorter_is_reported(shard):
    path = storage.local_path(shard.tars[0])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(WinnowError, match="has changed since it was indexed"):
        shard.image_bytes(shard.table())
    with pytest.raises(WinnowError, match="has changed since it was indexed"):
        [item.image() for item in shard.samples(shard.table(SAMPLE))]

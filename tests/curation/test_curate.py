"""The curate and reshard stages on a small pool, against plain reading."""

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from tests.drawing import write_tar
from tests.examples.caption_length import CaptionLength
from winnow.curation.algebra.nodes import All
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.curation.filters.basic import Basic
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.measures.caption import Caption
from winnow.curation.measures.stage import MeasureStage
from winnow.curation.reshard import ReshardStage
from winnow.infra.errors import WinnowError
from winnow.infra.io.storage import digest_file
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids, load_subset, save_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute

SHORT = CaptionLength(most=6)
WIDE = Basic(language=None, min_words=1, min_side=8, max_aspect=1.03)


def run(stage):
    return execute(stage, SerialExecutor())


@pytest.fixture(scope="module")
def columns(small_pool, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("columns"))
    run(MeasureStage(small_pool, (Caption(),), out))
    return out


def rows(pool):
    return [row for shard in Pool.open(pool).shards for row in shard.table().to_pylist()]


def wide(row):
    return (
        max(row["original_width"], row["original_height"]) / min(row["original_width"], row["original_height"]) <= 1.03
    )


def test_subset_funnel_and_reasons(small_pool, columns, tmp_path):
    tree = WIDE & ~SHORT
    run(CurateStage(MeasuredPool(small_pool, columns), (("", tree),), str(tmp_path)))
    short = {row["uid"] for row in rows(small_pool) if len(row["text"].split()) <= 6}
    kept = [row["uid"] for row in rows(small_pool) if wide(row) and row["uid"] not in short]
    assert encode_uids(np.load(tmp_path / "subset.npy")) == sorted(kept)
    funnel = json.loads((tmp_path / "funnel.json").read_text())
    assert (funnel["pool"], funnel["kept"]) == (24, len(kept))
    first = funnel["tree"]["children"][0]
    assert first["kept"] == sum(wide(row) for row in rows(small_pool))
    reasons = {row["uid"]: row["reason"] for row in pq.read_table(tmp_path / "reasons.parquet").to_pylist()}
    assert set(reasons) == {row["uid"] for row in rows(small_pool)} - set(kept)
    for row in rows(small_pool):
        if not wide(row):
            assert reasons[row["uid"]].startswith("basic(")


def test_no_filter_keeps_the_pool_in_uid_order(small_pool, tmp_path):
    run(CurateStage(MeasuredPool(small_pool), (("none", All()),), str(tmp_path), reasons=False))
    assert np.array_equal(np.load(tmp_path / "none" / "subset.npy"), np.sort(Pool.open(small_pool).uids()))
    assert not (tmp_path / "none" / "reasons.parquet").exists()


def test_another_subset_leaves_the_first_unchanged(small_pool, columns, tmp_path):
    run(CurateStage(MeasuredPool(small_pool, columns), (("a", SHORT),), str(tmp_path)))
    before = (tmp_path / "a" / "subset.npy").stat().st_mtime_ns
    run(CurateStage(MeasuredPool(small_pool, columns), (("a", SHORT), ("b", WIDE)), str(tmp_path)))
    assert (tmp_path / "a" / "subset.npy").stat().st_mtime_ns == before
    assert (tmp_path / "b" / "subset.npy").exists()


def test_missing_columns_are_refused_before_work(small_pool, tmp_path):
    with pytest.raises(WinnowError, match="has not been measured"):
        run(CurateStage(MeasuredPool(small_pool), (("a", ClipScore(fraction=0.3)),), str(tmp_path)))
    assert not (tmp_path / "a").exists()


def test_resharded_samples_are_those_of_the_subset(small_pool, tmp_path):
    uids = Pool.open(small_pool).uids()
    save_subset(str(tmp_path / "subset.npy"), uids[[20, 3, 7, 8, 11, 15, 22]])
    url = str(tmp_path / "subset.npy")
    out = tmp_path / "shards"
    run(ReshardStage(small_pool, url, digest_file(url), str(out), samples_per_shard=3))
    wanted = {row["uid"]: row for row in rows(small_pool) if row["uid"] in set(encode_uids(load_subset(url)))}
    names = [f"{i:05d}" for i in range(3)]
    found = list(wds.WebDataset([str(out / f"{name}.tar") for name in names], shardshuffle=False, empty_check=False))
    pool = Pool.open(small_pool)
    images = {
        uid: data
        for shard in pool.shards
        for uid, data in zip(shard.table()["uid"].to_pylist(), shard.image_bytes(shard.table()), strict=True)
    }
    assert [json.loads(item["json"])["uid"] for item in found] == list(wanted)  # pool order
    for item, (uid, row) in zip(found, wanted.items(), strict=True):
        assert item["txt"].decode() == row["text"] and item["jpg"] == images[uid]
    assert [pq.read_table(out / f"{name}.parquet").num_rows for name in names] == [3, 3, 1]
    # it is a pool, by its manifest and when it is indexed
    assert sorted(encode_uids(Pool.open(str(out)).uids())) == sorted(wanted)
    run(IndexStage((str(out),), str(tmp_path / "again")))
    again = Pool.open(str(tmp_path / "again"))
    assert encode_uids(again.uids()) == list(wanted)
    assert again.shards[0].table()["image_offset"].equals(Pool.open(str(out)).shards[0].table()["image_offset"])


def test_every_member_and_the_source_survive_resharding(tmp_path):
    members = [{"wav": b"sound %d" % i, "cls": b"%d" % i, "left.wav": b"left %d" % i} for i in range(5)]
    write_tar(tmp_path / "calls" / "0.tar", [{"key": f"a{i}", "members": item} for i, item in enumerate(members)])
    run(IndexStage((str(tmp_path / "calls"),), str(tmp_path / "pool"), captions=False, require=frozenset({"wav"})))
    run(ReshardStage(str(tmp_path / "pool"), None, "", str(tmp_path / "out"), samples_per_shard=3))
    pool = Pool.open(str(tmp_path / "out"))
    found = [sample for shard in pool.shards for sample in shard.samples(shard.table())]
    assert [{ext: data for ext, data in item.members.items() if ext != "json"} for item in found] == members
    assert [item.label for item in found] == list(range(5))
    assert pool.column("source").to_pylist() == ["calls"] * 5


def test_resharding_twice_gives_the_same_tar(small_pool, tmp_path):
    for name in ("a", "b"):
        run(ReshardStage(small_pool, None, "", str(tmp_path / name)))
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}


def test_a_subset_of_another_pool_is_refused(small_pool, tmp_path):
    uids = Pool.open(small_pool).uids()[:3].copy()
    uids["f0"][0] ^= np.uint64(1)
    url = str(tmp_path / "subset.npy")
    save_subset(url, uids)
    with pytest.raises(WinnowError, match="1 of the subset's 3 uids are not in the pool"):
        run(ReshardStage(small_pool, url, digest_file(url), str(tmp_path / "out")))
    save_subset(url, uids[:0])
    with pytest.raises(WinnowError, match="empty"):
        run(ReshardStage(small_pool, url, digest_file(url), str(tmp_path / "out")))

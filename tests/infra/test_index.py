"""The index against what `tarfile`, webdataset and plain reading say, and against every kind of broken input."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from tests.drawing import draw_image, sample, uid_of, write_parquet, write_pool, write_tar
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.members import read_members
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute


def index(folder, out, budget=0.99, **options):
    return execute(IndexStage((str(folder),), str(out), **options), SerialExecutor(), budget=Budget(budget))


def reasons(manifest):
    return manifest.skipped["reasons"]


def test_offsets_are_tarfiles(tmp_path):
    write_pool(tmp_path / "shards", shards=2, per_shard=5)
    index(tmp_path / "shards", tmp_path / "pool")
    pool = Pool.open(str(tmp_path / "pool"))
    assert len(pool) == 10
    for shard in pool.shards:
        table = shard.table()
        with tarfile.open(tmp_path / "shards" / f"{shard.name}.tar") as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
            for row in table.to_pylist():
                assert (row["image_offset"], row["image_size"]) == members[f"{row['key']}.jpg"]
                assert (row["text_offset"], row["text_size"]) == members[f"{row['key']}.txt"]
                assert (row["json_offset"], row["json_size"]) == members[f"{row['key']}.json"]


def test_samples_are_webdatasets(tmp_path):
    write_pool(tmp_path / "shards", shards=1, per_shard=7)
    index(tmp_path / "shards", tmp_path / "pool")
    shard = Pool.open(str(tmp_path / "pool")).shards[0]
    table = shard.table()
    expected = list(wds.WebDataset(str(tmp_path / "shards" / "00000.tar"), shardshuffle=False, empty_check=False))
    assert table["key"].to_pylist() == [item["__key__"] for item in expected]
    assert shard.image_bytes(table) == [item["jpg"] for item in expected]
    assert read_members(shard.tars, table, "text") == [item["txt"] for item in expected]
    backwards = table.take(pa.array([3, 1, 2]))
    assert shard.image_bytes(backwards) == [expected[i]["jpg"] for i in (3, 1, 2)]


def test_columns_of_the_parquet_are_kept(tmp_path):
    samples = [sample(i) for i in range(3)]
    for i, item in enumerate(samples):
        item["row"] |= {"clip_b32_similarity_score": 0.1 * i, "status": "success", "url": f"u{i}"}
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    failed = {"row": samples[0]["row"] | {"key": "000000009", "uid": uid_of(9), "status": "failed_to_download"}}
    write_parquet(tmp_path / "shards" / "00000.parquet", [*samples, failed])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert manifest.skipped["count"] == 0  # img2dataset lists failed downloads; they are no disagreement
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["clip_b32_similarity_score"].to_pylist() == pytest.approx([0.0, 0.1, 0.2])
    assert table["original_width"].to_pylist() == [240, 241, 242]
    assert table["url"].to_pylist() == ["u0", "u1", "u2"]
    assert "status" not in table.column_names


def test_bare_tars_get_uids_sizes_and_captions(tmp_path):
    bare = [
        {"key": f"dir/{i}", "members": {"png": draw_image((i, 0, 0), i, (30 + i, 17), "png"), "txt": b"hi"}}
        for i in range(4)
    ]
    write_tar(tmp_path / "shards" / "x.tar", bare)
    index(tmp_path / "shards", tmp_path / "a")
    index(tmp_path / "shards", tmp_path / "b")
    table = Pool.open(str(tmp_path / "a")).shards[0].table()
    assert table["original_width"].to_pylist() == [30, 31, 32, 33]
    assert table["original_height"].to_pylist() == [17] * 4
    assert table["text"].to_pylist() == ["hi"] * 4
    uids = table["uid"].to_pylist()
    assert len(set(uids)) == 4 and all(len(uid) == 32 for uid in uids)
    assert Pool.open(str(tmp_path / "b")).shards[0].table()["uid"].to_pylist() == uids


def test_every_kind_of_broken_sample_is_skipped_and_nothing_else_lost(tmp_path):
    samples = [sample(i) for i in range(8)]
    samples[1]["members"]["jpg"] = b"no image at all"
    del samples[2]["members"]["txt"]
    samples[3]["members"]["txt"] = b"caf\xe9"
    del samples[4]["members"]["jpg"]
    samples[5]["members"]["json"] = b"{"
    samples[6]["members"]["json"] = samples[0]["members"]["json"]  # the uid of sample 0 again
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {
        "undecodable image": 1,
        "missing caption": 1,
        "caption is not UTF-8": 1,
        "no image": 1,
        "json is not valid": 1,
        "duplicated uid": 1,
    }
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["uid"].to_pylist() == [uid_of(0), uid_of(7)]
    assert manifest.state == "complete with 6 skipped"


def test_images_without_captions_are_a_pool_when_asked_for(tmp_path):
    samples = [{"key": f"s{i}", "members": {"jpg": draw_image((9, 9, 9), i), "cls": b"3"}} for i in range(3)]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    with pytest.raises(WinnowError, match="missing caption: 3"):
        index(tmp_path / "shards", tmp_path / "pool", budget=0.5)
    index(tmp_path / "shards", tmp_path / "pool", captions=False)
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["text"].null_count == 3
    assert [row[0]["ext"] for row in table["other"].to_pylist()] == ["cls"] * 3
    assert table["label"].to_pylist() == [3] * 3


def test_labels_are_whole_numbers_of_cls_or_json(tmp_path):
    members = [
        {"cls": b" 7\n"},
        {"cls": b"0", "json": b'{"label": 4}'},
        {"json": b'{"label": 5}'},
        {"cls": b"cat"},
        {"cls": b"9" * 40},
        {"json": b'{"label": true}'},
        {"json": b'{"label": -1}'},
        {"json": b'{"label": 99999999999999999999}'},
        {},
    ]
    samples = [
        {"key": f"s{i}", "members": {"jpg": draw_image((9, 9, 9), i)} | local} for i, local in enumerate(members)
    ]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    index(tmp_path / "shards", tmp_path / "pool", captions=False)
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["label"].to_pylist() == [7, 0, 5, None, None, None, None, None, None]


@pytest.mark.parametrize("cut", ["in an image", "in a header", "to nothing"])
def test_truncated_tar_keeps_its_whole_samples(tmp_path, cut):
    samples = [sample(i) for i in range(5)]
    path = tmp_path / "shards" / "00000.tar"
    write_tar(path, samples)
    write_tar(tmp_path / "shards" / "00001.tar", [sample(10)])
    with tarfile.open(path) as tar:
        third = tar.getmember("000000003.jpg")
    whole = path.read_bytes()
    end = {"in an image": third.offset_data + 40, "in a header": third.offset_data - 300, "to nothing": 0}[cut]
    path.write_bytes(whole[:end])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert list(reasons(manifest)) == ["empty file" if cut == "to nothing" else "truncated tar"]
    pool = Pool.open(str(tmp_path / "pool"))
    # The last whole sample before the cut can only be told from a cut one by what follows it, so it may be lost.
    kept = pool.shards[0].table()["uid"].to_pylist()
    whole_samples = [] if cut == "to nothing" else [uid_of(0), uid_of(1)]
    assert kept[:2] == whole_samples
    assert uid_of(3) not in kept
    assert pool.shards[1].table()["uid"].to_pylist() == [uid_of(10)]


def test_an_empty_shard_is_no_fault(tmp_path):
    write_pool(tmp_path / "shards", shards=1, per_shard=2)
    write_tar(tmp_path / "shards" / "00001.tar", [])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert [shard.rows for shard in Pool.open(str(tmp_path / "pool")).shards] == [2, 0]
    assert manifest.skipped["count"] == 0


def test_members_that_webdataset_passes_over(tmp_path):
    """Names without a key or without an extension, wherever they stand."""
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    data = sample(1)["members"]["jpg"]
    names = ["README", "a.jpg", "sub/._a.jpg", "a.txt", ".hidden.jpg", "__meta__/x", "sub/b.txt", "sub/b.jpg"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            content = data if name.endswith("jpg") else b"words"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    reference = {item["__key__"] for item in wds.WebDataset(str(path), shardshuffle=False)}
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reference - {"sub/"} == {"a", "sub/b"} and reasons(manifest) == {} and manifest.items == 2


def test_a_uid_met_in_an_earlier_shard_is_dropped(tmp_path):
    write_tar(tmp_path / "shards" / "00000.tar", [sample(i) for i in range(3)])
    write_tar(tmp_path / "shards" / "00001.tar", [sample(i) for i in (4, 1, 5)])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"duplicated uid": 1}
    pool = Pool.open(str(tmp_path / "pool"))
    assert [shard.rows for shard in pool.shards] == [3, 2]
    assert pool.shards[1].table(["uid"])["uid"].to_pylist() == [uid_of(4), uid_of(5)]
    assert len(np.unique(pool.uids())) == len(pool) == 5
    assert manifest.items == 5


def test_parquet_that_disagrees_with_its_tar(tmp_path):
    samples = [sample(i) for i in range(6)]
    write_tar(tmp_path / "shards" / "00000.tar", samples[:5])
    rows = [samples[0], samples[2], samples[3], samples[4], samples[5]]  # 1 is missing, 5 is too many
    rows[1]["row"]["uid"] = uid_of(77)
    rows[2]["row"]["text"] = "something else"
    write_parquet(tmp_path / "shards" / "00000.parquet", rows)
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {
        "in the tar but not in the parquet": 1,
        "in the parquet but not in the tar (by key)": 1,
        "uid differs between tar and parquet": 1,
        "caption differs between tar and parquet": 1,
    }
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["uid"].to_pylist() == [uid_of(0), uid_of(4)]


def test_parquet_joined_by_uid_and_by_order(tmp_path):
    samples = [sample(i) for i in range(4)]
    write_tar(tmp_path / "uid" / "00000.tar", samples)
    table = pa.Table.from_pylist([item["row"] for item in reversed(samples)]).drop_columns(["key"])
    table = table.append_column("mark", pa.array([3, 2, 1, 0]))
    pq.write_table(table, tmp_path / "uid" / "00000.parquet")
    index(tmp_path / "uid", tmp_path / "pool")
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["mark"].to_pylist() == [0, 1, 2, 3]

    for item in samples:
        item["members"]["json"] = b"{}"
    write_tar(tmp_path / "order" / "00000.tar", samples)
    pq.write_table(table.take(pa.array([3, 2, 1, 0])), tmp_path / "order" / "00000.parquet")
    index(tmp_path / "order", tmp_path / "pool2")
    assert Pool.open(str(tmp_path / "pool2")).shards[0].table()["uid"].to_pylist() == [uid_of(i) for i in range(4)]


def test_unreadable_parquet_leaves_the_tar(tmp_path):
    write_pool(tmp_path / "shards", shards=1, per_shard=3)
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"PAR1 nonsense")
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"unreadable parquet": 1}
    assert len(Pool.open(str(tmp_path / "pool"))) == 3


def test_a_bomb_is_not_decoded(tmp_path):
    head = io.BytesIO()
    Image.new("1", (20000, 20000)).save(head, "PNG")
    samples = [sample(0), sample(1)]
    samples[1]["members"]["jpg"] = head.getvalue()
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"image too large": 1}


def test_several_sources_and_chosen_shards(tmp_path):
    write_pool(tmp_path / "a", shards=2, per_shard=2)
    write_pool(tmp_path / "b", shards=1, per_shard=2, first=50)
    sources = (str(tmp_path / "a"), str(tmp_path / "b"))
    execute(IndexStage(sources, str(tmp_path / "pool")), SerialExecutor())
    assert [shard.name for shard in Pool.open(str(tmp_path / "pool")).shards] == ["0-00000", "0-00001", "1-00000"]
    stage = IndexStage(sources, str(tmp_path / "less"), skip=("0-00001",))
    execute(stage, SerialExecutor())
    assert [shard.name for shard in Pool.open(str(tmp_path / "less")).shards] == ["0-00000", "1-00000"]
    with pytest.raises(UsageError, match='no shard "9"'):
        IndexStage(sources, str(tmp_path / "no"), only=("9",)).plan()


def test_the_pools_digest_is_of_its_content(tmp_path):
    write_pool(tmp_path / "a")
    write_pool(tmp_path / "moved")
    index(tmp_path / "a", tmp_path / "pool-a")
    index(tmp_path / "moved", tmp_path / "pool-b")
    a, b = Pool.open(str(tmp_path / "pool-a")), Pool.open(str(tmp_path / "pool-b"))
    assert a.digest == b.digest
    samples = [sample(i) for i in range(6)]
    samples[0]["members"]["jpg"] = draw_image((1, 2, 3), 99)
    write_tar(tmp_path / "moved" / "00000.tar", samples)
    index(tmp_path / "moved", tmp_path / "pool-b")
    assert Pool.open(str(tmp_path / "pool-b")).digest != a.digest


def test_no_shards(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        IndexStage((str(tmp_path / "nowhere"),), str(tmp_path / "pool")).plan()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.tar shard"):
        IndexStage((str(tmp_path / "empty"),), str(tmp_path / "pool")).plan()

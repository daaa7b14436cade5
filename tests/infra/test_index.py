"""The index against `tarfile`, webdataset and plain reading, and on every kind of broken input."""

import contextlib
import io
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
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


def test_offsets_agree_with_tarfile(tmp_path):
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


def test_samples_agree_with_webdataset(tmp_path):
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


def test_every_kind_of_broken_sample_is_skipped_and_no_other(tmp_path):
    samples = [sample(i) for i in range(8)]
    samples[1]["members"]["jpg"] = b"not an image"
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


def test_captions_are_optional_on_request(tmp_path):
    samples = [{"key": f"s{i}", "members": {"jpg": draw_image((9, 9, 9), i), "cls": b"3"}} for i in range(3)]
    write_tar(tmp_path / "shards" / "0.tar", samples)
    with pytest.raises(WinnowError, match="missing caption: 3"):
        index(tmp_path / "shards", tmp_path / "pool", budget=0.5)
    manifest = index(tmp_path / "shards", tmp_path / "pool", captions=False)
    assert manifest.params == {"captions": False, "require": ["image"]}
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
def test_a_truncated_tar_keeps_its_complete_samples(tmp_path, cut):
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
    # The last sample before the cut is known to be complete only by what follows it, so it may be lost.
    kept = pool.shards[0].table()["uid"].to_pylist()
    whole_samples = [] if cut == "to nothing" else [uid_of(0), uid_of(1)]
    assert kept[:2] == whole_samples
    assert uid_of(3) not in kept
    assert pool.shards[1].table()["uid"].to_pylist() == [uid_of(10)]


def test_an_empty_shard_is_valid(tmp_path):
    write_pool(tmp_path / "shards", shards=1, per_shard=2)
    write_tar(tmp_path / "shards" / "00001.tar", [])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert [shard.rows for shard in Pool.open(str(tmp_path / "pool")).shards] == [2, 0]
    assert manifest.skipped["count"] == 0


def test_members_that_webdataset_ignores(tmp_path):
    """Names without a key or without an extension, at any position."""
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


def test_a_uid_of_an_earlier_shard_is_dropped(tmp_path):
    write_tar(tmp_path / "shards" / "00000.tar", [sample(i) for i in range(3)])
    write_tar(tmp_path / "shards" / "00001.tar", [sample(i) for i in (4, 1, 5)])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"duplicated uid": 1}
    pool = Pool.open(str(tmp_path / "pool"))
    assert [shard.rows for shard in pool.shards] == [3, 2]
    assert pool.shards[1].table(["uid"])["uid"].to_pylist() == [uid_of(4), uid_of(5)]
    assert len(np.unique(pool.uids())) == len(pool) == 5
    assert manifest.items == 5


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


def write_audio(path, n=4):
    """Samples of two recordings and a class; the last has no recording."""
    members = [{"wav": b"RIFF" + bytes([i]) * i, "left.wav": b"L%d" % i, "cls": b"%d" % i} for i in range(n)]
    del members[-1]["wav"]
    write_tar(path, [{"key": f"a{i}", "members": item} for i, item in enumerate(members)])
    return members


def test_audio_is_indexed_where_no_image_is_required(tmp_path):
    members = write_audio(tmp_path / "shards" / "0.tar")
    options = {"captions": False, "require": frozenset({"wav"})}
    manifest = index(tmp_path / "shards", tmp_path / "pool", **options)
    assert reasons(manifest) == {"no .wav": 1}
    shard = Pool.open(str(tmp_path / "pool")).shards[0]
    table = shard.table()
    assert table["label"].to_pylist() == [0, 1, 2] and table["image_ext"].null_count == 3
    for ext in ("wav", "left.wav", "cls"):
        assert shard.member_bytes(table, ext) == [item[ext] for item in members[:3]]
    assert shard.image_bytes(table) == [b"", b"", b""]
    samples = list(shard.samples(table))
    assert not samples[0].has_image and [sample.member("wav") for sample in samples] == [m["wav"] for m in members[:3]]


def test_a_sample_must_have_what_is_required(tmp_path):
    write_audio(tmp_path / "shards" / "0.tar")
    with pytest.raises(WinnowError, match="no image: 4"):
        index(tmp_path / "shards", tmp_path / "pool", captions=False)
    with pytest.raises(WinnowError, match="missing caption: 4"):
        index(tmp_path / "shards", tmp_path / "pool", require=frozenset({"text"}))
    assert index(tmp_path / "shards", tmp_path / "pool", require=frozenset()).items == 4


def test_samples_know_their_source(tmp_path):
    write_pool(tmp_path / "a" / "shards", shards=1, per_shard=2)
    samples = [sample(i) for i in (50, 51, 52)]
    for item, source in zip(samples, ("cc12m", None, "laion"), strict=True):
        item["row"]["source"] = source
    write_tar(tmp_path / "b" / "shards" / "0.tar", samples)
    write_parquet(tmp_path / "b" / "shards" / "0.parquet", samples)
    stage = IndexStage((str(tmp_path / "a" / "shards"), str(tmp_path / "b" / "shards")), str(tmp_path / "pool"))
    execute(stage, SerialExecutor())
    shards = Pool.open(str(tmp_path / "pool")).shards
    column = shards[0].table(["source"])["source"]
    assert pa.types.is_dictionary(column.type) and column.to_pylist() == ["a/shards"] * 2
    assert shards[1].table(["source"])["source"].to_pylist() == ["cc12m", "b/shards", "laion"]
    index(tmp_path / "a" / "shards", tmp_path / "single")
    assert Pool.open(str(tmp_path / "single")).column("source").to_pylist() == ["shards"] * 2


class Plain(BaseHTTPRequestHandler):
    """Serves files whole, whatever range is asked for."""

    folder: Path

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(path.read_bytes())

    do_HEAD = do_GET

    def log_message(self, *_):
        return


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(Plain, "folder", tmp_path / "shards", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("kind", ["pipe", "http"])
def test_a_source_without_random_access_is_copied(tmp_path, server, kind):
    write_pool(tmp_path / "shards", shards=1, per_shard=5)
    index(tmp_path / "shards", tmp_path / "direct")
    source = {"pipe": f"pipe:cat {tmp_path}/shards/00000.tar", "http": f"{server}/00000.tar"}[kind]
    manifest = index(source, tmp_path / "pool")
    direct, copy = (Pool.open(str(tmp_path / name)).shards[0] for name in ("direct", "pool"))
    assert copy.name == "00000" and manifest.items == 5 and copy.tars == (str(tmp_path / "pool" / "00000.tar"),)
    for ext in ("jpg", "txt", "json"):
        assert copy.member_bytes(copy.table(), ext) == direct.member_bytes(direct.table(), ext)
    assert copy.table()["uid"].equals(direct.table()["uid"])
    shutil.rmtree(tmp_path / "shards")
    assert len(copy.image_bytes(copy.table())) == 5


def test_streams_that_fail_or_are_truncated(tmp_path, server):
    write_pool(tmp_path / "shards", shards=1, per_shard=5)
    path = tmp_path / "shards" / "00000.tar"
    manifest = index(f"pipe:head -c 7000 {path}", tmp_path / "cut")
    assert reasons(manifest) == {"truncated tar": 1} and 0 < manifest.items < 5
    with pytest.raises(WinnowError, match=r"the stream failed .exit status 3"):
        index(f"pipe:cat {path}; exit 3", tmp_path / "failed")
    assert not (tmp_path / "failed" / "00000.tar").exists()
    with pytest.raises(UsageError, match="no such file"):
        IndexStage((f"{server}/none.tar",), str(tmp_path / "none")).plan()

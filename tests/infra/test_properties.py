"""Properties of the pool's writers and readers, on drawn sets of samples and on files with one corrupted byte.

The sets are written by `TarWriter` and `PoolWriter`, and what `index` and `reshard` make of them is read by `tarfile`
and pyarrow.
"""

import functools
import json
import shutil
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drawing import draw_image, uid_of
from winnow.curation.reshard import ReshardStage
from winnow.infra.errors import WinnowError
from winnow.infra.io.tar import TarWriter
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import SAMPLE, Pool
from winnow.infra.pool.views import located, with_source
from winnow.infra.pool.writer import PoolWriter, shard_entries
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import LOCATIONS, MANIFEST, Manifest, Record

IMAGES = {ext: [draw_image((90, 20 * i, 7), i, (6, 5), ext) for i in range(4)] for ext in ("jpg", "png", "webp")}
drawn = settings(max_examples=25, derandomize=True, deadline=None, database=None)

letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0./")
keys = st.builds(
    "".join, st.tuples(st.sampled_from(["", "a/", "b.c/d/", "x" * 120 + "/"]), st.text(letters, min_size=1))
)
captions = st.text(st.characters(exclude_categories=("Cs",)))
others = st.dictionaries(st.sampled_from(["npy", "wav", "mask.png", "v2.cls"]), st.binary(max_size=1500), max_size=3)


@st.composite
def sets(draw):
    """Samples: key, image, caption and where that is, members, uid or None, score or None."""
    with_uid, with_score = draw(st.booleans()), draw(st.booleans())
    samples = []
    for number, key in enumerate(draw(st.lists(keys, min_size=1, max_size=7, unique=True))):
        ext = draw(st.sampled_from(sorted(IMAGES)))
        samples.append(
            {
                "key": key,
                "image": (ext, draw(st.sampled_from(IMAGES[ext]))),
                "text": draw(captions),
                "in": draw(st.sampled_from(["txt", "json", "both"])),
                "others": draw(others),
                "uid": uid_of(number) if with_uid else None,
                "score": draw(st.floats(0, 1, width=32)) if with_score else None,
            }
        )
    return samples


def members_of(sample):
    ext, image = sample["image"]
    found = {ext: image} | sample["others"]
    if sample["in"] != "json":
        found["txt"] = sample["text"].encode()
    facts = {"uid": sample["uid"]} if sample["uid"] else {}
    if sample["in"] != "txt":
        facts["text"] = sample["text"]
    return found | ({"json": json.dumps(facts).encode()} if facts else {})


def content(key, members, text, score):
    """What must come back of a sample, whatever is done to it: everything but the key and the json."""
    return (text, score, *sorted((ext, data) for ext, data in members.items() if ext not in ("json", "txt")))


def expected(samples):
    found = []
    for sample in samples:
        found.append(content(sample["key"], members_of(sample), sample["text"], sample["score"]))
    return sorted(found, key=repr)


def read_tars(folder):
    """The samples of resharded tars, by `tarfile` and the parquets next to them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        rows = {row["key"]: row for row in pq.read_table(path.with_suffix(".parquet")).to_pylist()}
        samples = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, ext = info.name.partition(".")
                samples.setdefault(key, {})[ext] = tar.extractfile(info).read()
        assert samples.keys() == rows.keys()
        for key, members in samples.items():
            assert members["txt"].decode() == rows[key]["text"] == json.loads(members["json"])["text"]
            found.append(content(key, members, rows[key]["text"], rows[key].get("score")))
    return sorted(found, key=repr)


def read_pool(url):
    """The samples of a pool, by its readers."""
    found = []
    for shard in Pool.open(str(url)).shards:
        columns = ["score"] if "score" in shard.columns() else []
        for sample in shard.samples(shard.table([*SAMPLE, *columns]), columns):
            found.append(content(sample.key, dict(sample.members), sample.text, sample.columns.get("score")))
    return sorted(found, key=repr)


def run(stage):
    return execute(stage, SerialExecutor(), budget=Budget(0))


@functools.lru_cache(maxsize=1)
def scratch():
    return Path(tempfile.mkdtemp())


def empty(name):
    """A folder without anything in it."""
    folder = scratch() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@drawn
@given(sets(), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_what_is_written_indexed_and_resharded_is_the_same_set(samples, shards, per_shard, upper):
    folder = empty("tars")
    for number in range(shards):
        part = samples[number::shards]
        with TarWriter(folder / f"{number}.tar") as tar:
            for sample in part:
                for ext, data in members_of(sample).items():
                    tar.add(f"{sample['key']}.{ext.upper() if upper else ext}", data)
        if part and part[0]["score"] is not None:
            rows = [{name: sample[name] for name in ("key", "uid", "text", "score")} for sample in part]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    assert run(IndexStage((str(folder),), str(empty("pool")))).items == len(samples)
    assert read_pool(scratch() / "pool") == expected(samples)
    run(ReshardStage(str(scratch() / "pool"), None, "", str(empty("again")), per_shard))
    assert read_tars(scratch() / "again") == read_pool(scratch() / "again") == expected(samples)
    run(IndexStage((str(scratch() / "again"),), str(empty("last"))))
    assert read_pool(scratch() / "last") == expected(samples)


@drawn
@given(sets(), st.integers(1, 3))
def test_what_a_pool_writer_writes_is_the_same_set(samples, tars):
    folder = empty("written")
    writer, rows = PoolWriter(str(folder), "0"), []
    for number in range(tars):
        with writer.tar(f".{number}") as tar:
            rows += [tar.add(sample["key"], members_of(sample)) for sample in samples[number::tars]]
    order = [sample for number in range(tars) for sample in samples[number::tars]]
    table = pa.table(
        {
            "uid": [uid_of(i) for i in range(len(order))],
            "key": [sample["key"] for sample in order],
            "text": [sample["text"] for sample in order],
            "score": pa.array([sample["score"] for sample in order], pa.float32()),
        }
    )
    output = writer.view(with_source(located(table, rows), "here"))
    record = Record("0", "", {"0.parquet": {"sha256": ""}}, output.items, [], output.values)
    pool = Manifest("index", 1, "", {}, {}, 1, output.items, {"count": 0}, {}, {"shards": shard_entries([record])})
    (folder / MANIFEST).write_text(json.dumps({name: value for name, value in asdict(pool).items() if name != "url"}))
    (folder / LOCATIONS).write_text("{}")
    assert read_pool(folder) == expected(samples)


N = 4


@functools.lru_cache(maxsize=1)
def whole():
    """A tar with a parquet that has page checksums; by uid caption, image and where that is; and the pool's digest."""
    samples, rows = {}, []
    folder = empty("whole")
    with TarWriter(folder / "0.tar") as tar:
        for number in range(N):
            key, text = f"{number:09d}", f"caption {number}, a plain square"
            row = {"uid": uid_of(number), "url": f"https://example.com/{number}.jpg"}
            image = draw_image((30 * number, 90, 9), number, (8, 8), "png")
            start = tar.add(f"{key}.png", image)
            samples[row["uid"]] = (text, image, range(start, start + len(image)))
            tar.add(f"{key}.txt", text.encode())
            tar.add(f"{key}.json", json.dumps(row).encode())
            rows.append(row | {"key": key, "text": text, "score": number / 8})
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet", write_page_checksum=True)
    run(IndexStage((str(folder),), str(empty("whole-pool"))))
    return folder, samples, Pool.open(str(scratch() / "whole-pool")).digest


def damaged(file, offset, bit):
    """What is read by uid after one bit of a file is flipped, and how many samples are reported as skipped. None where
    the index fails."""
    folder, out = scratch() / "damaged", scratch() / "damaged-pool"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole()[0], folder)
    data = bytearray((folder / file).read_bytes())
    data[offset % len(data)] ^= 1 << bit
    (folder / file).write_bytes(data)
    try:
        manifest = execute(IndexStage((str(folder),), str(out)), SerialExecutor(), budget=Budget(1000))
    except WinnowError:
        return None
    found = {}
    for shard in Pool.open(str(out)).shards:
        for sample in shard.samples(shard.table([*SAMPLE, "score"]), ["score"]):
            found[sample.uid] = sample.text, sample.members["png"], sample.columns["score"]
    return found, manifest.skipped["count"]


flips = settings(drawn, max_examples=40)


@flips
@given(st.integers(0, 1 << 20), st.integers(0, 7))
def test_a_corrupted_byte_of_a_tar_is_noticed_or_changes_nothing(offset, bit):
    folder, samples, digest = whole()
    at = offset % (folder / "0.tar").stat().st_size
    if (got := damaged("0.tar", offset, bit)) is None:
        return
    found, skipped = got
    assert len(found) + skipped >= N
    for uid, (text, image, score) in found.items():
        assert text == samples[uid][0] and score == int(uid[16:], 16) / 8
        if at in samples[uid][2]:  # an image has nothing to be compared with; but the pool is another
            assert Pool.open(str(scratch() / "damaged-pool")).digest != digest
        else:
            assert image == samples[uid][1]


@flips
@given(st.integers(0, 1 << 20), st.integers(0, 7))
def test_a_corrupted_byte_of_a_parquet_is_noticed_or_changes_nothing(offset, bit):
    samples = whole()[1]
    if (got := damaged("0.parquet", offset, bit)) is not None:
        found, skipped = got
        assert len(found) + skipped >= N
        for uid, (text, image, score) in found.items():
            assert (text, image) == samples[uid][:2]
            assert score in (int(uid[16:], 16) / 8, None)  # the headers of pages have no checksum


@settings(drawn, max_examples=12)
@given(st.integers(0, 1 << 20), st.integers(0, 7), st.sampled_from(["0.tar", "0.parquet"]))
def test_a_byte_that_is_corrupted_after_indexing_is_noticed(offset, bit, file):
    """The tar that the index left in place, and the view that it wrote."""
    folder, pool = empty("stale"), empty("stale-pool")
    shutil.copytree(whole()[0], folder, dirs_exist_ok=True)
    run(IndexStage((str(folder),), str(pool)))
    before = read_pool(pool)
    path = (folder if file == "0.tar" else pool) / file
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(WinnowError, match=f"{file}: "):
        read_pool(pool)
    assert len(before) == N

"""What resharding carries: repeats, every member, columns of every type; and what it writes for other readers."""

import base64
import datetime
import io
import json
import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from tests.drawing import sample, uid_of, write_pool, write_tar
from tests.field.helpers import curate, index, read_shards, winnow
from winnow.curation.reshard import ReshardStage
from winnow.infra.io.storage import digest_file
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import decode_uids, encode_uids, save_subset
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.data.samples import Samples


def shard_of(folder: Path, columns: dict[str, pa.Array], name: str = "00000", first: int = 0) -> Path:
    """A shard whose parquet has further columns."""
    samples = [sample(first + i) for i in range(len(next(iter(columns.values()))))]
    write_tar(folder / f"{name}.tar", samples)
    table = pa.Table.from_pylist([item["row"] for item in samples])
    for key, values in columns.items():
        table = table.append_column(key, values)
    pq.write_table(table, folder / f"{name}.parquet")
    return folder


def reshard(source: Path, out: Path, *more: object) -> list[dict[str, bytes]]:
    """`winnow reshard`; the samples, read by Python's tarfile."""
    status, printed = winnow("reshard", source, "--out", out, "--executor", "serial", *more)
    assert status == 0, printed
    return read_shards(out)


def facts_of(samples: list[dict[str, bytes]]) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(item["json"], parse_constant=refuse) for item in samples]


def test_a_uid_listed_k_times_is_written_k_times_and_trained_on_as_often(tmp_path):
    write_pool(tmp_path / "s", 2, 4)
    index(tmp_path / "s", tmp_path / "p")
    listed = [uid_of(i) for i in (6, 1, 1, 1, 4, 4)]
    save_subset(str(tmp_path / "subset.npy"), decode_uids(pa.array(listed)))
    found = reshard(tmp_path / "p", tmp_path / "r", "--subset", tmp_path / "subset.npy", "--samples-per-shard", 2)
    # DataComp's resharder: for each sample of the pool, in order, as many copies as the subset has of its uid
    wanted = [i for i in range(8) for _ in range(listed.count(uid_of(i)))]
    members = [sample(i)["members"] for i in wanted]
    assert [(item["jpg"], item["txt"]) for item in found] == [(item["jpg"], item["txt"]) for item in members]
    assert [facts["uid"] for facts in facts_of(found)] == [uid_of(i) for i in wanted]
    tars = sorted(map(str, (tmp_path / "r").glob("*.tar")))
    read = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(tars) == 3 and len({item["__key__"] for item in read}) == len(read) == 6
    # training sees the same samples in the same order with and without resharding
    direct = Samples(str(tmp_path / "p"), str(tmp_path / "subset.npy"))
    again = Samples(str(tmp_path / "r"))
    texts = [[item.text for item in one.read(np.arange(len(one)))] for one in (direct, again)]
    assert texts[0] == texts[1] == [sample(i)["members"]["txt"].decode() for i in wanted]


def test_a_subset_of_repeats_counts_them_as_often_as_the_pool_has_them(tmp_path):
    """As in DataComp's resharder, each row of a listed uid counts as often as the uid is listed."""
    write_pool(tmp_path / "s", 1, 4)
    index(tmp_path / "s", tmp_path / "p")
    listed = [uid_of(i) for i in (0, 1, 1, 1, 3)]
    save_subset(str(tmp_path / "subset.npy"), decode_uids(pa.array(listed)))
    reshard(tmp_path / "p", tmp_path / "r", "--subset", tmp_path / "subset.npy")
    status, printed, subset = curate(tmp_path / "r", {"random": {"fraction": 1.0}}, tmp_path / "c")
    assert status == 0, printed  # the default budget of skipped samples is 5 %
    assert encode_uids(subset) == sorted(set(listed))
    assert json.loads((tmp_path / "c" / "subset" / "funnel.json").read_text())["repeated"] == 2
    samples = Samples(str(tmp_path / "r"), str(tmp_path / "c" / "subset" / "subset.npy"))
    assert sorted(item.uid for item in samples.read(np.arange(len(samples)))) == sorted(listed)
    again = reshard(tmp_path / "r", tmp_path / "again", "--subset", tmp_path / "c" / "subset" / "subset.npy")
    assert sorted(facts["uid"] for facts in facts_of(again)) == sorted(listed)


def test_every_member_and_every_field_of_the_json_is_carried(tmp_path):
    array = io.BytesIO()
    np.save(array, np.arange(4))
    members = {"cls": b"3", "npy": array.getvalue(), "seg.png": b"mask", "2.txt": b"another caption"}
    facts = {"uid": uid_of(0), "similarity": math.nan, "exif": {"Make": "x", "bad": [math.inf]}, "text": "old", "n": 7}
    texts = {"0": b"a first caption", "1": b"a second caption"}
    samples = [{"key": key, "members": sample(0)["members"] | {"txt": text} | members} for key, text in texts.items()]
    samples[0]["members"]["json"] = json.dumps(facts).replace("Infinity", "1e999").encode()
    samples[1]["members"]["json"] = b'{"note": "\\ud800"}'  # JSON can escape a lone surrogate
    write_tar(tmp_path / "s" / "0.tar", samples)
    found = reshard(tmp_path / "s", tmp_path / "r")
    for old, new in zip(samples, found, strict=True):
        assert {ext: data for ext, data in new.items() if ext != "json"} == {
            ext: data for ext, data in old["members"].items() if ext != "json"
        }
    first, second = facts_of(found)
    kept = {"similarity": None, "exif": {"Make": "x", "bad": [None]}, "n": 7, "text": "a first caption", "label": 3}
    assert {key: first[key] for key in kept} == kept and second["note"] == "\ud800"
    again = reshard(tmp_path / "r", tmp_path / "twice")
    assert facts_of(again) == [first, second]


def test_columns_of_every_type_reach_the_json_and_the_parquet(tmp_path):
    moment = np.datetime64("2020-02-29T23:59:58.123456789")
    day, noon = datetime.date(2020, 2, 29), datetime.datetime(2020, 2, 29, 12, tzinfo=datetime.UTC)
    columns = {
        "nanoseconds": pa.array([moment, None]),
        "seconds": pa.array([noon.replace(tzinfo=None), None], pa.timestamp("s")),
        "zoned": pa.array([noon, None], pa.timestamp("us", "Europe/Berlin")),
        "day": pa.array([day, None]),
        "day64": pa.array([day, None], pa.date64()),
        "time": pa.array([datetime.time(1, 2, 3), None], pa.time32("ms")),
        "duration": pa.array([datetime.timedelta(seconds=90, milliseconds=5), None]),
        "decimal": pa.array([Decimal("12.50"), None]),
        "bytes": pa.array([b"\x00\xff", None]),
        "fixed": pa.array([b"ab", None], pa.binary(2)),
        "score": pa.array([math.nan, None], pa.float32()),
        "half": pa.array([1.5, math.inf], pa.float16()),
        "list": pa.array([[0.5, math.nan], None]),
        "struct": pa.array([{"at": day, "is": b"x"}, None]),
        "map": pa.array([[("a", math.inf), ("b", 2.0)], None], pa.map_(pa.string(), pa.float64())),
    }
    source = shard_of(tmp_path / "s", columns)
    index(source, tmp_path / "p")
    first, second = facts_of(reshard(tmp_path / "p", tmp_path / "r"))
    assert np.datetime64(first["nanoseconds"]) == moment
    assert datetime.datetime.fromisoformat(first["seconds"]) == noon.replace(tzinfo=None)
    assert datetime.datetime.fromisoformat(first["zoned"]) == noon
    assert [datetime.date.fromisoformat(first[name]) for name in ("day", "day64")] == [day, day]
    assert datetime.time.fromisoformat(first["time"]) == datetime.time(1, 2, 3)
    assert float(re.fullmatch(r"PT([\d.]+)S", first["duration"])[1]) == 90.005
    assert Decimal(first["decimal"]) == Decimal("12.50")
    assert [base64.b64decode(first[name]) for name in ("bytes", "fixed")] == [b"\x00\xff", b"ab"]
    assert "score" not in first and first["half"] == 1.5 and first["list"] == [0.5, None]
    assert first["struct"] == {"at": "2020-02-29", "is": "eA=="} and first["map"] == {"a": None, "b": 2.0}
    assert not set(columns) & set(second)
    made, view = pq.read_table(tmp_path / "r" / "00000.parquet"), pq.read_table(tmp_path / "p" / "00000.parquet")
    for name in columns:
        assert made[name].type == view[name].type and str(made[name]) == str(view[name]), name  # NaN != NaN


def test_columns_typed_differently_between_shards(tmp_path):
    one = {"n": pa.array([1, 2], pa.int32()), "at": pa.array([1, 2], pa.timestamp("us")), "only": pa.array(["x", "y"])}
    one["box"] = pa.array([[1, 2], [3, 4]], pa.list_(pa.int32()))
    two = {"n": pa.array([0.5, None]), "at": pa.array([3000, 5], pa.timestamp("ns")), "box": pa.array([[0.5], None])}
    shard_of(tmp_path / "s", one)
    shard_of(tmp_path / "s", two, "00001", first=2)
    facts = facts_of(reshard(tmp_path / "s", tmp_path / "r"))
    assert [item.get("n") for item in facts] == [1, 2, 0.5, None]
    times = [np.datetime64(item["at"]) for item in facts]
    assert times == [np.datetime64(n, "ns") for n in (1000, 2000, 3000, 5)]
    assert [item.get("only") for item in facts] == ["x", "y", None, None]
    assert [item.get("box") for item in facts] == [[1, 2], [3, 4], [0.5], None]
    assert pq.read_table(tmp_path / "r" / "00000.parquet")["n"].to_pylist() == [1.0, 2.0, 0.5, None]


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        (["a", "b"], [1, 2], r'"x" is string in .*00000.parquet and int64 here'),
        ([2**60 + 1, 0], [0.5, 1.5], 'value of the column "x" does not fit double'),
    ],
    ids=["text and numbers", "a number that would be rounded"],
)
def test_types_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path, one, two, words):
    shard_of(tmp_path / "s", {"x": pa.array(one)})
    shard_of(tmp_path / "s", {"x": pa.array(two)}, "00001", first=2)
    index(tmp_path / "s", tmp_path / "p")
    status, printed = winnow("reshard", tmp_path / "p", "--out", tmp_path / "r", "--executor", "serial")
    assert status == 1 and re.search(words, printed), printed
    assert not list((tmp_path / "r").glob("*.tar"))


def test_a_column_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    write_pool(tmp_path / "s", 1, 2)
    parquet = tmp_path / "s" / "00000.parquet"
    keyed_by_number = pa.array([[(1, "a")], []], pa.map_(pa.int32(), pa.string()))
    pq.write_table(pq.read_table(parquet).append_column("counts", keyed_by_number), parquet)
    index(tmp_path / "s", tmp_path / "p")
    stage = ReshardStage(str(tmp_path / "p"), None, "", str(tmp_path / "r"))
    with pytest.raises(Exception, match='JSON cannot hold the column "counts"'):
        stage.plan()


def test_other_readers_find_the_sizes(tmp_path):
    write_pool(tmp_path / "s", 2, 5)
    index(tmp_path / "s", tmp_path / "p")
    reshard(tmp_path / "p", tmp_path / "r", "--samples-per-shard", 4)
    tars = sorted(path.name for path in (tmp_path / "r").glob("*.tar"))
    # open_clip's get_dataset_size, and DataComp's load_shard_size
    sizes = json.loads((tmp_path / "r" / "sizes.json").read_text())
    assert [int(sizes[name]) for name in tars] == [4, 4, 2] and set(sizes) == set(tars)
    stats = [json.loads((tmp_path / "r" / f"{name[:-4]}_stats.json").read_text()) for name in tars]
    assert [int(item["successes"]) for item in stats] == [4, 4, 2]
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert "sizes.json" in manifest["files"]
    # fewer shards later: no size of a shard that is gone stays
    execute(ReshardStage(str(tmp_path / "p"), None, "", str(tmp_path / "r"), 10), SerialExecutor())
    assert json.loads((tmp_path / "r" / "sizes.json").read_text()) == {"00000.tar": 10}
    assert [path.name for path in (tmp_path / "r").glob("*_stats.json")] == ["00000_stats.json"]


def test_a_subset_with_uids_that_the_pool_lacks_is_refused_by_number(tmp_path):
    write_pool(tmp_path / "s", 1, 3)
    index(tmp_path / "s", tmp_path / "p")
    url = str(tmp_path / "subset.npy")
    save_subset(url, decode_uids(pa.array([uid_of(0)] * 3 + [uid_of(9)] * 2)))
    with pytest.raises(Exception, match="1 of the subset's 2 uids are not in the pool"):
        ReshardStage(str(tmp_path / "p"), url, digest_file(url), str(tmp_path / "r")).plan()
    assert encode_uids(Pool.open(str(tmp_path / "p")).uids()) == [uid_of(i) for i in range(3)]

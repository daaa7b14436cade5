"""Reports about files, resuming and object stores; tests/field/README.md names them."""

import json

import fsspec
import numpy as np
import pytest

from tests.drawing import uid_of, write_pool
from tests.field.helpers import index, pairs, read_shards, sample, winnow, write_tar

NAMES = ["a[b]", "100%", "a%40b", "a#b", "ünï 猫", "a b", "a'b", "a*b?", "a{0..1}", "a+b", "v1.0"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_whose_names_mean_something_to_globs_and_urls(tmp_path, name):
    shards = write_pool(tmp_path / name / "shards", 1, 2)
    assert index(shards, tmp_path / name / "pool")["items"] == 2
    assert len(pairs(tmp_path / name / "pool", tmp_path / name / "again")) == 2


def test_shards_whose_names_mean_something_to_globs_and_urls(tmp_path):
    shards = write_pool(tmp_path / "shards", len(NAMES), 2)
    for number, name in enumerate(NAMES):
        for ext in ("tar", "parquet"):
            (shards / f"{number:05}.{ext}").rename(shards / f"{name}.{ext}")
    manifest = index(shards, tmp_path / "pool", budget=0)
    assert manifest["items"] == 2 * len(NAMES)
    assert len(pairs(tmp_path / "pool", tmp_path / "again")) == 2 * len(NAMES)


@pytest.mark.parametrize("name", ["plain", "a[b]", "a%40b", "a#b", "a b"])
def test_the_same_on_an_object_store(tmp_path, name):
    shards, store = write_pool(tmp_path / "shards", 2, 2), fsspec.filesystem("memory")
    root = f"/{tmp_path.name}/{name}"
    for path in shards.iterdir():
        store.pipe(f"{root}/shards/{path.name}", path.read_bytes())
    for command, source, out in (("index", "shards", "pool"), ("reshard", "pool", "again")):
        args = (command, f"memory:/{root}/{source}", "--out", f"memory:/{root}/{out}", "--executor", "serial")
        status, printed = winnow(*args)
        assert status == 0 and "4 samples" in printed, printed
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "00000.tar").write_bytes(store.cat_file(f"{root}/again/00000.tar"))
    assert len(read_shards(tmp_path / "again")) == 4


def test_shards_behind_symbolic_links(tmp_path):
    write_pool(tmp_path / "real", 1, 2)
    (tmp_path / "shards").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "shards" / path.name).symlink_to(path)
    assert index(tmp_path / "shards", tmp_path / "pool", budget=0)["items"] == 2


def files(folder):
    """What a stage's folder holds, without its times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


@pytest.fixture
def pool(tmp_path):
    """A pool of three shards, in each of which one image of four is broken."""
    for shard in range(3):
        members = [member for i in range(4) for member in sample(str(i), 4 * shard + i)]
        members[0] = (members[0][0], b"<html>")
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    index(tmp_path / "shards", tmp_path / "pool")
    return tmp_path / "pool"


@pytest.mark.parametrize("damage", ["cut", "gone", "record gone", "record empty", "killed"])
def test_a_stopped_run_ends_with_the_same_files_and_the_same_counts(pool, damage):
    before = files(pool)
    view, record = pool / "1.parquet", pool / "units" / "1.json"
    if damage == "cut":
        view.write_bytes(view.read_bytes()[:-7])
    elif damage == "gone":
        view.unlink()
    elif damage == "record gone":
        record.unlink()
    elif damage == "record empty":
        record.write_bytes(b"")
    else:
        for path in (view, record, pool / "manifest.json"):
            path.unlink()
    manifest = index(pool.parent / "shards", pool)
    assert manifest["skipped"]["count"] == 3 and manifest["items"] == 9
    assert files(pool) == before


def test_a_second_run_does_nothing_again(pool):
    before = {path: path.stat().st_mtime_ns for path in pool.rglob("*") if path.is_file() and path.name != "log.jsonl"}
    index(pool.parent / "shards", pool)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_shard_that_is_added_later_is_the_only_one_read(pool):
    views = {path: path.stat().st_mtime_ns for path in pool.glob("*.parquet")}
    write_tar(pool.parent / "shards" / "3.tar", sample("0", 99))
    assert index(pool.parent / "shards", pool)["items"] == 10
    assert {path: path.stat().st_mtime_ns for path in views} == views


def test_shards_that_were_moved_away_are_missed_by_name(pool):
    (pool.parent / "shards").rename(pool.parent / "elsewhere")
    status, printed = winnow("reshard", pool, "--out", pool.parent / "again", "--executor", "serial")
    assert status == 1 and "shards/0.tar" in printed


def test_a_folder_without_shards_and_one_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        args = ("index", tmp_path / name, "--out", tmp_path / "pool", "--executor", "serial")
        status, printed = winnow(*args)
        assert status == 2 and name in printed
    assert not (tmp_path / "pool" / "manifest.json").exists()


def uids(*numbers):
    return np.array([(int(uid_of(i)[:16], 16), i) for i in numbers], dtype="u8,u8")


def test_resharding_loses_no_remainder(tmp_path):
    shards = write_pool(tmp_path / "shards", 3, 5)
    args = ("--samples-per-shard", 4, "--executor", "serial")
    status, printed = winnow("reshard", shards, "--out", tmp_path / "again", *args)
    assert status == 0, printed
    found = [json.loads(item["json"])["uid"] for item in read_shards(tmp_path / "again")]
    assert found == [uid_of(i) for i in range(15)]
    assert len(list((tmp_path / "again").glob("*.tar"))) == 4


def test_a_subset_in_any_order_names_its_samples(tmp_path):
    shards = write_pool(tmp_path / "shards", 2, 6)
    np.save(tmp_path / "subset.npy", uids(9, 3, 1))
    args = ("--subset", tmp_path / "subset.npy", "--out", tmp_path / "again", "--executor", "serial")
    status, printed = winnow("reshard", shards, *args)
    assert status == 0, printed
    found = [json.loads(item["json"])["uid"] for item in read_shards(tmp_path / "again")]
    assert sorted(found) == sorted(uid_of(i) for i in (1, 3, 9))


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        (uids(1, 99), "1 of the subset's 2"),
        (uids(), "empty"),
        (np.array([1, 2, 3]), "int64"),
        (np.array(["uid"], dtype=object), "NumPy"),
    ],
    ids=["strangers", "empty", "numbers", "pickled"],
)
def test_a_subset_that_cannot_be_meant_is_refused(tmp_path, subset, words):
    shards = write_pool(tmp_path / "shards", 1, 3)
    np.save(tmp_path / "subset.npy", subset, allow_pickle=True)
    args = ("--subset", tmp_path / "subset.npy", "--out", tmp_path / "again", "--executor", "serial")
    status, printed = winnow("reshard", shards, *args)
    assert status == 1 and words in printed
    assert not list((tmp_path / "again").glob("*.tar"))

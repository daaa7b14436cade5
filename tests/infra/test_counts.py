"""Budgets are in samples: what a damaged, lost or passed over shard had is counted, and a sample only once."""

import gzip
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass

import pytest

from tests.drawing import draw_image, sample, uid_of, write_parquet, write_pool, write_tar
from winnow.curation.measures.image_hash import ImageHash
from winnow.curation.measures.quality import Quality
from winnow.curation.measures.stage import MeasureStage
from winnow.infra.errors import WinnowError
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
from winnow.infra.stages.stage import Output, Skipped, Stage, Unit

N = 10
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def run(stage, budget=1000):
    return execute(stage, SerialExecutor(), budget=Budget(budget))


def index(folder, budget=1000, **options):
    return run(IndexStage((str(folder / "shards"),), str(folder / "pool"), **options), budget)


def damaged(folder, damage, parquet=True):
    """Two shards of N samples, the first of which `damage` changes, as bytes; without a parquet on request."""
    shards = write_pool(folder / "shards", 2, N, parquet)
    path = shards / "00000.tar"
    path.write_bytes(damage(path.read_bytes()))
    return shards


def uids(folder):
    return [uid for shard in Pool.open(str(folder / "pool")).shards for uid in shard.table(["uid"])["uid"].to_pylist()]


@pytest.mark.parametrize(("column", "value"), [("original_width", 1 << 40), ("original_height", -1), ("uid", "x")])
def test_one_absurd_value_costs_its_sample(tmp_path, column, value):
    samples = [sample(i) for i in range(N)]
    samples[3]["row"][column] = value
    write_tar(tmp_path / "shards" / "0.tar", samples)
    write_parquet(tmp_path / "shards" / "0.parquet", samples)
    manifest = index(tmp_path)
    assert manifest.skipped["count"] == 1 and uids(tmp_path) == [uid_of(i) for i in range(N) if i != 3]


def header(number, ext="jpg"):
    """Offset of a member's header in the tar that `write_pool` makes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for item in map(sample, range(N)):
            for name, data in item["members"].items():
                if item["key"] == f"{number:09d}" and name == ext:
                    return tar.offset
                info = tarfile.TarInfo(f"{item['key']}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    raise AssertionError


@pytest.mark.parametrize("parquet", [True, False])
def test_a_cut_tar_counts_all_that_it_had(tmp_path, parquet):
    damaged(tmp_path, lambda data: data[: header(4, "txt") + 700], parquet)
    with pytest.raises(WinnowError, match=r"[67] of 20 skipped, the budget is 5.0% \(truncated tar: [67]\)"):
        index(tmp_path, 0.05)
    manifest = index(tmp_path)
    assert manifest.skipped["reasons"] == {"truncated tar": 2 * N - manifest.items}
    assert uids(tmp_path) == [uid_of(i) for i in (*range(manifest.items - N), *range(N, 2 * N))]
    assert manifest.items - N in (3, 4)
    assert index(tmp_path) == manifest
    with pytest.raises(WinnowError, match="of 20 skipped, the budget is 5"):  # also when there is nothing to do
        index(tmp_path, 0.05)


def test_a_cut_tar_that_was_filled_with_zeros_is_noticed(tmp_path):
    """As a download leaves it that reserves the room on the disk first."""
    damaged(tmp_path, lambda data: data[: header(4, "txt")] + bytes(2 << 20), parquet=False)
    manifest = index(tmp_path)
    assert manifest.skipped["reasons"] == {"truncated tar": 6} and manifest.items == 2 * N - 6


def test_a_cut_tar_of_which_nothing_says_how_many_it_had_is_beyond_the_default_budget(tmp_path):
    damaged(tmp_path, lambda data: data[: header(5)], parquet=False)
    (tmp_path / "shards" / "00001.tar").unlink()
    with pytest.raises(WinnowError, match="truncated tar"):
        index(tmp_path, 0.05)
    assert index(tmp_path).items == 4


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty file"),
        (gzip.compress, "compressed; shards are plain tars"),
        (lambda data: b"<html>" * 200, "not a tar"),
        (lambda data: LFS, "a Git LFS pointer instead of the file; fetch the file with `git lfs pull`"),
    ],
)
def test_a_file_that_is_not_a_tar_counts_as_a_shard(tmp_path, damage, reason, parquet):
    damaged(tmp_path, damage, parquet)
    assert index(tmp_path).skipped["reasons"] == {reason: N}
    assert uids(tmp_path) == [uid_of(i) for i in range(N, 2 * N)]


def test_a_bad_header_in_the_middle_is_named_and_what_follows_counted(tmp_path):
    at = header(3)
    damaged(tmp_path, lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], parquet=False)
    manifest = index(tmp_path)
    assert manifest.items == N + 2 and list(manifest.skipped["reasons"]) == ["bad header"]
    assert abs(manifest.skipped["count"] - 8) <= 4  # estimated from the size of what follows
    write_parquet(tmp_path / "shards" / "00000.parquet", [sample(i) for i in range(N)])
    assert index(tmp_path).skipped["reasons"] == {"bad header": 8}


def test_shards_that_cannot_be_read_are_named_and_counted(tmp_path):
    shards = write_pool(tmp_path / "shards", 4, N)
    for stem, ext in (("00000", "gz"), ("00003", "gz")):
        (shards / f"{stem}.tar.{ext}").write_bytes(gzip.compress((shards / f"{stem}.tar").read_bytes()))
    (shards / "00003.tar").unlink()
    (shards / "00002.tar").unlink()
    write_pool(shards / "more", 1, N, first=90)
    write_pool(shards / "output", 1, N, first=200)
    (shards / "output" / "manifest.json").write_text("{}")
    manifest = index(tmp_path)
    assert manifest.items == 2 * N and uids(tmp_path) == [uid_of(i) for i in range(2 * N)]
    assert manifest.skipped["reasons"] == {
        "a parquet without its tar.": N,
        "a tar in a directory below the others; give the directory as another source.": N,
        "a compressed tar; shards are plain tars.": N,
    }
    with pytest.raises(WinnowError, match="30 of 50 skipped"):
        index(tmp_path, 0.5)
    assert index(tmp_path, 0, skip=("00002", "00003", "more/00000")).skipped["count"] == 0


def test_hidden_files_are_not_shards(tmp_path):
    shards = write_pool(tmp_path / "shards", 1, N)
    for name in ("._00000.tar", "._00000.parquet", "_old.tar", ".hidden.parquet"):
        (shards / name).write_bytes(b"\0\5\x16\7")
    assert index(tmp_path, 0).items == N


@pytest.mark.parametrize("between", ["an end", "a block"])
def test_archives_that_follow_one_another_are_read_as_one(tmp_path, between):
    shards = write_pool(tmp_path / "shards", 2, N, parquet=False)
    first, second = ((shards / f"0000{i}.tar").read_bytes() for i in range(2))
    if between == "a block":
        with tarfile.open(shards / "00000.tar") as tar:
            tar.getmembers()
            first = first[: tar.offset]
            first = first[: len(first.rstrip(b"\0")) + 511 & ~511] + bytes(512)
    (shards / "00000.tar").write_bytes(first + second)
    (shards / "00001.tar").unlink()
    assert index(tmp_path, 0).items == 2 * N and uids(tmp_path) == [uid_of(i) for i in range(2 * N)]
    shard = Pool.open(str(tmp_path / "pool")).shards[0]
    assert shard.image_bytes(shard.table()) == [sample(i)["members"]["jpg"] for i in range(2 * N)]


@pytest.mark.parametrize(("after", "skipped"), [(bytes(30000), 0), (bytes(100), 0), (b"\n", 1), (b"<html>" * 999, 1)])
def test_other_bytes_after_the_end_are_noticed(tmp_path, after, skipped):
    damaged(tmp_path, lambda data: data + after)
    manifest = index(tmp_path)
    assert manifest.items == 2 * N
    assert manifest.skipped["reasons"] == ({"bytes after the end of the archive": 1} if skipped else {})


def with_hole(path):
    """A file whose first MiB is a hole."""
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(draw_image((1, 2, 3), 0))


@pytest.mark.parametrize("kind", ["gnu", "posix", "posix --sparse-version=0.0", "posix --sparse-version=0.1"])
def test_a_sparse_member_costs_its_sample(tmp_path, kind):
    (tmp_path / "in").mkdir()
    (tmp_path / "shards").mkdir()
    for number in range(3):
        for ext, data in sample(number)["members"].items():
            (tmp_path / "in" / f"{number}.{ext}").write_bytes(data)
    with_hole(tmp_path / "in" / "1.jpg")
    subprocess.run(
        f"tar --format={kind} --sort=name --sparse -cf {tmp_path}/shards/0.tar -C {tmp_path}/in .".split(), check=True
    )
    manifest = index(tmp_path)
    assert manifest.skipped["reasons"] == {"sparse member": 1} and manifest.skipped["samples"][0]["id"] == "0/./1"
    assert uids(tmp_path) == [uid_of(0), uid_of(2)]
    shard = Pool.open(str(tmp_path / "pool")).shards[0]
    assert shard.image_bytes(shard.table()) == [sample(i)["members"]["jpg"] for i in (0, 2)]


@pytest.mark.parametrize(("kind", "reason"), [(tarfile.LNKTYPE, "hard link"), (tarfile.SYMTYPE, "symbolic link")])
def test_links_are_named(tmp_path, kind, reason):
    write_tar(tmp_path / "shards" / "0.tar", [sample(0)])
    with tarfile.open(tmp_path / "shards" / "0.tar", "a") as tar:
        for name, data in {"1.jpg": None, "1.txt": b"linked"}.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = kind, "000000000.jpg"
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data or b""))
    manifest = index(tmp_path)
    assert manifest.skipped["reasons"] == {reason: 1} and manifest.items == 1


def test_a_pool_without_samples_is_refused(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [])
    with pytest.raises(WinnowError, match="shards: holds not one sample that can be used"):
        index(tmp_path)
    write_tar(tmp_path / "shards" / "0.tar", [{"key": "a", "members": {"txt": b"no image"}}])
    with pytest.raises(WinnowError, match=r"not one sample that can be used \(no image\)"):
        index(tmp_path)
    assert not (tmp_path / "pool" / "manifest.json").exists()


def test_a_uid_of_an_earlier_shard_is_reported_by_key(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [sample(i) for i in range(3)])
    write_tar(tmp_path / "shards" / "1.tar", [sample(i) for i in (5, 1)])
    (item,) = index(tmp_path).skipped["samples"]
    assert item == {"id": "1/000000001", "reason": "duplicated uid", "detail": ""}


def test_a_broken_image_counts_once_for_several_measures(tmp_path):
    samples = [sample(i) for i in range(2 * N)]
    for item in samples[:3]:
        item["members"]["jpg"] = item["members"]["jpg"][:-40]  # the header is whole
    write_tar(tmp_path / "shards" / "0.tar", samples)
    index(tmp_path)
    stage = MeasureStage(str(tmp_path / "pool"), (Quality(), ImageHash()), str(tmp_path / "columns"))
    for budget in (2, 0.14):
        with pytest.raises(WinnowError, match="3 of 20 skipped"):
            run(stage, budget)
    for budget in (3, 0.15, 3):
        skipped = run(stage, budget).skipped
        assert skipped["count"] == 3 and [item["id"] for item in skipped["samples"]] == [uid_of(i) for i in range(3)]
    with pytest.raises(WinnowError, match="3 of 20 skipped"):
        run(stage, 2)


@dataclass
class Halves(Stage):
    """Units of 10 samples that are read in pairs; some fail, some lose a number of samples."""

    out: str
    failing: tuple = ()
    losing: tuple = ()

    name, version, allow_failures = "halves", 1, True

    def params(self):
        return {"failing": self.failing, "losing": self.losing}

    def plan(self):
        return [Unit(name, {}, group=name[0], items=10) for name in ("a1", "a2", "b1", "b2", "c1")]

    def run_group(self, units):
        for unit in units:
            if unit.name in self.failing:
                raise WinnowError("failed")
            lost = [Skipped("s", "odd"), Skipped("rest", "cut", count=4)] if unit.name in self.losing else []
            yield unit, Output(items=10 - 5 * bool(lost), skipped=lost)


def test_units_of_a_group_count_their_samples_once(tmp_path):
    facts = run(Halves(str(tmp_path / "a"), losing=("a1", "a2"))).skipped
    assert facts["reasons"] == {"cut": 4, "odd": 1} and len(facts["samples"]) == 2
    with pytest.raises(WinnowError, match="5 of 30 skipped, the budget is 4"):
        run(Halves(str(tmp_path / "b"), losing=("a1", "a2")), 4)
    with pytest.raises(WinnowError, match=r"15 of 30 skipped, the budget is 14 \(failed.: 10, cut: 4, odd: 1\)"):
        run(Halves(str(tmp_path / "c"), failing=("b2",), losing=("a1",)), 14)
    record = json.loads((tmp_path / "c" / "units" / "a1.json").read_text())
    assert [item.get("count") for item in record["skipped"]] == [None, 4]

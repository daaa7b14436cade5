"""Reports about tar shards; tests/field/README.md names them."""

import gzip
import io
import tarfile

import pytest

from tests.drawing import write_pool
from tests.field.helpers import index, jpeg, pairs, pairs_of, sample, truth, winnow, write_tar


def test_members_of_a_sample_that_are_not_adjacent_never_make_a_wrong_pair(tmp_path):
    first, second, third = sample("0", 0), sample("1", 1), sample("2", 2)
    members = [first[0], second[0], first[1], second[1], *third]
    found, skipped = pairs_of(tmp_path, members)
    assert truth(2).items() <= found.items() <= truth(0, 1, 2).items()
    assert skipped or len(found) == 3


def test_a_shard_of_images_followed_by_captions_is_refused_within_the_default_budget(tmp_path):
    images, captions = zip(*(sample(str(i), i) for i in range(4)), strict=True)
    write_tar(tmp_path / "shards" / "0.tar", [*images, *captions])
    status, printed = winnow("index", tmp_path / "shards", "--out", tmp_path / "pool", "--executor", "serial")
    assert status == 1
    assert "skipped" in printed


def test_a_member_met_twice_costs_its_copy_and_is_counted(tmp_path):
    again = [("0.jpg", jpeg(9))]
    found, skipped = pairs_of(tmp_path, [*sample("0", 0), *again, *sample("1", 1), *sample("0", 0)])
    assert found == truth(0, 1)
    assert skipped == 2


def test_equal_keys_in_two_shards_are_two_samples(tmp_path):
    for shard in range(2):
        members = [member for i in range(3) for member in sample(str(i), 3 * shard + i)]
        write_tar(tmp_path / "shards" / f"{shard}.tar", members)
    assert index(tmp_path / "shards", tmp_path / "pool")["items"] == 6
    assert pairs(tmp_path / "pool", tmp_path / "again") == truth(*range(6))


def test_equal_names_in_two_folders_are_two_samples(tmp_path):
    found, skipped = pairs_of(tmp_path, [*sample("a/0", 0), *sample("b/0", 1)])
    assert found == truth(0, 1) and not skipped


def test_a_dot_in_a_folder_does_not_end_the_key(tmp_path):
    found, skipped = pairs_of(tmp_path, [*sample("train.v1/22.0/0001", 0), *sample("train.v1/22.0/0002", 1)])
    assert found == truth(0, 1) and not skipped


def test_a_dot_in_a_name_is_reported_and_makes_no_wrong_pair(tmp_path):
    members = [*sample("./235342 Track 2.0 (Clean)", 0), *sample("./235342 Track 2.5 (Clean)", 1), *sample("k", 2)]
    found, skipped = pairs_of(tmp_path, members)
    assert found == truth(2)
    assert skipped >= 1


def test_two_images_under_compound_extensions_are_not_guessed_between(tmp_path):
    members = [("0.left.jpg", jpeg(7)), ("0.right.jpg", jpeg(8)), ("0.txt", b"a stereo pair"), *sample("1", 1)]
    found, skipped = pairs_of(tmp_path, members)
    assert found == truth(1)
    assert skipped == 1


@pytest.mark.parametrize("start", ["./", "/", "./a/", "猫 ü/é😀"])
def test_starts_of_paths(tmp_path, start):
    found, skipped = pairs_of(tmp_path, [*sample(f"{start}0", 0), *sample(f"{start}1", 1)])
    assert found == truth(0, 1) and not skipped


def test_extensions_in_capitals(tmp_path):
    upper = [(name.upper(), data) for name, data in sample("0", 0)]
    found, skipped = pairs_of(tmp_path, [*upper, ("1.Jpeg", jpeg(1)), ("1.txt", b"number 1")])
    assert found == truth(0, 1) and not skipped


@pytest.mark.parametrize("ext", ["jpeg", "png", "webp", "bmp"])
def test_shards_of_one_image_format_only(tmp_path, ext):
    members = [member for i in range(2) for member in sample(str(i), i, ext=ext)]
    found, skipped = pairs_of(tmp_path, members)
    assert found == truth(0, 1) and not skipped


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_longer_than_a_header_keep_apart(tmp_path, kind):
    long = "d" * 90 + "/" + "k" * 240
    found, skipped = pairs_of(tmp_path, [*sample(f"{long}0", 0), *sample(f"{long}1", 1)], kind)
    assert found == truth(0, 1) and not skipped


def test_plain_ustar(tmp_path):
    found, skipped = pairs_of(tmp_path, [*sample("0", 0), *sample("1", 1)], tarfile.USTAR_FORMAT)
    assert found == truth(0, 1) and not skipped


def test_macos_sidecars_are_no_samples(tmp_path):
    members = []
    for i in range(2):
        for name, data in sample(str(i), i):
            members += [(f"./._{name}", b"\0\x05\x16\x07"), (f"./{name}", data)]
    found, skipped = pairs_of(tmp_path, members)
    assert found == truth(0, 1) and not skipped


def test_directories_and_links_are_no_images(tmp_path):
    path = tmp_path / "shards" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind in (("data", tarfile.DIRTYPE), ("data/link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in [("data/link.txt", b"a link"), *sample("data/0", 0)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = index(path.parent, tmp_path / "pool")
    assert pairs(tmp_path / "pool", tmp_path / "again") == truth(0)
    assert manifest["skipped"]["count"] == 1


def test_a_tar_cut_in_the_middle_keeps_its_whole_samples_and_says_so(tmp_path):
    path = write_tar(tmp_path / "shards" / "0.tar", [member for i in range(6) for member in sample(str(i), i)])
    # Half of the samples, and part of the next one's image.
    with tarfile.open(path) as tar:
        end = tar.getmember("3.jpg").offset_data + 10
    path.write_bytes(path.read_bytes()[:end])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert pairs(tmp_path / "pool", tmp_path / "again") == truth(0, 1, 2)
    assert "truncated tar" in manifest["skipped"]["reasons"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(gzip.compress(b"x" * 2000, mtime=0), "compressed"), (b"", "empty"), (b"<html>" * 200, "not a tar")],
)
def test_a_file_that_is_no_plain_tar_is_named_for_what_it_is(tmp_path, content, reason):
    shards = write_pool(tmp_path / "shards", 1, 3, parquet=False)
    (shards / "00001.tar").write_bytes(content)
    manifest = index(shards, tmp_path / "pool")
    assert manifest["items"] == 3
    assert any(reason in found for found in manifest["skipped"]["reasons"])
    status, _ = winnow("index", shards, "--out", tmp_path / "strict", "--executor", "serial")
    assert status == 1


def test_an_archive_without_members_is_no_fault(tmp_path):
    shards = write_pool(tmp_path / "shards", 1, 3)
    write_tar(shards / "00001.tar", [])
    manifest = index(shards, tmp_path / "pool", budget=0)
    assert manifest["items"] == 3 and not manifest["skipped"]["count"]


def test_gaps_in_the_numbers_of_shards(tmp_path):
    shards = write_pool(tmp_path / "shards", 4, 2)
    for ext in ("tar", "parquet"):
        (shards / f"00002.{ext}").unlink()
    assert index(shards, tmp_path / "pool", budget=0)["items"] == 6


@pytest.mark.parametrize("parquet", [True, False])
def test_a_shard_copied_under_another_name_counts_once(tmp_path, parquet):
    shards = write_pool(tmp_path / "shards", 1, 3, parquet=parquet)
    for path in sorted(shards.iterdir()):
        path.with_stem("00001").write_bytes(path.read_bytes())
    manifest = index(shards, tmp_path / "pool")
    assert manifest["skipped"]["count"] == 3
    assert len(pairs(tmp_path / "pool", tmp_path / "again")) == 3

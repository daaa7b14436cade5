"""The tar writer against tarfile and webdataset, and what the reader says of files that are not tars."""

import gzip
import hashlib
import tarfile

import pytest
import webdataset

from winnow.infra.errors import WinnowError
from winnow.infra.io.tar import TarWriter, tar_samples

MEMBERS = {
    "000000000.jpg": bytes(range(256)) * 5,
    "000000000.txt": "ein Bär".encode(),
    "empty.txt": b"",
    "block.bin": b"x" * 512,
    "Фото-猫.txt": b"non-ASCII",
    "long/" + "n" * 180 + ".txt": b"long name",
    "long/" + "ü" * 90 + ".txt": b"both",
}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def write(path):
    with TarWriter(path) as tar:
        return {name: tar.add(name, data) for name, data in MEMBERS.items()}


def test_tarfile_reads_it_back(tmp_path):
    offsets = write(tmp_path / "a.tar")
    raw = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        infos = tar.getmembers()
        assert [info.name for info in infos] == list(MEMBERS)
        for info in infos:
            assert tar.extractfile(info).read() == MEMBERS[info.name]
            assert (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
            assert offsets[info.name] == info.offset_data
            assert raw[offsets[info.name] :][: info.size] == MEMBERS[info.name]
    assert len(raw) % tarfile.RECORDSIZE == 0


def test_webdataset_reads_it_back(tmp_path):
    write(tmp_path / "a.tar")
    found = {}
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False):
        found |= {f"{sample['__key__']}.{k}": v for k, v in sample.items() if not k.startswith("__")}
    assert found == MEMBERS


def test_bytes_are_those_of_tarfiles_headers(tmp_path):
    write(tmp_path / "a.tar")
    expected = b""
    for name, data in MEMBERS.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        expected += info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    expected += bytes(1024)
    assert (tmp_path / "a.tar").read_bytes() == expected + bytes(-len(expected) % tarfile.RECORDSIZE)


def test_bytes_depend_on_contents_alone(tmp_path):
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("a.tar", "b.tar")}
    assert len(digests) == 1


def test_a_tar_whose_writing_failed_is_not_a_complete_tar(tmp_path):
    with pytest.raises(KeyError), TarWriter(tmp_path / "a.tar") as tar:
        tar.add("a.txt", b"1")
        raise KeyError
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(WinnowError, match=r"truncated tar|empty file"):
        list(tar_samples(file, None))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(bytes(5000), mtime=0), "compressed; shards are plain tars"),
        (b"<html>" * 200, "not a tar"),
        (b"", "empty file"),
        (LFS, "a Git LFS pointer instead of the file; fetch the file with `git lfs pull`"),
    ],
)
def test_files_that_are_not_tars(tmp_path, content, words):
    (tmp_path / "0.tar").write_bytes(content)
    with (tmp_path / "0.tar").open("rb") as file, pytest.raises(WinnowError) as caught:
        list(tar_samples(file, ()))
    assert caught.value.what == words


def test_a_reader_that_takes_no_notice_of_faults_gets_an_error(tmp_path):
    """As evaluation sets are read: no sample is left out of a test set in silence."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.txt", tarfile.REGTYPE), ("b.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.txt"
            tar.addfile(info)
    with (tmp_path / "0.tar").open("rb") as file, pytest.raises(WinnowError, match=r"hard link.*sample b"):
        list(tar_samples(file, ()))
    found = []
    with (tmp_path / "0.tar").open("rb") as file:
        assert [key for key, _ in tar_samples(file, (), lambda *fault: found.append(fault[:2]))] == ["a"]
    assert found == [("b", "hard link")]

"""TarWriter against the readers its tars are for."""

import hashlib
import tarfile

import webdataset

from winnow.infra.io.tar import TarWriter

MEMBERS = {
    "000000000.jpg": bytes(range(256)) * 5,
    "000000000.txt": "ein Bär".encode(),
    "empty.txt": b"",
    "block.bin": b"x" * 512,
    "Фото-猫.txt": b"non-ASCII",
    "long/" + "n" * 180 + ".txt": b"long name",
    "long/" + "ü" * 90 + ".txt": b"both",
}


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


def test_bytes_depend_on_contents_alone(tmp_path):
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("a.tar", "b.tar")}
    assert len(digests) == 1


def test_an_error_leaves_no_end_of_archive(tmp_path):
    try:
        with TarWriter(tmp_path / "a.tar") as tar:
            tar.add("a", b"1")
            raise KeyError
    except KeyError:
        pass
    assert (tmp_path / "a.tar").stat().st_size == 1024

"""A pool whose shards or files are no longer what they were: refused by every command, and named by `winnow verify`."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.drawing import write_pool
from tests.field.helpers import index, pairs, winnow
from winnow.infra.stages.kept import KeptFile

SERIAL = ("--executor", "serial")


def write_shard(path, order):
    """A shard of plain images whose captions name their colours; equal bytes in all but the order of the samples."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, level in enumerate(order):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (level, 90, 40)).save(image, "BMP")
            for ext, data in (("bmp", image.getvalue()), ("txt", b"level %03d" % level)):
                info = tarfile.TarInfo(f"{key:04}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def true_pairs(found):
    return {
        text: Image.open(io.BytesIO(data)).getpixel((0, 0))[0] == int(text.split()[1]) for text, data in found.items()
    }


@pytest.fixture
def swapped(tmp_path):
    """A pool whose shard was written again with its samples in another order, at the same size."""
    levels = list(range(0, 240, 20))
    shard = write_shard(tmp_path / "shards" / "00000.tar", levels)
    index(tmp_path / "shards", tmp_path / "pool")
    before = shard.read_bytes()
    write_shard(shard, levels[::-1])
    assert len(shard.read_bytes()) == len(before)
    return tmp_path, before


@pytest.mark.parametrize("command", [("reshard",), ("measure", "--measures", "quality")])
def test_a_shard_rewritten_after_indexing_is_refused(swapped, command):
    folder, _ = swapped
    status, printed = winnow(*command, folder / "pool", "--out", folder / "out", *SERIAL)
    assert status == 1 and "shards/00000.tar: has changed since it was indexed" in printed
    assert not list((folder / "out").rglob("manifest.json"))


def test_a_training_refuses_it_too(swapped):
    from winnow.infra.errors import WinnowError
    from winnow.pretrain.data.samples import Samples

    folder, before = swapped
    samples = Samples(str(folder / "pool"))
    with pytest.raises(WinnowError, match="has changed since it was indexed"):
        samples.read(np.array([0, 1]))[0].image()
    (folder / "shards" / "00000.tar").write_bytes(before)
    assert samples.read(np.array([0, 1]))[0].image().size == (16, 16)


def test_a_pool_derived_from_it_refuses_it_too(swapped):
    from winnow.curation.noise.inject import InjectConfig, InjectStage
    from winnow.infra.errors import WinnowError
    from winnow.infra.pool.pool import Pool
    from winnow.infra.stages.executors import SerialExecutor
    from winnow.infra.stages.runner import execute

    folder, before = swapped
    shard = folder / "shards" / "00000.tar"
    now = shard.read_bytes()
    shard.write_bytes(before)
    execute(InjectStage(str(folder / "pool"), InjectConfig(mismatched=0.5), str(folder / "noisy")), SerialExecutor())
    (derived,) = Pool.open(str(folder / "noisy")).shards
    derived.image_bytes(derived.table())
    shard.write_bytes(now)
    with pytest.raises(WinnowError, match="has changed since it was indexed"):
        derived.image_bytes(derived.table())
    status, printed = winnow("verify", folder / "noisy")
    assert status == 1 and f"{shard}: is damaged" in printed


def test_the_same_content_with_another_time_is_accepted_and_indexing_again_mends(swapped):
    folder, before = swapped
    shard = folder / "shards" / "00000.tar"
    now = shard.read_bytes()
    shard.write_bytes(before)
    os.utime(shard, (1, 1))
    assert all(true_pairs(pairs(folder / "pool", folder / "first")).values())
    shard.write_bytes(now)
    index(folder / "shards", folder / "pool")
    found = true_pairs(pairs(folder / "pool", folder / "second"))
    assert len(found) == 12 and all(found.values())


def test_a_shard_rewritten_on_an_object_store_is_refused(swapped):
    folder, before = swapped
    fs, root = fsspec.filesystem("memory"), f"memory://{folder.name}"
    fs.pipe_file(f"{root}/shards/00000.tar", before)
    assert winnow("index", f"{root}/shards", "--out", f"{root}/pool", *SERIAL)[0] == 0
    assert winnow("reshard", f"{root}/pool", "--out", f"{root}/first", *SERIAL)[0] == 0
    fs.pipe_file(f"{root}/shards/00000.tar", (folder / "shards" / "00000.tar").read_bytes())
    status, printed = winnow("reshard", f"{root}/pool", "--out", f"{root}/second", *SERIAL)
    assert status == 1 and "has changed since it was indexed" in printed
    fs.pipe_file(f"{root}/first/00000.parquet", b"x" * fs.size(f"{root}/first/00000.parquet"))
    status, printed = winnow("verify", root)
    assert status == 1 and "2 damaged" in printed and "first/00000.parquet" in printed


def test_verify_names_every_damaged_file_and_nothing_else(tmp_path):
    shards = write_pool(tmp_path / "shards", 2, 3)
    index(shards, tmp_path / "run" / "pool", 0)
    assert winnow("reshard", tmp_path / "run" / "pool", "--out", tmp_path / "run" / "again", *SERIAL)[0] == 0
    resume = tmp_path / "run" / "resume" / "step-00000001"
    resume.mkdir(parents=True)
    (resume / "state.safetensors").write_bytes(b"state")
    (resume / "checkpoint.json").write_text(json.dumps({"files": {"state.safetensors": "0" * 64}}))
    status, printed = winnow("verify", tmp_path / "run")
    assert status == 1 and "state.safetensors" in printed and " 1 damaged" in printed
    shutil.rmtree(tmp_path / "run" / "resume")
    assert winnow("verify", tmp_path / "run")[0] == 0
    zeroed = tmp_path / "run" / "again" / "00000.tar"
    before, times = zeroed.read_bytes(), zeroed.stat()
    zeroed.write_bytes(before[:600] + bytes(len(before) - 600))
    os.utime(zeroed, ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "run" / "pool" / "00001.parquet").unlink()
    (tmp_path / "run" / "pool" / "units" / "00000.json").write_bytes(b"{")
    (tmp_path / "run" / "again" / "manifest.json").write_bytes(b"")
    status, printed = winnow("verify", tmp_path / "run")
    named = {line.partition(": ")[0] for line in printed.splitlines()[:-1]}
    files = ("pool/00001.parquet", "pool/units/00000.json", "again/00000.tar", "again/manifest.json")
    assert status == 1 and named == {str(tmp_path / "run" / file) for file in files}
    (tmp_path / "empty").mkdir()
    assert winnow("verify", tmp_path / "empty")[0] == winnow("verify", tmp_path / "nowhere")[0] == 2


def test_an_address_with_what_is_known_of_it_travels_to_other_processes(tmp_path):
    import pickle

    (tmp_path / "a").write_bytes(b"abc")
    file = KeptFile.read(str(tmp_path / "a"), "0" * 64, "0-0")
    assert vars(pickle.loads(pickle.dumps(file))) == vars(file) and not file.is_whole()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_manifest_that_is_cut_is_none_and_the_stage_goes_on_from_its_records(tmp_path, content):
    shards = write_pool(tmp_path / "shards", 2, 3)
    first = index(shards, tmp_path / "pool", 0)
    views = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("*.parquet")}
    (tmp_path / "pool" / "manifest.json").write_bytes(content)
    status, printed = winnow("reshard", tmp_path / "pool", "--out", tmp_path / "again", *SERIAL)
    assert status == 1 and "is not finished. Run again what makes it" in printed
    assert index(shards, tmp_path / "pool", 0) == first
    assert {path: path.stat().st_mtime_ns for path in views} == views


def test_a_manifest_of_another_program_is_not_overwritten(tmp_path):
    shards = write_pool(tmp_path / "shards", 1, 3)
    for number, content in enumerate(("{}", "[1]", "var x = {}")):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "manifest.json").write_text(content)
        status, printed = winnow("index", shards, "--out", out, *SERIAL)
        assert status == 1 and "is not a winnow manifest" in printed
        assert (out / "manifest.json").read_text() == content


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["shards", "one tar", "pool", "linked", "relative"])
def test_shards_are_not_resharded_over_themselves(tmp_path, monkeypatch, source):
    shards = write_pool(tmp_path / "shards", 2, 6)
    index(shards, tmp_path / "pool", 0)
    (tmp_path / "link").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    read = {"shards": shards, "one tar": shards / "00000.tar", "pool": tmp_path / "pool"}.get(source, "link")
    out = "shards/../shards" if source == "relative" else shards
    status, printed = winnow("reshard", read, "--out", out, *SERIAL)
    assert status == 2 and "reshard would overwrite what it reads" in printed
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["reshard", "index"])
def test_files_of_somebody_else_are_not_mixed_with_ours(tmp_path, command):
    shards, theirs = write_pool(tmp_path / "shards", 1, 5), write_pool(tmp_path / "theirs", 3, 2, first=50)
    before = tree(tmp_path)
    status, printed = winnow(command, shards, "--out", theirs, *SERIAL)
    assert status == 2 and f"{theirs}: holds 6 files that {command} did not write (00000.parquet)" in printed
    assert tree(tmp_path) == before


KILLED = """
import os, signal, sys
from winnow.curation import reshard
from winnow.pipeline import cli
run = reshard.ReshardStage.run
def dying(stage, unit):
    output = run(stage, unit)
    if unit.name == "00001":
        os.kill(os.getpid(), signal.SIGKILL)
    return output
reshard.ReshardStage.run = dying
cli.main()
"""


def test_a_killed_reshard_is_gone_on_with(tmp_path):
    write_pool(tmp_path / "shards", 1, 6)
    index(tmp_path / "shards", tmp_path / "pool")
    args = ("reshard", tmp_path / "pool", "--out", tmp_path / "out", "--samples-per-shard", 2, *SERIAL)
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, args)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "out" / "00001.tar").exists() and not (tmp_path / "out" / "units" / "00001.json").exists()
    status, printed = winnow(*args)
    assert status == 0 and "6 samples in 3 shards" in printed

"""Small files that ask for much memory or time: the index reads them within a limit that the system enforces."""

import ast
import io
import subprocess
import sys
import tarfile

from tests.drawing import sample, uid_of, write_pool
from tests.test_imports import ROOT

LARGE = 128 << 20
BOUNDED = """
import resource, sys, pyarrow; pyarrow.set_cpu_count(1)
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
manifest = execute(IndexStage((sys.argv[1],), sys.argv[2]), SerialExecutor(), budget=Budget(1000))
print(manifest.skipped["reasons"])
print(*(uid for shard in Pool.open(sys.argv[2]).shards for uid in shard.table()["uid"].to_pylist()))
"""


def indexed(folder):
    """Reasons and uids, as printed, of an index that has 128 MiB of memory more than it starts with."""
    args = [sys.executable, "-c", BOUNDED, folder / "shards", folder / "pool"]
    run = subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def add(tar, name, data, **header):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write(folder, number, *members):
    """A shard of members, (name, data) with fields of the header, and after them sample `number`."""
    (folder / "shards").mkdir(exist_ok=True)
    with tarfile.open(folder / "shards" / f"{number}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, header in members:
            add(tar, name, data, **header)
        for ext, data in sample(number)["members"].items():
            add(tar, f"z.{ext}", data)


def test_bombs_and_headers_that_lie_stay_within_memory(tmp_path):
    write_pool(tmp_path / "shards", 1, 2, first=50, parquet=False)
    image = sample(99)["members"]["jpg"]
    write(tmp_path, 1, ("a.jpg", image, {}), ("a.txt", bytes(LARGE), {}))
    write(tmp_path, 2, ("a.jpg", image, {}), ("a.txt", b"words", {}), ("a.json", b"[" * (5 << 20), {}))
    # A hole of 6 GB in a caption: 10 KB of tar.
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(6 << 30)
    (tmp_path / "b.jpg").write_bytes(image)
    args = ["tar", "--sparse", "-cf", tmp_path / "shards" / "3.tar", "-C", tmp_path, "b.jpg", "b.txt"]
    subprocess.run(list(map(str, args)), check=True)
    assert (tmp_path / "shards" / "3.tar").stat().st_size < 20 << 10
    for number, data in enumerate(
        [
            b"20 comment=" + b"x" * LARGE,  # kept as an attribute
            b"29 size=99999999999999999999\n",  # skipped for ever
            b"22 GNU.sparse.map=1,x\n",
            b"13 size=-999\n",
        ]
    ):
        write(tmp_path, 4 + number, ("pax", data, {"type": tarfile.XHDTYPE}))
    write(tmp_path, 8, *[("pax", b"12 comment=\n", {"type": tarfile.XHDTYPE})] * 3000)  # nested
    reasons, uids = indexed(tmp_path).splitlines()
    assert ast.literal_eval(reasons) == {
        ".json too large": 1,
        ".txt too large": 1,
        "sparse member": 1,
        "bad header": 4 * 2,  # shards, each as large as the other on average
        "truncated tar": 2,
    }
    assert uids.split() == [uid_of(i) for i in (50, 51, 1, 2)]

"""Sets that claim or stand for more than there is: refused in a sentence, within a limit of memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.drawing import draw_image, write_tar
from tests.evaluate.sets import npy, write_classification, write_packed_retrieval

MEMORY = 512 << 20  # that opening a set may take beyond what the imports have taken
# Opens the set of each folder named on the command line and reads its samples; prints how each ended.
CHILD = f"""
import resource, sys
from winnow.evaluate.sets.files import open_set
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.sets.shards import Wanted, read_part, read_target, split_into_parts
from winnow.evaluate.tasks.task import TaskError

used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + {MEMORY}, -1))
for data in sys.argv[1:]:
    (found,) = find_tasks(data)
    try:
        test_set = open_set(found.task, found.url)
        for part in split_into_parts(test_set.url, "test"):
            for sample in read_part(part, Wanted.by(test_set.kind, test_set.task)):
                if fault := read_target(test_set.kind, sample)[2]:
                    raise TaskError(fault)
        print("nothing")
    except TaskError as error:
        print("refused:", str(error).replace(chr(10), " "))
"""


def lying_npy(shape: str, kind: str = "<f8") -> bytes:
    """A .npy whose header claims a shape that its few bytes do not have."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64


def member(folder: Path, content: bytes) -> None:
    root = write_classification(folder, "wds_geode_test", n=2, shards=1, names=[f"thing {i}" for i in range(40)])
    members = {"jpg": draw_image((1, 2, 3), 0), "cls": b"0", "npy": content}
    write_tar(root / "test" / "0.tar", [{"key": "a", "members": members}])


def names(folder: Path, content: str) -> None:
    (write_classification(folder) / "classnames.txt").write_text(content)


def prompts(folder: Path) -> None:
    root = write_classification(folder)
    (root / "classnames.txt").write_text("\n".join(map(str, range(100_000))))
    (root / "zeroshot_classification_templates.txt").write_text("{c}\n" * 100_000)


def captions(folder: Path) -> None:
    root = write_classification(folder)
    (root / "dataset_type.txt").write_text("retrieval")
    write_tar(
        root / "test" / "0.tar", [{"key": "a", "members": {"jpg": draw_image((1, 2, 3), 0), "txt": b"a\n" * (1 << 24)}}]
    )


def associations(folder: Path) -> None:
    (write_classification(folder, "wds_misc-winogavil_test") / "associations.jsonl").write_text("[" * 200_000)


def mapping(folder: Path) -> None:
    root = write_classification(folder, "wds_objectnet_test", names=[str(i) for i in range(313)])
    (root / "objectnet_to_imagenet_1k.json").write_text("[" * 200_000)


def table(folder: Path, cell: str) -> None:
    root = folder / "wds_flickr30k_test"
    write_packed_retrieval(root)
    (root / "test_1k_flickr.csv").write_text(f'raw,split,filename\n"{cell}",test,1000.jpg\n')


def arrow(folder: Path) -> None:
    root = folder / "hf_cache" / "nlphuji___winogavil" / "a"
    root.mkdir(parents=True)
    batch = pa.record_batch({"cue": pa.nulls((1 << 31) - 1)})
    with pa.OSFile(str(root / "x-test.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


BOMBS = {
    "npy of 80 GB": (lambda folder: member(folder, lying_npy("(10000000000,)")), "the header says float64"),
    "npy of negative size": (lambda folder: member(folder, lying_npy("(-1,)")), "the header says float64"),
    "npy of many values": (lambda folder: member(folder, npy([0] * 10_000_000, "int8")), "10,000,000 values"),
    "npy of deep text": (lambda folder: member(folder, lying_npy("(" + "-" * 5000 + "1,)")), "cannot be read"),
    "large text": (lambda folder: names(folder, "a" * (17 << 20)), "larger than 16 MiB"),
    "many lines": (lambda folder: names(folder, "\n" * (4 << 20)), "more than 1,000,000 lines"),
    "many prompts": (prompts, "too many or too long prompts"),
    "large captions": (captions, "more than 1 MiB"),
    "deep associations": (associations, "should be an object with a cue"),
    "deep mapping": (mapping, "not valid JSON (nested too deeply)"),
    "deep list": (lambda folder: table(folder, "[" * 200_000), "is not a list of strings"),
    "large cell": (lambda folder: table(folder, "a" * (17 << 20)), "is not a table (field larger"),
    "rows without end": (arrow, "a batch of 2,147,483,647 rows"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, str]:
    """How each set ended, by name."""
    folder = tmp_path_factory.mktemp("bombs")
    urls = {}
    for number, (name, (write, _)) in enumerate(BOMBS.items()):
        urls[name] = folder / str(number)
        urls[name].mkdir()
        write(urls[name])
    environment = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path), "WINNOW_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", CHILD, *map(str, urls.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(urls, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_more_than_there_is(ends, name: str) -> None:
    assert ends[name].startswith("refused:") and BOMBS[name][1] in ends[name], ends[name]


def test_the_limit_is_one(tmp_path: Path) -> None:
    """The child's limit stops what these sets would take."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, -1)); bytearray({MEMORY})"
    assert "MemoryError" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_honest_arrays_are_read(tmp_path: Path) -> None:
    from winnow.infra.io.arrays import load_array

    for array in (np.arange(6).reshape(2, 3), np.float64(3), np.zeros((0, 4)), np.asfortranarray(np.ones((3, 2)))):
        path = tmp_path / "a.npy"
        np.save(path, array)
        read = load_array(path.read_bytes())
        assert read.dtype == array.dtype and np.array_equal(read, array)
    assert json.dumps(load_array(npy([1, 2])).tolist()) == "[1, 2]"

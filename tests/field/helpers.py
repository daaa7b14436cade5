"""Small inputs, and the command line as a user calls it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from tests.drawing import COLORS, draw_image, uid_of
from winnow.pipeline.cli import main

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
Members = list[tuple[str, bytes]]


def winnow(*args: Any) -> tuple[int, str]:
    """Run `winnow ARGS`; the exit status, and what was printed."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["winnow", *map(str, args)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as stop:
        return int(stop.code or 0), printed.getvalue()
    finally:
        sys.argv = before
    return 0, printed.getvalue()


def jpeg(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A small JPEG; other numbers give other images."""
    return draw_image(list(COLORS.values())[number % len(COLORS)], number, size)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # a save leaves settings on the image
    return file.getvalue()


def sample(key: str, number: int, text: str | bytes | None = None, ext: str = "jpg") -> Members:
    """The members of a sample whose caption names its number."""
    caption = f"number {number}" if text is None else text
    data = caption if isinstance(caption, bytes) else caption.encode()
    return [(f"{key}.{ext}", jpeg(number)), (f"{key}.txt", data)]


def truth(*numbers: int) -> dict[str, bytes]:
    """The pairs that `sample` makes of these numbers."""
    return {f"number {number}": jpeg(number) for number in numbers}


def write_tar(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index(shards: Any, out: Any, budget: float = 1000) -> dict[str, Any]:
    """`winnow index`; the manifest. By default any number of samples may be skipped."""
    status, printed = winnow("index", shards, "--out", out, "--executor", "serial", "--max-skipped", budget)
    assert status == 0, printed
    manifest: dict[str, Any] = json.loads((Path(out) / "manifest.json").read_text())
    return manifest


def read_shards(folder: Path) -> list[dict[str, bytes]]:
    """The samples of a folder of tars, read by Python's tarfile; members by extension."""
    samples = []
    for path in sorted(folder.glob("*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, ext = info.name.partition(".")
                handle = tar.extractfile(info)
                assert handle is not None
                found.setdefault(key, {})[ext] = handle.read()
        samples += found.values()
    return samples


def pairs(pool: Path, out: Path) -> dict[str, bytes]:
    """What a pool holds, by `winnow reshard`: images by caption."""
    status, printed = winnow("reshard", pool, "--out", out, "--executor", "serial")
    assert status == 0, printed
    samples = read_shards(out)
    found = {item["txt"].decode(): next(item[ext] for ext in IMAGES if ext in item) for item in samples}
    assert len(found) == len(samples)
    return found


def pairs_of(folder: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> tuple[dict[str, bytes], int]:
    """The pairs that Winnow makes of one tar, and how many samples it reports as skipped."""
    write_tar(folder / "shards" / "00000.tar", members, kind)
    manifest = index(folder / "shards", folder / "pool")
    return pairs(folder / "pool", folder / "again") if manifest["items"] else {}, manifest["skipped"]["count"]


def measure(pool: Path, out: Path, names: str, *more: Any) -> dict[str, dict[str, Any]]:
    """`winnow measure`; the measured values by the samples' captions."""
    args = ("--measures", names, "--executor", "serial", "--max-skipped", 1000)
    status, printed = winnow("measure", pool, "--out", out, *args, *more)
    assert status == 0, printed
    values: dict[str, dict[str, Any]] = {}
    for view in sorted(pool.glob("*.parquet")):
        texts = pq.read_table(view, columns=["text"])["text"].to_pylist()
        for file in sorted((out / "columns").glob(f"*/{view.name}")):
            for text, row in zip(texts, pq.read_table(file).to_pylist(), strict=True):
                values.setdefault(text, {}).update(row)
    return values


def curate(pool: Path, tree: Any, out: Path) -> tuple[int, str, np.ndarray | None]:
    """`winnow curate`; the exit status, what was printed, and the subset."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "filters.yaml").write_text(yaml.safe_dump(tree))
    args = ("--filters", out / "filters.yaml", "--out", out / "subset", "--executor", "serial")
    status, printed = winnow("curate", pool, *args)
    path = out / "subset" / "subset.npy"
    return status, printed, np.load(path) if status == 0 else None


def write_metadata(folder: Path, name: str, scores: list[float], first: int = 0) -> pa.Table:
    """A parquet as DataComp's metadata has it, with CLIP features of 8 dimensions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(scores)
    columns = {
        "uid": pa.array([uid_of(first + i) for i in range(n)], pa.string()),
        "text": pa.array([f"a photo of a brown dog, number {first + i}" for i in range(n)], pa.string()),
        "original_width": pa.array([300] * n, pa.int64()),
        "original_height": pa.array([300] * n, pa.int64()),
        "clip_l14_similarity_score": pa.array(scores, pa.float32()),
    }
    table = pa.table(columns)
    pq.write_table(table, folder / f"{name}.parquet")
    vectors = np.random.default_rng(first).normal(size=(n, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.savez(folder / f"{name}.npz", l14_img=vectors, l14_txt=vectors)
    return table

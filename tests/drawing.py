"""Tiny pools for tests: images of one colour each, in tars and parquets of DataComp's layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLORS = {
    "red": (210, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 210),
    "yellow": (230, 210, 50),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}


def draw_image(color: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 20), ext: str = "jpg") -> bytes:
    """An image of one colour with some noise in it, encoded."""
    noise = np.random.default_rng(seed).integers(-12, 13, (size[1], size[0], 3))
    image = Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ext])
    return file.getvalue()


def uid_of(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % (1 << 64):016x}{number:016x}"


def sample(number: int, ext: str = "jpg") -> dict:
    """Sample `number` of the test world: members by extension, and its parquet row."""
    names = list(COLORS)
    name = names[number % len(names)]
    text = f"a plain {name} square, number {number}"
    uid = uid_of(number)
    row = {"uid": uid, "key": f"{number:09d}", "text": text, "original_width": 240 + number, "original_height": 240}
    return {
        "key": row["key"],
        "members": {
            ext: draw_image(COLORS[name], number, ext=ext),
            "txt": text.encode(),
            "json": json.dumps({"uid": uid, "url": f"https://example.com/{number}.jpg"}).encode(),
        },
        "row": row,
    }


def write_tar(path: Path, samples: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for item in samples:
            for ext, data in item["members"].items():
                info = tarfile.TarInfo(f"{item['key']}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, samples: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist([item["row"] for item in samples]), path)


def write_pool(folder: Path, shards: int = 2, per_shard: int = 6, parquet: bool = True, first: int = 0) -> Path:
    """A pool of `shards` shards; samples are numbered through."""
    for shard in range(shards):
        samples = [sample(first + shard * per_shard + i) for i in range(per_shard)]
        write_tar(folder / f"{shard:05d}.tar", samples)
        if parquet:
            write_parquet(folder / f"{shard:05d}.parquet", samples)
    return folder

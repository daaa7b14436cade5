"""The demo stage: a pool, trusted pairs, a target and evaluation sets, drawn by code in the layouts of real ones.

Shards have img2dataset's and DataComp's layout (`NAME.tar` of `KEY.jpg`, `KEY.txt`, `KEY.json`, with `NAME.parquet`),
evaluation sets DataComp's (`wds_NAME_test/`). No sample is in two sets: the generator of each image is seeded by its
set and number.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from winnow.infra.io import storage
from winnow.infra.io.storage import digest_bytes
from winnow.infra.io.tar import TarWriter
from winnow.infra.params import Section
from winnow.infra.pool.uids import derived_uid
from winnow.infra.pool.writer import SampleWriter
from winnow.infra.stages.stage import Output, Record, Stage, Unit
from winnow.pipeline.demo import draw, words

_TEXTS, _SIZES = ("uid", "key", "url", "text"), ("width", "height", "original_width", "original_height")
_SCHEMA = pa.schema([*((n, pa.string()) for n in _TEXTS), *((n, pa.int32()) for n in _SIZES), ("sha256", pa.string())])


class DemoConfig(Section):
    """What to draw.

    Attributes:
        pool, trusted, target: samples of each set.
        test, train: images of each split of each classification set; the retrieval set has `test` alone.
        off_topic: fraction of charts, pages and tables in the pool and the trusted set. No evaluation set has them.
        min_side, max_side: bounds of width and height in pixels, which are drawn independently.
        shard_size: samples a shard.
        seed: of everything.
    """

    pool: int = Field(12_000, ge=1)
    trusted: int = Field(4_000, ge=1)
    target: int = Field(500, ge=1)
    test: int = Field(1_000, ge=1)
    train: int = Field(1_000, ge=1)
    off_topic: float = Field(0.25, ge=0, le=1)
    min_side: int = Field(48, ge=16)
    max_side: int = Field(96, le=draw.MAX_SIDE)
    shard_size: int = Field(1_000, ge=1, le=10_000)
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> DemoConfig:
        if self.min_side > self.max_side:
            raise ValueError("min_side is above max_side")
        return self


@dataclass(frozen=True)
class Classes:
    """A classification set: the property of the view that is asked for, its class names and prompts."""

    field: str
    names: dict[str, str]
    templates: tuple[str, ...]


CLASSIFICATION: dict[str, Classes] = {
    "demo-shape": Classes(
        "kind",
        {kind: names[0] for kind, names in words.KIND_WORDS.items()},
        ("a picture of a {c}.", "a drawing of a {c}.", "an illustration of a {c}.", "a {c}."),
    ),
    "demo-color": Classes(
        "colour",
        {colour: names[0] for colour, names in words.COLOUR_WORDS.items()},
        ("a {c} thing.", "a picture of a {c} shape.", "a drawing of a {c} thing."),
    ),
    "demo-scene": Classes(
        "scene", words.SCENE_NAMES, ("a thing on {c}.", "a picture of a shape on {c}.", "a drawing in front of {c}.")
    ),
}
RETRIEVAL = "demo-retrieval"
_CAPTIONS = 3


@dataclass
class DemoStage(Stage):
    """Draw the demo's data into `out`: `pool/`, `trusted/`, `target/` and `eval/wds_<task>_test/`.

    A unit is one shard, or one split of an evaluation set.
    """

    config: DemoConfig
    out: str

    name = "demo"
    version = 1

    def params(self) -> dict[str, Any]:
        # The numbers of samples are in the units, so that a larger pool keeps existing shards.
        return self.config.model_dump(include={"off_topic", "min_side", "max_side", "seed"})

    def plan(self) -> list[Unit]:
        units = []
        for part in ("pool", "trusted", "target"):
            total, size = getattr(self.config, part), self.config.shard_size
            for number, start in enumerate(range(0, total, size)):
                count = min(size, total - start)
                params = {"set": part, "shard": number, "start": start, "count": count}
                units.append(Unit(f"{part}/{number:05d}", {}, params, items=count))
        for task in (*CLASSIFICATION, RETRIEVAL):
            for split in ("test", "train") if task in CLASSIFICATION else ("test",):
                count = getattr(self.config, split)
                params = {"task": task, "split": split, "count": count}
                units.append(Unit(f"eval/{task}-{split}", {}, params, items=count))
        return units

    def run(self, unit: Unit) -> Output:
        if "set" in unit.params:
            return self._shard(**unit.params)
        if unit.params["task"] == RETRIEVAL:
            return self._retrieval(**unit.params)
        return self._classification(**unit.params)

    def finish(self, records: list[Record]) -> Output:
        counts: Counter[str] = Counter()
        for record in records:
            counts[record.unit if record.unit.startswith("eval/") else record.unit.partition("/")[0]] += record.items
        return Output(values={"samples": dict(counts)})

    def _shard(self, set: str, shard: int, start: int, count: int) -> Output:
        rows, base = [], f"{set}/{shard:05d}"
        with storage.writing(self.url(f"{base}.tar")) as path, TarWriter(path) as file:
            tar = SampleWriter(file)
            for i in range(count):
                row, image = self._sample(set, start + i, key=f"{shard:05d}{i:04d}")
                facts = {"caption" if name == "text" else name: value for name, value in row.items()}
                text, facts_json = row["text"].encode(), json.dumps(facts, sort_keys=True).encode()
                tar.add(row["key"], {"jpg": image, "txt": text, "json": facts_json})
                rows.append(row)
        with storage.writing(self.url(f"{base}.parquet")) as path:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)
        return Output([f"{base}.tar", f"{base}.parquet"], count)

    def _sample(self, part: str, number: int, key: str) -> tuple[dict[str, Any], bytes]:
        """A row and its encoded image. The target has what the evaluation sets show: one object, no charts or pages."""
        rng = self._rng(part, number)
        width, height = self._size(rng)
        if part != "target" and rng.random() < self.config.off_topic:
            paper = rng.choice(draw.PAPERS)
            image, text = draw.paint_paper(rng, paper, width, height), words.describe_paper(rng, paper)
        else:
            view = draw.random_view(rng, two=0.0 if part == "target" else 0.2)
            image, text = draw.paint(rng, view, width, height), words.describe(rng, view)
        data = _jpeg(rng, image)
        # The stored image represents a larger one that was scaled down, as in DataComp's shards.
        scale = rng.uniform(210, 900) / min(width, height)
        row = {
            "uid": derived_uid("demo", str(self.config.seed), part, str(number)),
            "key": key,
            "url": f"demo:{part}/{number}",
            "text": text,
            "width": width,
            "height": height,
            "original_width": round(width * scale),
            "original_height": round(height * scale),
            "sha256": digest_bytes(data),
        }
        return row, data

    def _classification(self, task: str, split: str, count: int) -> Output:
        classes = CLASSIFICATION[task]
        keys = tuple(classes.names)

        def members(rng: Random, number: int) -> dict[str, bytes]:
            label = number % len(keys)
            view = draw.random_view(rng, two=0.0, **{classes.field: keys[label]})
            return {"jpg": self._image(rng, view), "cls": str(label).encode()}

        files = self._split(task, split, count, members)
        if split == "test":
            files += self._text(task, "classnames.txt", classes.names.values())
            files += self._text(task, "zeroshot_classification_templates.txt", classes.templates)
        return Output(files, count)

    def _retrieval(self, task: str, split: str, count: int) -> Output:
        def members(rng: Random, number: int) -> dict[str, bytes]:
            view = draw.random_view(rng)
            image = self._image(rng, view)
            return {"jpg": image, "txt": "\n".join(words.describe(rng, view) for _ in range(_CAPTIONS)).encode()}

        files = self._split(task, split, count, members)
        return Output(files + self._text(task, "dataset_type.txt", ["retrieval"]), count)

    def _split(
        self, task: str, split: str, count: int, members: Callable[[Random, int], dict[str, bytes]]
    ) -> list[str]:
        base = f"eval/wds_{task}_test/{split}"
        with storage.writing(self.url(f"{base}/0.tar")) as path, TarWriter(path) as file:
            tar = SampleWriter(file)
            for number in range(count):
                tar.add(f"s{number:07d}", members(self._rng(task, split, number), number))
        storage.write_bytes(self.url(f"{base}/nshards.txt"), b"1")
        return [f"{base}/0.tar", f"{base}/nshards.txt"]

    def _text(self, task: str, name: str, lines: Any) -> list[str]:
        path = f"eval/wds_{task}_test/{name}"
        storage.write_bytes(self.url(path), "".join(f"{line}\n" for line in lines).encode())
        return [path]

    def _rng(self, *parts: object) -> Random:
        return Random("/".join(str(part) for part in ("demo", self.config.seed, *parts)))

    def _size(self, rng: Random) -> tuple[int, int]:
        bounds = self.config.min_side, self.config.max_side
        return rng.randint(*bounds), rng.randint(*bounds)

    def _image(self, rng: Random, view: draw.View) -> bytes:
        return _jpeg(rng, draw.paint(rng, view, *self._size(rng)))


def _jpeg(rng: Random, image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(78, 92))
    return buffer.getvalue()

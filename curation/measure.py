"""The measure stage: columns for every shard, each picture decoded once for all measures that want it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.measures.base import Measure, Samples
from infra import storage
from infra.pictures import PictureError, decode_picture
from infra.pool import Pool, Shard
from infra.stage import Output, Record, SetAside, Stage, Unit
from infra.storage import digest_json

BATCH = 256
_LOCATION = ("tar", "image_offset", "image_size")


@dataclass
class MeasureStage(Stage):
    """Compute measures over an indexed pool.

    Each (measure, shard) is a unit with a file of its own, `MEASURE-ID/SHARD.parquet`, rows as in the shard's view;
    the units of a shard form a group, so what is missing of it is computed from one reading of its pictures.

    Args:
        pool: URL of the pool directory.
        measures: which.
        out: directory of the columns.
        threads: decoding threads in each worker.
    """

    pool: str
    measures: tuple[Measure, ...]
    out: str
    threads: int = 1

    name = "measure"
    version = 1
    keep_orphans = True

    @property
    def cpus(self) -> float:
        return self.threads

    @property
    def gpus(self) -> float:
        return max((measure.gpus for measure in self.measures), key=abs, default=0)

    def params(self) -> dict[str, Any]:
        return {}

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.pool).digest}

    def places(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.pool)}

    def plan(self) -> list[Unit]:
        return [
            Unit(
                f"{measure.id}/{shard.name}",
                {"shard": shard.digest},
                {"measure": measure.name, "version": measure.version, "params": measure.params()},
                {"shard": shard.name, "measure": measure.id},
                group=shard.name,
                items=shard.rows,
            )
            for shard in Pool.open(self.pool).shards
            for measure in self.measures
        ]

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        by_id = {measure.id: measure for measure in self.measures}
        wanted = {unit.args["measure"]: unit for unit in units}
        measures = [by_id[name] for name in wanted]
        shard = Pool.open(self.pool).shard(units[0].args["shard"])
        aside: list[SetAside] = []
        with contextlib.ExitStack() as files:
            writers = {}
            for measure in measures:
                path = files.enter_context(storage.writing(self.url(measure.id, f"{shard.name}.parquet")))
                writers[measure.id] = files.enter_context(
                    pq.ParquetWriter(path, measure.schema(), compression="zstd", compression_level=1)
                )
            for samples in read_samples(shard, measures, self.threads, aside):
                for measure in measures:
                    writers[measure.id].write_table(measure.compute(samples))
        for measure in measures:
            unit = wanted[measure.id]
            left_out = aside if measure.pixels else []
            yield unit, Output([f"{unit.name}.parquet"], shard.rows - len(left_out), left_out)

    def finish(self, records: list[Record]) -> Output:
        digests: dict[str, dict[str, str]] = {}
        for record in records:
            measure_id, _, shard = record.unit.partition("/")
            digests.setdefault(measure_id, {})[shard] = record.files[f"{record.unit}.parquet"]["sha256"]
        columns = {measure.name: measure.id for measure in self.measures}
        return Output(values={"columns": columns, "digests": {k: digest_json(v) for k, v in sorted(digests.items())}})


def read_samples(shard: Shard, measures: list[Measure], threads: int, aside: list[SetAside]) -> Iterator[Samples]:
    """A shard's samples in order, in batches; pictures are read and decoded ahead of the one who computes."""
    pixels = any(measure.pixels for measure in measures)
    columns = ["uid", *dict.fromkeys(name for measure in measures for name in measure.reads)]
    table = shard.table([*columns, *_LOCATION] if pixels else columns)
    slices = [table.slice(start, BATCH) for start in range(0, table.num_rows, BATCH)]
    if not pixels:
        for part in slices:
            yield Samples(part, [])
        return

    def load(part: pa.Table) -> tuple[list[Any], list[SetAside]]:
        images: list[Any] = []
        bad: list[SetAside] = []
        for uid, data in zip(part["uid"].to_pylist(), shard.image_bytes(part), strict=True):
            try:
                images.append(decode_picture(data))
            except PictureError as error:
                images.append(None)
                bad.append(SetAside(uid, error.what))
        return images, bad

    with ThreadPoolExecutor(threads) as workers:
        ahead = [workers.submit(load, part) for part in slices[: threads + 1]]
        for number, part in enumerate(slices):
            images, bad = ahead[number].result()
            ahead[number] = None  # type: ignore[call-overload]
            if number + threads + 1 < len(slices):
                ahead.append(workers.submit(load, slices[number + threads + 1]))
            aside.extend(bad)
            yield Samples(part, images)

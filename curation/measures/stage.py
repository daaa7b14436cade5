"""The measure stage: columns for every shard, with each image decoded once for all measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.curation.columns.table import View
from winnow.curation.measures.base import Measure, Samples
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.io.prefetch import prefetch
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.pool import LOCATION, Pool, Shard, read_members
from winnow.infra.stages.counts import mean_samples
from winnow.infra.stages.resources import Resources
from winnow.infra.stages.stage import Output, Record, Skipped, Stage, Unit, read_manifest

BATCH = 256
_LOCATION = ("tar", "image_offset", "image_size")


@dataclass
class MeasureStage(Stage):
    """Compute measures over an indexed pool.

    Each (measure, shard) is a unit with one file, `MEASURE-ID/SHARD.parquet`, whose rows are those of the shard's view.
    The units of a shard form a group, so its images are read once for everything that is missing. Measures that read
    columns of other measures run after those and read their files; what they read is part of their id.

    Args:
        pool: URL of the pool directory.
        measures: to compute, in any order, with the measures whose columns they read.
        out: directory of the columns.
        threads: decoding threads in each worker.
        others: id and digest of columns that were measured there before, by name; see `with_existing`.
    """

    pool: str
    measures: tuple[Measure, ...]
    out: str
    threads: int = 1
    others: dict[str, tuple[str, str]] = field(default_factory=dict)

    name = "measure"
    version = 1
    keep_stale = True

    @property
    def allow_failures(self) -> bool:  # type: ignore[override]
        """Files of a folder of metadata are lost within the budget; a pool with an index has no such files."""
        return not Pool.open(self.pool).images

    @property
    def resources(self) -> Resources:
        wanted = max((measure.resources for measure in self.measures), key=lambda item: item.gpus, default=Resources())
        return replace(wanted, cpus=self.threads)

    def setup(self) -> None:
        for measure in self.measures:
            measure.setup()

    def setup_key(self) -> Any:
        return self.ids()

    def params(self) -> dict[str, Any]:
        return {}

    def parents(self) -> dict[str, str]:
        others = {f"columns/{name}": digest for name, (_, digest) in self.others.items()}
        return {"pool": Pool.open(self.pool).digest} | others

    def locations(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.pool)}

    def with_existing(self) -> MeasureStage:
        """The same stage, whose manifest also lists the columns that were measured there on this pool before."""
        before = read_manifest(self.out)
        if before is None or before.stage != self.name or before.parents.get("pool") != Pool.open(self.pool).digest:
            return self
        ids, digests = before.values["columns"], before.values["digests"]
        names = {measure.name for measure in self.measures}
        others = {name: (ids[name], digests[ids[name]]) for name in ids if name not in names}
        return replace(self, others=others)

    def ordered(self) -> list[Measure]:
        """The measures, each after those it reads. Raises UsageError when one of those is missing."""
        left = {measure.name: measure for measure in self.measures}
        done: dict[str, Measure] = {}
        while left:
            ready = {name: measure for name, measure in left.items() if done.keys() >= set(measure.upstream())}
            if not ready:
                read = [name for measure in left.values() for name in measure.upstream()]
                lacking = [name for name in read if name not in left and name not in done]
                what = f'"{lacking[0]}", which is not measured' if lacking else "a measure that reads it"
                raise UsageError(f'measure "{next(iter(left))}" reads {what}', do="Measure both.")
            done |= ready
            left = {name: measure for name, measure in left.items() if name not in ready}
        return list(done.values())

    def ids(self) -> dict[str, str]:
        """The directory of each measure's columns, by name. It depends on the measure and on what it reads."""
        ids: dict[str, str] = {}
        for measure in self.ordered():
            ids[measure.name] = measure.id
            if measure.derived():
                read = [measure.id, *(ids[name] for name in measure.upstream())]
                ids[measure.name] = f"{measure.name}-{digest_json(read)[:8]}"
        return ids

    def plan(self) -> list[Unit]:
        ids = self.ids()
        return [
            Unit(
                f"{ids[measure.name]}/{shard.name}",
                {"shard": shard.digest},
                {"measure": type(measure).name, "version": measure.version, "params": measure.params()}
                | ({"reads": [ids[name] for name in measure.upstream()]} if measure.derived() else {}),
                {"shard": shard.name, "measure": measure.name},
                group=shard.name,
                items=_rows(shard),
            )
            for shard in Pool.open(self.pool).shards
            for measure in self.ordered()
        ]

    def expected(self, unit: Unit, whole: Sequence[Record]) -> int:
        return unit.items or mean_samples(whole)

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        ids = self.ids()
        wanted = {unit.runtime["measure"]: unit for unit in units}
        measures = [measure for measure in self.ordered() if measure.name in wanted]
        shard = Pool.open(self.pool).shard(units[0].runtime["shard"])
        direct = [measure for measure in measures if not measure.derived()]
        for together in filter(None, [direct, *([measure] for measure in measures if measure.derived())]):
            skipped: list[Skipped] = []
            with contextlib.ExitStack() as files:
                writers = []
                for measure in together:
                    path = files.enter_context(storage.writing(self.url(ids[measure.name], f"{shard.name}.parquet")))
                    writer = pq.ParquetWriter(path, measure.schema(), compression="zstd", compression_level=1)
                    writers.append(files.enter_context(writer))
                for samples in self._samples(shard, together, ids, skipped):
                    for measure, writer in zip(together, writers, strict=True):
                        writer.write_table(measure.compute(samples))
            for measure in together:
                left_out = skipped if measure.pixels else []
                unit = wanted[measure.name]
                yield unit, Output([f"{unit.name}.parquet"], shard.rows - len(left_out), left_out)

    def _samples(
        self, shard: Shard, measures: list[Measure], ids: dict[str, str], skipped: list[Skipped]
    ) -> Iterator[Samples]:
        if not any(measure.derived() for measure in measures):
            yield from read_samples(shard, measures, self.threads, skipped)
            return
        (measure,) = measures
        table = View(Pool.open(self.pool), self.out).table(shard, ("uid", *measure.reads, *measure.derived()), ids)
        yield from map(Samples, _slices(table))

    def finish(self, records: list[Record]) -> Output:
        digests: dict[str, dict[str, str]] = {}
        for record in records:
            measure_id, _, shard = record.unit.partition("/")
            digests.setdefault(measure_id, {})[shard] = record.files[f"{record.unit}.parquet"]["sha256"]
        by_id = {name: digest_json(shards) for name, shards in sorted(digests.items())}
        columns = self.ids() | {name: measured for name, (measured, _) in self.others.items()}
        by_id |= dict(self.others.values())
        return Output(values={"columns": columns, "digests": dict(sorted(by_id.items()))})


def _rows(shard: Shard) -> int:
    """Samples of a shard; 0 where its parquet cannot be read, as running the unit reports."""
    try:
        return shard.rows
    except WinnowError:
        return 0


def _slices(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, BATCH) for start in range(0, table.num_rows, BATCH)]


def read_samples(shard: Shard, measures: list[Measure], threads: int, skipped: list[Skipped]) -> Iterator[Samples]:
    """The samples of a shard in order, in batches; images are read and decoded ahead by threads."""
    pixels = any(measure.pixels for measure in measures)
    encoded = any(measure.encoded for measure in measures)
    members = any(measure.members for measure in measures)
    columns = ["uid", *(name for measure in measures for name in measure.reads)]
    columns += LOCATION.names if members else _LOCATION if pixels or encoded else []
    read = partial(read_members, shard.tars) if members else None
    table = shard.table(list(dict.fromkeys(columns)))
    slices = _slices(table)
    if not (pixels or encoded):
        yield from (Samples(part, read=read) for part in slices)
        return

    def load(part: pa.Table) -> tuple[list[Any], list[bytes], list[Skipped]]:
        images: list[Any] = []
        bad: list[Skipped] = []
        files = shard.image_bytes(part)
        for uid, data in zip(part["uid"].to_pylist(), files if pixels else [], strict=pixels):
            try:
                images.append(decode_image(data))
            except ImageError as error:
                images.append(None)
                bad.append(Skipped(uid, error.what))
        return images, files if encoded else [], bad

    for part, (images, files, bad) in zip(slices, prefetch(load, slices, threads, threads + 1), strict=True):
        skipped.extend(bad)
        yield Samples(part, images, files, read)

"""The reshard stage: the samples of a subset, copied into webdataset tars, each with a parquet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow_json import check_json, json_bytes, json_object, json_rows
from winnow.infra.io.images import EXTENSIONS, image_extension
from winnow.infra.io.prefetch import prefetch
from winnow.infra.io.schemas import common_schema, concat_columns
from winnow.infra.pool.pool import SAMPLE, Pool, Shard
from winnow.infra.pool.sample import Sample
from winnow.infra.pool.uids import distinct_uids, load_subset, times_listed
from winnow.infra.pool.views import LOCATION, located
from winnow.infra.pool.writer import PoolWriter, SampleWriter, shard_entries
from winnow.infra.stages.stage import Output, Record, Stage, Unit

SIZES = "sizes.json"  # of samples by tar, as open_clip and DataComp's resharder read them
_TOGETHER = (*EXTENSIONS, "json")


@dataclass
class ReshardStage(Stage):
    """Write a subset of a pool as new shards, in pool order. Images and other members are copied byte for byte.

    `NNNNN.tar` holds `KEY.EXT`, `KEY.txt`, `KEY.json` and any other member (webdataset; img2dataset's keys: shard and
    row, nine digits), `NNNNN.parquet` the pool's columns and the byte range of each member. The json has the fields it
    had, and the pool's columns in place of fields of their names; see `winnow.infra.io.arrow_json`. The directory is a
    pool: `Pool.open` reads it, and so does any reader of DataComp's shards.

    A uid that the subset lists k times is written k times in a row, each time with a key of its own, as DataComp's
    resharder does. `NNNNN_stats.json` has the number of samples as `successes` (img2dataset, DataComp's resharder), and
    `sizes.json` that of each tar (open_clip, DataComp).

    Args:
        pool: URL of the pool directory.
        subset: URL of the subset's .npy; None for the whole pool.
        subset_digest: sha256 of that file.
        out: directory.
        samples_per_shard: of every shard but the last.
    """

    pool: str
    subset: str | None
    subset_digest: str
    out: str
    samples_per_shard: int = 10_000

    name = "reshard"
    version = 3  # 3: repeats, the fields of the source's json, sizes.json and NNNNN_stats.json
    alone = (".tar", ".parquet")

    def params(self) -> dict[str, Any]:
        return {"samples_per_shard": self.samples_per_shard}

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.pool).digest, "subset": self.subset_digest}

    def locations(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.pool)}

    def plan(self) -> list[Unit]:
        pool = Pool.open(self.pool)
        if not pool.images:
            raise UsageError("is a pool of metadata, without images to copy", where=self.pool)
        _check_columns(pool)
        counts = self._counts(pool)
        total, digests = sum(counts), {shard.name: shard.digest for shard in pool.shards}
        if total == 0:
            raise WinnowError("the subset is empty", where=self.subset or self.pool, do="Loosen its filters.")
        starts = np.concatenate([[0], np.cumsum(counts)])
        units = []
        for number, low in enumerate(range(0, total, self.samples_per_shard)):
            high = min(low + self.samples_per_shard, total)
            # Which of each source shard's kept rows, counted among the kept, fall into this output shard.
            parts = [
                [shard.name, int(max(low - start, 0)), int(min(high - start, count))]
                for shard, start, count in zip(pool.shards, starts[:-1], counts, strict=True)
                if start < high and start + count > low
            ]
            inputs = {str(name): digests[str(name)] for name, _, _ in parts} | {"subset": self.subset_digest}
            units.append(Unit(f"{number:05d}", inputs, {"parts": parts}, items=high - low))
        return units

    def _counts(self, pool: Pool) -> list[int]:
        """How many samples of each shard are written. Raises WinnowError when the pool lacks one of the subset's."""
        if self.subset is None:
            return [shard.rows for shard in pool.shards]
        distinct, counts = distinct_uids(load_subset(self.subset))
        absent, found = np.ones(len(distinct), dtype=bool), []
        for shard in pool.shards:
            at, times = times_listed(shard.uids(), distinct, counts)
            absent[at[times > 0]] = False
            found.append(int(times.sum()))
        if n := int(np.count_nonzero(absent)):
            raise WinnowError(f"{n} of the subset's {len(distinct)} uids are not in the pool", where=self.subset)
        return found

    def run(self, unit: Unit) -> Output:
        pool = Pool.open(self.pool)
        subset = None if self.subset is None else distinct_uids(load_subset(self.subset))
        sources, tables = [], []
        for name, low, high in unit.params["parts"]:
            shard = pool.shard(name)
            table = shard.table().take(pa.array(_rows(shard, subset)[low:high]))
            sources.append((shard, table.select([*SAMPLE])))
            tables.append(table.drop_columns(LOCATION.names))
        columns = concat_columns(tables, [shard.view for shard, _ in sources])
        keys = pa.array([f"{unit.name}{i:04d}" for i in range(columns.num_rows)], pa.string())
        columns = columns.set_column(columns.column_names.index("key"), "key", keys)
        writer = PoolWriter(self.out, unit.name)
        with writer.tar() as tar:
            samples = (sample for shard, table in sources for sample in shard.samples(table, together=_TOGETHER))
            view = _copy(samples, columns, tar)
        output = writer.view(view)
        stats = f"{unit.name}_stats.json"
        storage.write_json(self.url(stats), {"count": view.num_rows, "successes": view.num_rows})
        output.files.append(stats)
        return output

    def finish(self, records: list[Record]) -> Output:
        storage.write_json(self.url(SIZES), {f"{record.unit}.tar": record.values["rows"] for record in records})
        return Output([SIZES], values={"shards": shard_entries(records)})


def _rows(shard: Shard, subset: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Rows of a shard that the subset (its distinct uids and their counts) has, each as often as it has it; int64."""
    rows = np.arange(shard.rows)
    return rows if subset is None else np.repeat(rows, times_listed(shard.uids(), *subset)[1])


def _check_columns(pool: Pool) -> None:
    """Raises WinnowError when JSON cannot hold a column, or the types of a column do not go together."""
    schemas: list[pa.Schema] = []
    views: list[str] = []
    for shard, schema in zip(pool.shards, prefetch(lambda shard: shard.schema(), pool.shards), strict=True):
        if not any(schema.equals(other) for other in schemas[-1:]):
            check_json(schema, shard.view)
            schemas.append(schema)
            views.append(shard.view)
    common_schema(schemas, views)


def _copy(samples: Iterable[Sample], columns: pa.Table, tar: SampleWriter) -> pa.Table:
    """Append samples to a tar, with the given columns; returns their view."""
    located_rows = []
    for sample, key, text, facts in zip(
        samples, columns["key"].to_pylist(), columns["text"].to_pylist(), json_rows(columns), strict=True
    ):
        image = image_extension(sample.members)
        members = {image: sample.members[image]} if image else {}
        if text is not None:
            members["txt"] = text.encode()
        members["json"] = json_bytes(json_object(sample.members.get("json", b"")) | facts)
        # Any other member is copied as it is.
        members |= {ext: data for ext, data in sample.members.items() if ext not in (image, "txt", "json")}
        located_rows.append(tar.add(key, members))
    return located(columns, located_rows)

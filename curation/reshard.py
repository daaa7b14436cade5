"""The reshard stage: the samples of a subset, copied into webdataset tars, each with a parquet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import image_extension
from winnow.infra.pool.pool import Pool, Shard
from winnow.infra.pool.uids import is_member, load_subset
from winnow.infra.pool.views import LOCATION, located
from winnow.infra.pool.writer import PoolWriter, SampleWriter, shard_entries
from winnow.infra.stages.stage import Output, Record, Stage, Unit


@dataclass
class ReshardStage(Stage):
    """Write a subset of a pool as new shards, in pool order. Images and other members are copied byte for byte.

    `NNNNN.tar` holds `KEY.EXT`, `KEY.txt`, `KEY.json` and any other member (webdataset; img2dataset's keys: shard and
    row, nine digits), `NNNNN.parquet` the pool's columns and the byte range of each member. The directory is a pool:
    `Pool.open` reads it, and so does any reader of DataComp's shards.

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
    version = 2
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
        subset = None if self.subset is None else np.unique(load_subset(self.subset))
        counts = [len(_kept(shard, subset)) for shard in pool.shards]
        total, digests = sum(counts), {shard.name: shard.digest for shard in pool.shards}
        if subset is not None and total < len(subset):
            what = f"{len(subset) - total} of the subset's {len(subset)} uids are not in the pool"
            raise WinnowError(what, where=self.subset)
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

    def run(self, unit: Unit) -> Output:
        pool = Pool.open(self.pool)
        subset = None if self.subset is None else load_subset(self.subset)
        writer, views, first = PoolWriter(self.out, unit.name), [], 0
        with writer.tar() as tar:
            for name, low, high in unit.params["parts"]:
                shard = pool.shard(name)
                table = shard.table().take(pa.array(_kept(shard, subset)[low:high]))
                keys = [f"{unit.name}{first + i:04d}" for i in range(table.num_rows)]
                views.append(_copy(shard, table, keys, tar))
                first += table.num_rows
        return writer.view(pa.concat_tables(views, promote_options="default"))

    def finish(self, records: list[Record]) -> Output:
        return Output(values={"shards": shard_entries(records)})


def _kept(shard: Shard, subset: np.ndarray | None) -> np.ndarray:
    """Rows of a shard that the subset has; int64."""
    return np.arange(shard.rows) if subset is None else np.nonzero(is_member(shard.uids(), subset))[0]


def _copy(shard: Shard, table: pa.Table, keys: list[str], tar: SampleWriter) -> pa.Table:
    """Append samples to a tar under new keys; returns their view with the new locations."""
    columns = table.drop_columns([name for name in table.column_names if name in LOCATION.names])
    columns = columns.set_column(columns.column_names.index("key"), "key", pa.array(keys, pa.string()))
    located_rows = []
    for sample, row in zip(shard.samples(table), columns.to_pylist(), strict=True):
        facts = {name: value for name, value in row.items() if value is not None}
        image = image_extension(sample.members)
        members = {image: sample.members[image]} if image else {}
        if row["text"] is not None:
            members["txt"] = row["text"].encode()
        members["json"] = json.dumps(facts, ensure_ascii=False).encode()
        # Any other member is copied as it is.
        members |= {ext: data for ext, data in sample.members.items() if ext not in (image, "txt", "json")}
        located_rows.append(tar.add(row["key"], members))
    return located(columns, located_rows)

"""The reshard stage: the samples of a subset, copied into webdataset tars with a parquet beside each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.storage import digest_bytes
from winnow.infra.io.tar import TarWriter
from winnow.infra.pool.pool import (
    HERE,
    LOCATION,
    Pool,
    Shard,
    read_members,
    shard_entry,
    write_view,
)
from winnow.infra.pool.uids import is_member, load_subset
from winnow.infra.stages.stage import Output, Record, Stage, Unit


@dataclass
class ReshardStage(Stage):
    """Write a subset of a pool as shards of its own, in pool order; images are copied, not encoded again.

    `NNNNN.tar` holds `KEY.EXT`, `KEY.txt`, `KEY.json` (webdataset; img2dataset's keys: shard and row, nine digits),
    `NNNNN.parquet` the pool's columns and where each member lies. The directory is a pool itself: `Pool.open` takes
    it, and so does any reader of DataComp's shards.

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
    version = 1

    def params(self) -> dict[str, Any]:
        return {"samples_per_shard": self.samples_per_shard}

    def parents(self) -> dict[str, str]:
        return {"pool": Pool.open(self.pool).digest, "subset": self.subset_digest}

    def offsets(self) -> dict[str, str]:
        return {"pool": storage.absolute(self.pool)}

    def _kept(self, shard: Shard, subset: np.ndarray | None) -> np.ndarray:
        """Rows of a shard that the subset has; int64."""
        if subset is None:
            return np.arange(shard.rows)
        return np.nonzero(is_member(shard.uids(), subset))[0]

    def plan(self) -> list[Unit]:
        pool = Pool.open(self.pool)
        if not pool.images:
            raise UsageError("is a pool of metadata, without images to copy", where=self.pool)
        subset = None if self.subset is None else np.unique(load_subset(self.subset))
        counts = [len(self._kept(shard, subset)) for shard in pool.shards]
        total = sum(counts)
        if subset is not None and total < len(subset):
            raise WinnowError(
                f"{len(subset) - total} of the subset's {len(subset)} uids are not in the pool", where=self.subset
            )
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
            inputs = {str(name): pool.shard(str(name)).digest for name, _, _ in parts}
            units.append(
                Unit(
                    f"{number:05d}",
                    inputs | {"subset": self.subset_digest},
                    {"parts": parts},
                    {"number": number},
                    items=high - low,
                )
            )
        return units

    def run(self, unit: Unit) -> Output:
        pool = Pool.open(self.pool)
        subset = None if self.subset is None else load_subset(self.subset)
        tar_name, view_name = f"{unit.name}.tar", f"{unit.name}.parquet"
        rows: list[pa.Table] = []
        with storage.writing(self.url(tar_name)) as path:
            with TarWriter(path) as tar:
                for name, low, high in unit.params["parts"]:
                    shard = pool.shard(name)
                    table = shard.table().take(pa.array(self._kept(shard, subset)[low:high]))
                    rows.append(self._copy(shard, table, tar, unit.runtime["number"], sum(len(part) for part in rows)))
            digest = storage.digest_file(str(path))
        table = pa.concat_tables(rows, promote_options="default")
        with storage.writing(self.url(view_name)) as path:
            write_view(str(path), table)
        return Output(
            [tar_name, view_name],
            table.num_rows,
            values={"tars": [[f"{HERE}/{tar_name}", digest]], "rows": table.num_rows},
        )

    def _copy(self, shard: Shard, table: pa.Table, tar: TarWriter, number: int, first: int) -> pa.Table:
        """Append the samples to the tar; returns their view with the new places."""
        public = table.select([name for name in table.column_names if name not in LOCATION.names])
        offsets: dict[str, list[Any]] = {name: [] for name in LOCATION.names}
        images = read_members(shard.tars, table, "image")
        keys = [f"{number:05d}{first + i:04d}" for i in range(table.num_rows)]
        public = public.set_column(public.column_names.index("key"), "key", pa.array(keys, pa.string()))
        for key, image, ext, row in zip(keys, images, table["image_ext"].to_pylist(), public.to_pylist(), strict=True):
            text = row["text"]
            facts = json.dumps({name: value for name, value in row.items() if value is not None}, ensure_ascii=False)
            members = {"image": (ext, image), "text": ("txt", None if text is None else text.encode())}
            for member, (suffix, data) in (members | {"json": ("json", facts.encode())}).items():
                at = tar.add(f"{key}.{suffix}", data) if data is not None else None
                offsets[f"{member}_offset"].append(at)
                offsets[f"{member}_size"].append(len(data) if data is not None else None)
            offsets["tar"].append(0)
            offsets["image_ext"].append(ext)
            offsets["other"].append([])
        for item in LOCATION:
            public = public.append_column(item, pa.array(offsets[item.name], item.type))
        return public

    def finish(self, records: list[Record]) -> Output:
        entries = [
            shard_entry(
                record.unit,
                f"{record.unit}.parquet",
                record.files[f"{record.unit}.parquet"]["sha256"],
                record.values["tars"],
                record.values["rows"],
                [],
            )
            for record in records
        ]
        return Output(values={"shards": entries})


def subset_digest(url: str) -> str:
    """sha256 of a subset file."""
    return digest_bytes(storage.read_bytes(url))

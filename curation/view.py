"""A pool's own columns and its measures' as one table: what filters look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.measures import MEASURES
from infra import storage
from infra.errors import WinnowError
from infra.pool import Pool, Shard
from infra.stage import need_manifest
from infra.storage import digest_json

# Which measure would give a column that DataComp's metadata has.
_STAND_INS = {
    "clip_b32_similarity_score": "clip (with scorer ViT-B-32:openai), as `clip_score: {model: scorer}`",
    "clip_l14_similarity_score": "clip (with scorer ViT-L-14:openai), as `clip_score: {model: scorer}`",
}


def measure_of(column: str) -> str | None:
    """`clip.score` -> "clip"; None for a column of the pool itself."""
    name, dot, _ = column.partition(".")
    return name if dot else None


@dataclass(frozen=True)
class View:
    """Columns of a pool.

    Attributes:
        pool: the pool.
        columns_url: directory of a finished measure stage; None when there is none.
        targets: views of the target sets that filters name, by that name.
    """

    pool: Pool
    columns_url: str | None = None
    targets: Mapping[str, View] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pool)

    def _ids(self) -> dict[str, str]:
        if self.columns_url is None:
            return {}
        return dict(need_manifest(self.columns_url, "columns").values["columns"])

    def check(self, columns: Sequence[str]) -> None:
        """Raises WinnowError when a column is not there, naming the measure that would provide it."""
        ids = self._ids()
        own = set(self.pool.shards[0].columns()) if self.pool.shards else set()
        for column in columns:
            measure = measure_of(column)
            if measure is None and column not in own:
                stand_in = _STAND_INS.get(column)
                hint = (
                    f"The measure that would give it: {stand_in}." if stand_in else f"It has: {', '.join(sorted(own))}."
                )
                raise WinnowError(f'the pool has no column "{column}"', where=self.pool.url, do=hint)
            if measure is not None and measure not in ids:
                MEASURES.path(measure)
                raise WinnowError(
                    f'column "{column}" has not been measured',
                    where=self.pool.url,
                    do=f"Run the measure `{measure}` on this pool first.",
                )

    def digest(self, columns: Sequence[str]) -> str:
        """Of the pool and the named columns; other columns may come and go without changing it."""
        parts = {"pool": self.pool.digest}
        if self.columns_url is not None:
            manifest = need_manifest(self.columns_url, "columns")
            for measure in sorted({name for column in columns if (name := measure_of(column))}):
                parts[measure] = manifest.values["digests"][manifest.values["columns"][measure]]
        return digest_json(parts)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """One table a shard, in pool order, with the named columns."""
        ids = self._ids()
        for shard in self.pool.shards:
            yield self.table(shard, columns, ids)

    def table(self, shard: Shard, columns: Sequence[str], ids: Mapping[str, str] | None = None) -> pa.Table:
        """The named columns of a shard, rows in its order."""
        ids = self._ids() if ids is None else ids
        own = [column for column in columns if measure_of(column) is None]
        arrays = {}
        if own:
            table = shard.table(own)
            arrays.update({name: table[name] for name in own})
        by_measure: dict[str, list[str]] = {}
        for column in columns:
            name, _, field_name = column.partition(".")
            if field_name:
                by_measure.setdefault(name, []).append(field_name)
        for measure, fields in by_measure.items():
            assert self.columns_url is not None
            with storage.open_read(storage.join(self.columns_url, ids[measure], f"{shard.name}.parquet")) as file:
                table = pq.read_table(file, columns=fields)
            if table.num_rows != shard.rows:
                raise WinnowError(
                    f"measure {measure} has {table.num_rows} rows, the shard {shard.rows}",
                    where=f"{self.columns_url}/{ids[measure]}/{shard.name}.parquet",
                    do="Remove that directory and measure again.",
                )
            arrays.update({f"{measure}.{name}": table[name] for name in fields})
        return pa.table({column: arrays[column] for column in columns})

    def target(self, name: str) -> View:
        """Raises WinnowError for a target set that was not made ready."""
        if name not in self.targets:
            raise WinnowError(f'target set "{name}" has not been measured')
        return self.targets[name]


def missing(table: pa.Table, columns: Sequence[str]) -> pa.Array:
    """Rows in which one of the numeric or embedding columns is null or NaN; bool [n]."""
    result = pa.array([False] * table.num_rows, pa.bool_()) if not columns else None
    for column in columns:
        values = table[column]
        bad = pc.is_null(values, nan_is_null=pa.types.is_floating(values.type))
        result = bad if result is None else pc.or_(result, bad)
    return result

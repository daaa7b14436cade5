"""Pool columns and measured columns as one table, which filters read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.curation.measures import MEASURES
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.arrays import check_normalised, usable_rows
from winnow.infra.io.arrow import as_matrix, float_values, null_mask
from winnow.infra.io.parquet import open_parquet, unreadable
from winnow.infra.io.prefetch import prefetch
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.metadata import FEATURES
from winnow.infra.pool.pool import Pool, Shard
from winnow.infra.registry import unknown
from winnow.infra.stages import kept
from winnow.infra.stages.stage import need_manifest

# What a filter's `fit` learns about a pool: arrays by name, so that they can be kept in a file.
State = dict[str, np.ndarray]

_DATACOMP = {
    "b32": ("b32_img", "b32_txt", "clip_b32_similarity_score"),
    "l14": ("l14_img", "l14_txt", "clip_l14_similarity_score"),
}
# How a recipe gets a column of DataComp's metadata that its pool lacks.
_STAND_INS = {
    column: f"clip (with scorer ViT-{model[0].upper()}-{model[1:]}:openai), as `{use}`"
    for model, columns in _DATACOMP.items()
    for column, use in zip(columns, ("clip.image", "clip.text", "clip_score: {model: scorer}"), strict=True)
}


def measure_of(column: str) -> str | None:
    """The instance of the measure that a column belongs to: `clip.score` -> "clip". None for a pool column."""
    name, dot, _ = column.partition(".")
    return name if dot else None


def model_columns(model: str) -> tuple[str, str, str]:
    """The columns of a model's image embeddings, text embeddings and scores. The model is `scorer`, the recipe's; `b32`
    or `l14`, those in DataComp's metadata; or an instance of the measure `clip`."""
    name = "clip" if model == "scorer" else model
    return _DATACOMP.get(model) or (f"{name}.image", f"{name}.text", f"{name}.score")


@dataclass(frozen=True)
class View:
    """Columns of a pool.

    Attributes:
        pool: the pool.
        columns_url: directory of a finished measure stage; None when there is none.
        targets: views of the target sets, by the names that filters give them.
    """

    pool: Pool
    columns_url: str | None = None
    targets: Mapping[str, View] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pool)

    def _ids(self) -> dict[str, str]:
        if self.columns_url is None:
            return {}
        manifest = need_manifest(self.columns_url, "columns")
        if "columns" not in manifest.values:
            raise UsageError("holds no columns", where=self.columns_url)
        if manifest.parents["pool"] != self.pool.digest:
            what = f"the columns were measured on another pool than {self.pool.url}, or on an earlier version of it"
            raise UsageError(what, where=self.columns_url, do="Measure this one.")
        return dict(manifest.values["columns"])

    def check(self, columns: Sequence[str]) -> None:
        """Raises WinnowError when a column is missing, with the measure that provides it."""
        ids = self._ids()
        local = set(self.pool.shards[0].columns()) if self.pool.shards else set()
        for column in columns:
            measure = measure_of(column)
            if measure is None and column not in local:
                stand_in = _STAND_INS.get(column)
                hint = f"A measure provides it: {stand_in}." if stand_in else f"It has: {', '.join(sorted(local))}."
                if column in FEATURES and not self.pool.images:
                    hint = "It is an array of the NAME.npz that DataComp has for each NAME.parquet; download them."
                raise WinnowError(f'the pool has no column "{column}"', where=self.pool.url, do=hint)
            if column in FEATURES:
                for shard in self.pool.shards:
                    if shard.features is None and not shard.tars:
                        what = f'no "{column}": {shard.name}.npz is missing'
                        raise WinnowError(what, where=shard.view, do="Download it.")
            if measure is not None and measure not in ids:
                if measure not in MEASURES.table:
                    raise unknown("measure", measure, [*ids, *MEASURES.table])
                do = f"Run the measure `{measure}` on this pool first."
                raise WinnowError(f'column "{column}" has not been measured', where=self.pool.url, do=do)
            if measure is not None and self.pool.shards:
                with open_parquet(self._measured(ids[measure], self.pool.shards[0])) as parquet:
                    names = parquet.schema_arrow.names
                if column.removeprefix(f"{measure}.") not in names:
                    do = f"It has: {', '.join(f'{measure}.{name}' for name in names)}."
                    raise WinnowError(f'the measure has no column "{column}"', where=self.columns_url, do=do)

    def knows(self, column: str) -> bool:
        """Whether a column can be read: a pool column, or a measured one after the measures have run."""
        return measure_of(column) is None or self.columns_url is not None

    def digest(self, columns: Sequence[str]) -> str:
        """Digest of the pool and the named columns. It does not depend on other columns."""
        parts = {"pool": digest_json([self.pool.digest, self.pool.lost]) if self.pool.lost else self.pool.digest}
        if self.columns_url is not None:
            manifest = need_manifest(self.columns_url, "columns")
            for measure in sorted({name for column in columns if (name := measure_of(column))}):
                parts[measure] = manifest.values["digests"][manifest.values["columns"][measure]]
        return digest_json(parts)

    @property
    def whole(self) -> View:
        """The view of the whole pool, where this one has only some of its samples."""
        return self

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """One table per shard, in pool order, with the named columns. One thread per core reads ahead."""
        ids = self._ids()
        return prefetch(lambda shard: self.table(shard, columns, ids), self.pool.shards)

    def shards(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """As `batches`, each table with the name of its shard."""
        return zip((shard.name for shard in self.pool.shards), self.batches(columns), strict=True)

    def table(self, shard: Shard, columns: Sequence[str], ids: Mapping[str, str] | None = None) -> pa.Table:
        """The named columns of a shard, each once, with the rows in the order of the shard."""
        columns = list(dict.fromkeys(columns))
        ids = self._ids() if ids is None else ids
        by_measure: dict[str, list[str]] = {}
        for column in columns:
            if measure := measure_of(column):
                by_measure.setdefault(measure, []).append(column.removeprefix(f"{measure}."))
        if not by_measure:
            return with_fixed_lists(shard.table(columns))
        local = [column for column in columns if measure_of(column) is None]
        arrays = dict(zip(local, shard.table(local).columns, strict=True)) if local else {}
        for measure, fields in by_measure.items():
            url = self._measured(ids[measure], shard)
            with open_parquet(url) as parquet:
                try:
                    table = parquet.read(columns=fields, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    raise unreadable(url, error) from error
            if table.num_rows != shard.rows:
                what = f"measure {measure} has {table.num_rows} rows, the shard {shard.rows}"
                raise WinnowError(what, where=url, do="Remove that directory and measure again.")
            arrays.update({f"{measure}.{name}": table[name] for name in fields})
        return with_fixed_lists(pa.table({column: arrays[column] for column in columns}))

    def _measured(self, measure_id: str, shard: Shard) -> str:
        assert self.columns_url is not None
        unit = f"{measure_id}/{shard.name}"
        return kept.check_unit(self.columns_url, unit, f"{unit}.parquet")

    def target(self, name: str) -> View:
        """The view of a target set. Raises WinnowError when it was not measured."""
        if name not in self.targets:
            raise WinnowError(f'target set "{name}" has not been measured')
        return self.targets[name]


def missing(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """Rows in which one of the columns is null, NaN or infinite, or an embedding with such an element or all 0; bool
    [n]."""
    result = np.zeros(table.num_rows, dtype=bool)
    for column in columns:
        values = table[column]
        if pa.types.is_floating(values.type):
            result |= ~np.isfinite(float_values(values))
        elif pa.types.is_fixed_size_list(values.type) and pa.types.is_floating(values.type.value_type):
            matrix, present = as_matrix(values)
            result |= ~(present & usable_rows(matrix))
        elif values.null_count:
            result |= null_mask(values)
    return result


def embeddings(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The L2-normalised embeddings of a column, float, shape [n, d], and which rows have one (`missing`), bool [n]. The
    others are 0; d is 0 where the column is null in the whole table.

    Raises:
        WinnowError: the column holds no embeddings of one dimension, or they are not L2-normalised.
    """
    values = table[column]
    if pa.types.is_null(values.type):
        return np.zeros((len(values), 0), np.float16), np.zeros(len(values), dtype=bool)
    if not pa.types.is_fixed_size_list(values.type) or not pa.types.is_floating(values.type.value_type):
        raise WinnowError(f'column "{column}" has the type {values.type}, and embeddings are floats, equally many each')
    matrix, usable = as_matrix(values)
    usable &= usable_rows(matrix)
    if column not in FEATURES:  # which are checked as they are read
        check_normalised(matrix, usable, f'column "{column}"')
    return (matrix if usable.all() else np.where(usable[:, None], matrix, matrix.dtype.type(0))), usable


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float64 with NaN for null and infinite values, shape [n]. Raises WinnowError when it has
    something else."""
    try:
        values = float_values(column)
    except pa.ArrowInvalid as error:
        raise WinnowError(f"a column of numbers has text ({error})") from None
    values = values.astype(np.float64)
    return np.where(np.isinf(values), np.nan, values)


def with_fixed_lists(table: pa.Table) -> pa.Table:
    """The table with its columns of lists of floats, if all lists of the column have one length, of fixed size."""
    for i, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_floating(kind.value_type):
            continue
        sizes = pc.unique(pc.drop_null(pc.list_value_length(table[i])))
        if len(sizes) < 2:
            fixed = pa.list_(kind.value_type, sizes[0].as_py()) if len(sizes) else None
            table = table.set_column(i, name, table[i].cast(fixed) if fixed else pa.nulls(table.num_rows))
    return table

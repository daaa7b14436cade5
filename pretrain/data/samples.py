"""The samples of a training, by number: a pool or a subset of it, and further sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.arrow import int_values, mask_array, number_array
from winnow.infra.io.parquet import open_parquet
from winnow.infra.io.schemas import concat_columns
from winnow.infra.pool.pool import SAMPLE, Pool, Shard
from winnow.infra.pool.sample import Sample
from winnow.infra.pool.uids import distinct_uids, encode_uids, load_subset, times_listed, uid_column
from winnow.infra.stages.kept import check_unit
from winnow.infra.stages.stage import need_manifest
from winnow.pretrain.data.order import Order
from winnow.pretrain.sections import SourceConfig

_READ = (*(name for name in SAMPLE if name != "uid"), "label")
# By shard: what is read of its chosen samples, their uids, their rows in the order of numbers, and the view's URL.
_Part: TypeAlias = tuple[pa.Table, np.ndarray, np.ndarray, str]


class Samples:
    """The samples of a pool, or of a subset of it, and of further sources, by number.

    A uid that a subset lists k times counts k times, as in DataComp's resharder. Holds what is needed to read the
    chosen samples (about 120 bytes, the caption and the wanted columns of each), not their members.

    Args:
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy, or None for the whole pool.
        more: further sources.
        columns: columns that the samples shall have: of the pool by name, or measured ones as `MEASURE.COLUMN`.
            Further sources have null where they lack them.
        measured: URL of the measured columns of `pool`.

    Raises:
        WinnowError: nothing is left to train on, or a subset names samples that are not in its pool.
        UsageError: a column is not in the pool, or has not been measured.
    """

    def __init__(
        self,
        pool: str,
        subset: str | None = None,
        more: Sequence[SourceConfig] = (),
        columns: Sequence[str] = (),
        measured: str | None = None,
    ) -> None:
        self.where, self.columns = pool, tuple(columns)
        self.weights = [1.0, *(source.weight for source in more)]
        self.sizes: list[int] = []
        self._tars: list[str] = []
        parts: list[_Part] = []
        for url, selected in [(pool, subset), *((source.pool, source.subset) for source in more)]:
            self._add(url, selected, measured if not self.sizes else None, parts)
        tables, uids, rows, views = zip(*parts, strict=True)
        self._uids, self._row = np.concatenate(uids), np.concatenate(rows)
        whole = concat_columns(tables, views)
        # Arrays, because a table's `take` starts threads, which the loader's forked processes cannot.
        self._values = {name: whole[name].combine_chunks() for name in whole.column_names}
        self._shard = Shard("", pool, tuple(self._tars), whole.num_rows, "")  # all sources' samples as one

    def _add(self, url: str, subset: str | None, measured: str | None, parts: list[_Part]) -> None:
        """Append, by shard, what is read of its chosen samples, their uids, and the rows in the order of numbers."""
        distinct, counts = distinct_uids(np.empty(0, "u8,u8") if subset is None else load_subset(subset))
        absent = np.ones(len(distinct), bool)
        first, size = sum(table.num_rows for table, *_ in parts), 0
        for shard in Pool.open(url).shards:
            uids = shard.uids()
            times = np.ones(len(uids), np.int64)
            if subset is not None:
                at, times = times_listed(uids, distinct, counts)
                absent[at[times > 0]] = False
            if not times.any():
                continue
            table = read_table(shard, self.columns, measured, required=not self.sizes)
            tar = number_array((int_values(table["tar"]) + len(self._tars)).astype(np.int32))
            table = table.set_column(table.column_names.index("tar"), "tar", tar)
            chosen = times > 0
            rows = first + np.repeat(np.arange(np.count_nonzero(chosen)), times[chosen])
            parts.append((table.filter(mask_array(chosen)), uids[chosen], rows, shard.view))
            self._tars += shard.tars
            first, size = first + np.count_nonzero(chosen), size + len(rows)
        if n := int(np.count_nonzero(absent)):
            names = ", ".join(encode_uids(distinct[absent][:3]))
            what = f"names {n} samples that are not in the pool: {names}{', …' * (n > 3)}"
            raise WinnowError(what, where=subset, do=f"The pool: {url}. Was the subset drawn from another one?")
        if not size:
            raise WinnowError("holds no sample to train on", where=subset or url)
        self.sizes.append(size)

    def __len__(self) -> int:
        return len(self._row)

    def order(self, seed: int) -> Order:
        return Order(self.sizes, seed, self.weights)

    def read(self, numbers: np.ndarray) -> list[Sample]:
        """The samples, whose members are read when they are asked for, images tar by tar; int64 [k]."""
        rows = self._row[numbers]
        index = number_array(rows)
        values = {name: array.take(index) for name, array in self._values.items()}
        table = pa.table({"uid": uid_column(self._uids[rows]), **values})
        return list(self._shard.samples(table, self.columns, block=max(1, len(rows))))


def read_table(shard: Shard, columns: Sequence[str], measured: str | None, required: bool) -> pa.Table:
    """What a training reads of a shard: `_READ`, and further columns; null where not there and not `required`.

    Raises:
        UsageError: a required column is not in the pool, or has not been measured.
    """
    known = set(shard.columns()) if columns else set()
    table = shard.table([*_READ, *(name for name in columns if name in known and name not in (*_READ, "uid"))])
    for i, field in enumerate(table.schema):
        if field.name == "label" and not pa.types.is_integer(field.type) and "label" not in columns:
            table = table.set_column(i, "label", pa.nulls(table.num_rows, pa.int64()))
        elif pa.types.is_string(field.type):  # 2 GiB of a pool's keys or captions do not fit into one string array
            table = table.set_column(i, field.name, table[i].cast(pa.large_string()))
    for name in columns:
        if name in known:
            continue
        measure, _, field = name.partition(".")
        if measured is not None and field:
            ids = need_manifest(measured, "columns").values["columns"]
            if measure not in ids:
                raise UsageError(f'column "{name}" has not been measured', where=measured)
            unit = f"{ids[measure]}/{shard.name}"
            with open_parquet(check_unit(measured, unit, f"{unit}.parquet")) as parquet:
                table = table.append_column(name, parquet.read(columns=[field])[field])
        elif required:
            raise UsageError(f'the objective reads column "{name}", which is not in the pool', where=shard.view)
        else:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table

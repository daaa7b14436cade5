"""The samples of a training, by number: a pool or a subset of it, and further sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.parquet import open_parquet
from winnow.infra.pool.pool import Pool, Shard
from winnow.infra.pool.sample import Sample
from winnow.infra.pool.uids import encode_uids, load_subset
from winnow.infra.stages.stage import need_manifest
from winnow.pretrain.data.order import Order
from winnow.pretrain.sections import SourceConfig

_READ = ("text", "label", "tar", "image_ext", "image_offset", "image_size")


class Samples:
    """The samples of a pool, or of a subset of it, and of further sources, by number.

    A uid that a subset lists k times counts k times, as in DataComp's resharder. Holds what is needed to read the
    chosen samples (about 40 bytes, the caption and the wanted columns of each), not the images.

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
        self.files: list[str] = []
        self._parts: list[tuple[np.ndarray, ...]] = []
        tables: list[pa.Table] = []
        for url, selected in [(pool, subset), *((source.pool, source.subset) for source in more)]:
            self._add(url, selected, measured if not self.sizes else None, tables)
        arrays = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        self._file, self._offset, self._size, self._label, self._ext, self._row = arrays
        del self._parts
        whole = pa.concat_tables(tables, promote_options="permissive")
        # Arrays, because a table's `take` starts threads, which the loader's forked processes cannot.
        self._values = {name: whole[name].combine_chunks() for name in whole.column_names}

    def _add(self, url: str, subset: str | None, measured: str | None, tables: list[pa.Table]) -> None:
        selected = None if subset is None else _counted(load_subset(subset))
        absent = None if selected is None else np.ones(len(selected[0]), bool)
        first, size = sum(len(part[0]) for part in self._parts), 0
        for shard in Pool.open(url).shards:
            times = None
            if selected is not None and absent is not None:
                at, times = _times(shard.uids(), *selected)
                absent[at[times > 0]] = False
                if not times.any():
                    continue
            table = shard.table(_READ)
            wanted = read_columns(shard, self.columns, measured, required=not self.sizes)
            for name in self.columns:
                table = table.append_column(f"column {name}", wanted[name])
            if times is not None:
                table = table.filter(pa.array(times > 0))
                times = times[times > 0]
            n = table.num_rows
            rows = first + (np.arange(n) if times is None else np.repeat(np.arange(n), times))
            self._parts.append((*_locations(table, len(self.files)), rows))
            kept = table.select(["text", *(f"column {name}" for name in self.columns)])
            tables.append(kept.set_column(0, "text", table["text"].cast(pa.large_string())))
            self.files += shard.tars
            first, size = first + n, size + len(rows)
        if selected is not None and absent is not None and (n := int(np.count_nonzero(absent))):
            names = ", ".join(encode_uids(selected[0][absent][:3]))
            raise WinnowError(
                f"names {n} samples that are not in the pool: {names}{', …' * (n > 3)}",
                where=subset,
                do=f"The pool: {url}. Was the subset drawn from another one?",
            )
        if not size:
            raise WinnowError("holds no sample to train on", where=subset or url)
        self.sizes.append(size)

    def __len__(self) -> int:
        return len(self._row)

    def order(self, seed: int) -> Order:
        return Order(self.sizes, seed, self.weights)

    def read(self, numbers: np.ndarray) -> list[Sample]:
        """The samples with their encoded images, read by range, file by file; int64 [k]."""
        rows = self._row[numbers]
        files, images = self._file[rows], [b""] * len(rows)
        for file in np.unique(files):
            at = np.nonzero(files == file)[0]
            ranges = self._offset[rows[at]], self._size[rows[at]]
            for i, data in zip(at, storage.read_ranges(self.files[file], *ranges), strict=True):
                images[i] = data
        values = {name: array.take(pa.array(rows)).to_pylist() for name, array in self._values.items()}
        return [
            Sample(
                text=values["text"][i] or "",
                label=None if self._label[row] < 0 else int(self._label[row]),
                columns={name: values[f"column {name}"][i] for name in self.columns},
                members={EXTENSIONS[self._ext[row]]: image},
            )
            for i, (row, image) in enumerate(zip(rows, images, strict=True))
        ]


def _locations(table: pa.Table, first_file: int) -> tuple[np.ndarray, ...]:
    """File, offset, size, label (-1: none) and index of the extension of each sample."""
    label, n = table["label"], table.num_rows
    whole = pa.types.is_integer(label.type)
    ext = pc.fill_null(pc.index_in(table["image_ext"], value_set=pa.array(EXTENSIONS)), 0)
    return (
        (first_file + table["tar"].to_numpy()).astype(np.int32),
        table["image_offset"].to_numpy(),
        table["image_size"].to_numpy(),
        label.cast(pa.int64()).fill_null(-1).to_numpy() if whole else np.full(n, -1, np.int64),
        ext.to_numpy().astype(np.int8),
    )


def read_columns(shard: Shard, names: Sequence[str], measured: str | None, required: bool) -> dict[str, pa.Array]:
    """Columns of a shard; null where they are not there and not `required`.

    Raises:
        UsageError: a required column is not in the pool, or has not been measured.
    """
    found = {}
    own = set(shard.columns()) if names else set()
    for name in names:
        measure, _, field = name.partition(".")
        if name in own:
            found[name] = shard.table([name])[name]
        elif measured is not None and field:
            ids = need_manifest(measured, "columns").values["columns"]
            if measure not in ids:
                raise UsageError(f'column "{name}" has not been measured', where=measured)
            with open_parquet(storage.join(measured, ids[measure], f"{shard.name}.parquet")) as parquet:
                found[name] = parquet.read(columns=[field])[field]
        elif required:
            raise UsageError(f'the objective reads column "{name}", which is not in the pool', where=shard.view)
        else:
            found[name] = pa.nulls(shard.rows)
    return found


def _counted(subset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sorted subset's distinct uids, and how often it has each."""
    if not len(subset):
        return subset, np.empty(0, np.int64)
    starts = np.nonzero(np.concatenate([[True], subset[1:] != subset[:-1]]))[0]
    return subset[starts], np.diff(np.append(starts, len(subset)))


def _times(uids: np.ndarray, distinct: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each uid would be in the subset, and how often it is there; int64 [n] each."""
    if not len(distinct):
        return np.zeros(len(uids), np.int64), np.zeros(len(uids), np.int64)
    # By the first half, since NumPy compares pairs slowly; pairs only where two uids share it.
    at = np.minimum(np.searchsorted(np.ascontiguousarray(distinct["f0"]), uids["f0"]), len(distinct) - 1)
    alike = (distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] != uids["f1"])
    at[alike] = np.minimum(np.searchsorted(distinct, uids[alike]), len(distinct) - 1)
    return at, np.where((distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] == uids["f1"]), counts[at], 0)

"""Columns of a whole pool in memory or in a temporary file, for filters that decide on all samples together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View, embeddings, missing, numbers
from winnow.curation.columns.threshold import Threshold
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrays import check_normalised, is_array, load_matrix, usable_rows
from winnow.infra.pool.uids import UID_DTYPE, decode_uids, encode_uids


@dataclass(frozen=True)
class PoolColumns:
    """The n rows of a pool that have a value in every requested column, in pool order.

    Attributes:
        uids: dtype u8,u8, shape [n].
        vectors: embeddings by column, float16, shape [n, d], mapped from a temporary file that is removed with them.
        numbers: scalars by column, shape [n]; integers in their type, others as float64.
        total: rows of the pool, including those without a value.
    """

    uids: np.ndarray
    vectors: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    total: int

    def __len__(self) -> int:
        return len(self.uids)


def collect(
    view: View, vectors: Sequence[str] = (), scalars: Sequence[str] = (), optional: Sequence[str] = ()
) -> PoolColumns:
    """Read columns of a pool, without the rows in which one is null, NaN or infinite, or an embedding of zeros.

    Args:
        view: of the pool.
        vectors: columns of embeddings; all of a column have one dimension.
        scalars: columns of numbers.
        optional: columns of numbers that may be null or infinite, which become NaN.

    Raises:
        WinnowError: embeddings of a column differ in dimension, or are not L2-normalised.
    """
    uids: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {name: [] for name in (*scalars, *optional)}
    stores = {name: _Store(name) for name in vectors}
    total = 0
    for batch in view.batches(tuple(dict.fromkeys(("uid", *vectors, *scalars, *optional)))):
        present = ~np.asarray(missing(batch, scalars))
        found = {name: embeddings(batch, name) for name in vectors}
        for _, usable in found.values():
            present &= usable
        columns = {name: _scalars(batch[name]) for name in scalars} | {name: numbers(batch[name]) for name in optional}
        for name, (matrix, _) in found.items():
            stores[name].append(matrix[present])
        for name, column in columns.items():
            values[name].append(column[present])
        uids.append(decode_uids(batch["uid"])[present])
        total += batch.num_rows
    return PoolColumns(
        np.concatenate(uids) if uids else np.empty(0, UID_DTYPE),
        {name: store.matrix() for name, store in stores.items()},
        {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in values.items()},
        total,
    )


def _scalars(column: pa.ChunkedArray) -> np.ndarray:
    # float64 would round 64-bit hashes.
    return column.fill_null(0).to_numpy() if pa.types.is_integer(column.type) else numbers(column)


class _Store:
    """A matrix that grows in a temporary file, so that memory holds only the pages in use."""

    def __init__(self, column: str) -> None:
        self.column, self.rows, self.dim = column, 0, 0
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - the memory map keeps it open

    def append(self, block: np.ndarray) -> None:
        if not len(block):
            return
        if self.dim and block.shape[1] != self.dim:
            what = f'embeddings of "{self.column}" have {block.shape[1]} dimensions in one shard, {self.dim} in another'
            raise WinnowError(what, do="Measure the pool again with one scorer.")
        self.dim = block.shape[1]
        self.rows += len(block)
        self.file.write(np.ascontiguousarray(block, dtype=np.float16).tobytes())

    def matrix(self) -> np.ndarray:
        self.file.flush()
        if self.rows == 0:
            return np.empty((0, self.dim), np.float16)
        return np.memmap(self.file, np.float16, "r", shape=(self.rows, self.dim))


def dimensions(view: View, column: str) -> int | None:
    """The dimension of a view's embeddings; None when it has none, or they are not measured yet."""
    if view.knows(column):
        for batch in view.batches((column,)):
            if width := embeddings(batch.slice(0, 1), column)[0].shape[1]:
                return int(width)
    return None


def split_targets(target: str | tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders, and the .npy files of embeddings, among the targets."""
    names = (target,) if isinstance(target, str) else tuple(target)
    return tuple(name for name in names if not is_array(name)), tuple(name for name in names if is_array(name))


def target_vectors(view: View, target: str | tuple[str, ...], column: str) -> np.ndarray:
    """The usable embeddings of targets, float16 or float32, shape [m, d].

    Raises:
        WinnowError: there is none, they differ in dimension, or are not L2-normalised.
    """
    folders, files = split_targets(target)
    parts = []
    for name in files:
        matrix = load_matrix(name)
        usable = usable_rows(matrix)
        check_normalised(matrix, usable, "the targets", name)
        parts.append(matrix[usable])
    for name in folders:
        for batch in view.target(name).batches((column,)):
            matrix, usable = embeddings(batch, column)
            parts.append(matrix[usable])
    if len({part.shape[1] for part in parts if len(part)}) > 1:
        raise WinnowError("the targets' embeddings differ in dimension", where=", ".join((*folders, *files)))
    found = np.concatenate([part for part in parts if len(part)] or [np.empty((0, 0), np.float16)])
    if not len(found):
        raise WinnowError("the target set has no usable image", where=", ".join((*folders, *files)))
    return found


def passing(cutoff: Threshold, uids: np.ndarray, scores: np.ndarray, total: int) -> np.ndarray:
    """Which samples a threshold keeps by their scores (float, NaN where there is none, shape [n]); bool, shape [n].

    `total`, at least n, is the number of rows of the pool. In a fraction, those without a score count as the lowest.
    """
    named = pa.array(encode_uids(uids)) if cutoff.keep is not None else pa.nulls(len(uids), pa.string())
    absent = total - len(uids)
    table = pa.table({"uid": named, "score": scores.astype(np.float64)})
    rest = pa.table({"uid": pa.nulls(absent, pa.string()), "score": np.full(absent, np.nan)})
    state = cutoff.fit(_Held((table, rest)), ("score",), _score)  # type: ignore[arg-type]
    return cutoff.mask(_score(table), table, state)


@dataclass(frozen=True)
class _Held:
    tables: tuple[pa.Table, ...]

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        return (table.select(columns) for table in self.tables)


def _score(table: pa.Table) -> np.ndarray:
    return table["score"].to_numpy()

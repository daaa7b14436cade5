"""Arrow columns to NumPy and back without pandas, which `pyarrow.array` and `to_numpy` import where it is installed."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pyarrow as pa

Column: TypeAlias = pa.ChunkedArray | pa.Array


def one_chunk(column: Column) -> pa.Array:
    """The column as a single array; copied only where it has several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def mask_array(mask: np.ndarray) -> pa.BooleanArray:
    """A NumPy mask as an Arrow one, shape [n]."""
    bits = np.packbits(np.ascontiguousarray(mask, dtype=bool), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(mask), [None, pa.py_buffer(bits)])


def number_array(values: np.ndarray) -> pa.Array:
    """NumPy numbers as an Arrow array of their type, shape [n]."""
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def null_mask(column: Column) -> np.ndarray:
    """Which values are null; bool [n]."""
    if not column.null_count:
        return np.zeros(len(column), dtype=bool)
    array = one_chunk(column)
    buffer = array.buffers()[0]
    if buffer is None:
        return np.ones(len(array), dtype=bool)
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), count=array.offset + len(array), bitorder="little")
    return ~bits[array.offset :].view(bool)


def _values(array: pa.Array) -> np.ndarray:
    """Arrow's memory as a read-only array; what it holds for nulls is undefined."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def float_values(column: Column) -> np.ndarray:
    """A column of floats or integers, null as NaN, shape [n].

    Floats keep their precision, and a column without nulls is a read-only view of Arrow's memory. Integers become
    float64.
    """
    if len(column) == 0:
        return np.empty(0, column.type.to_pandas_dtype() if pa.types.is_floating(column.type) else np.float64)
    array = one_chunk(column)
    values = _values(array)
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    if column.null_count:
        values = np.where(null_mask(array), np.array(np.nan, values.dtype), values)
    return values


def int_values(column: Column, null: int = -1) -> np.ndarray:
    """A column of integers as int64 [n], with the given number for nulls."""
    if len(column) == 0 or column.null_count == len(column):
        return np.full(len(column), null, np.int64)
    array = one_chunk(column)
    return np.where(null_mask(array), np.int64(null), _values(array).astype(np.int64))


def as_matrix(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """A column of embeddings (lists of fixed size) as a matrix.

    Returns:
        the values in their own precision, shape [n, dim], with rows of 0 for nulls; and which are not null, bool [n].
    """
    array = one_chunk(column)
    present, dim = ~null_mask(array), array.type.list_size
    matrix = float_values(array.values.slice(array.offset * dim, len(array) * dim)).reshape(len(array), dim)
    return np.where(present[:, None], matrix, matrix.dtype.type(0)) if not present.all() else matrix, present

"""Between NumPy and Arrow without a detour: `pyarrow.array` and `to_numpy` import pandas, where it is installed, and
that takes a second."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def mask_array(mask: np.ndarray) -> pa.BooleanArray:
    """A NumPy mask as an Arrow one, shape [n]."""
    bits = np.packbits(np.ascontiguousarray(mask, dtype=bool), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(mask), [None, pa.py_buffer(bits)])


def _chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _bits(buffer: pa.Buffer, array: pa.Array) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(buffer, np.uint8), count=array.offset + len(array), bitorder="little")
    return bits[array.offset :].view(bool)


def null_mask(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Which values are null; bool [n]."""
    if not column.null_count:
        return np.zeros(len(column), dtype=bool)
    array = _chunk(column)
    buffer = array.buffers()[0]
    return np.ones(len(array), dtype=bool) if buffer is None else ~_bits(buffer, array)


def float_values(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of floats or integers, null as NaN, shape [n].

    Floats in their own precision, and where none is null a read-only view of Arrow's memory; integers as float64.
    """
    if len(column) == 0:
        return np.empty(0, column.type.to_pandas_dtype() if pa.types.is_floating(column.type) else np.float64)
    array = _chunk(column)
    dtype = np.dtype(array.type.to_pandas_dtype())
    values = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    if dtype.kind != "f":
        values = values.astype(np.float64)
    if column.null_count:
        values = np.where(null_mask(array), np.array(np.nan, values.dtype), values)
    return values


def as_matrix(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of a column as float16 [n, dim], and which of them are there, bool [n]; rows of absent ones are 0."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    present = ~np.asarray(array.is_null())
    dim = array.type.list_size
    values = array.values.slice(array.offset * dim, len(array) * dim)
    matrix = values.to_numpy(zero_copy_only=False).reshape(len(array), dim)
    return np.where(present[:, None], matrix, np.float16(0)) if not present.all() else matrix, present

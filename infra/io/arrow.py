"""Arrow columns: one type for each kind of value; to NumPy and back without pandas, which `pyarrow.array` and
`to_numpy` import where it is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Column: TypeAlias = pa.ChunkedArray | pa.Array

_LARGEST = 1 << 30  # bytes cast at a time; 2 GiB do not fit into one string array


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
    """A column of floats, integers, decimals or booleans, or of text that has numbers, null as NaN, shape [n].

    Floats keep their precision, and a column without nulls is a read-only view of Arrow's memory. Others become
    float64.
    """
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    if pa.types.is_string(column.type) or pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.float64())
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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type in which Winnow holds the values of a type: one type of string, of bytes, and of list.

    Dictionaries, run ends and extension types become the type of their values. Decimals become float64; those without a
    fraction become int64 if they have up to 18 digits, and stay otherwise. All other types stay as they are.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if types.is_decimal(kind):
        return pa.float64() if kind.scale > 0 else pa.int64() if kind.precision - kind.scale <= 18 else kind
    if types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if _is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([item.with_type(plain_type(item.type)) for item in kind.fields])
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a plain type is that of strings or bytes."""
    return pa.types.is_string(kind) or pa.types.is_binary(kind)


def plain(table: pa.Table, leave: Collection[str] = ()) -> pa.Table:
    """The table with every column but those in `leave` in its `plain_type`. Values change only where decimals are
    rounded to float64."""
    for i, item in enumerate(table.schema):
        if item.name not in leave and plain_type(item.type) != item.type:
            table = table.set_column(i, item.name, _plain_column(table[i]))
    return table


def utf8(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[int]]:
    """A column of strings, whose content Arrow does not check, or of bytes as strings; and the rows that are not UTF-8,
    which become null."""
    try:
        if pa.types.is_binary(column.type):
            return column.cast(pa.string()), []
        column.validate(full=True)
        return column, []
    except pa.ArrowInvalid:
        octets = column.cast(pa.binary()).to_pylist()
        values = [None if one is None else decoded(one) for one in octets]
        bad = [
            at for at, (one, value) in enumerate(zip(octets, values, strict=True)) if value is None and one is not None
        ]
        return pa.chunked_array([pa.array(values, pa.string())]), bad


def decoded(octets: bytes) -> str | None:
    """Bytes as text; None if they are not UTF-8."""
    try:
        return octets.decode()
    except UnicodeDecodeError:
        return None


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return any(
        check(kind) for check in (types.is_list, types.is_large_list, types.is_list_view, types.is_large_list_view)
    )


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    parts = [part for chunk in column.chunks for part in _in_parts(chunk)]
    return pa.chunked_array([_plain_array(part) for part in parts], plain_type(column.type))


def _in_parts(array: pa.Array) -> Iterator[pa.Array]:
    if array.nbytes > _LARGEST and len(array) > 1:
        yield from _in_parts(array.slice(0, len(array) // 2))
        yield from _in_parts(array.slice(len(array) // 2))
    else:
        yield array


def _plain_array(array: pa.Array) -> pa.Array:
    kind = array.type
    target = plain_type(kind)
    if kind == target:
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_array(array.storage)
    if pa.types.is_dictionary(kind):  # not every type of value can be decoded
        return _plain_array(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        return _plain_array(pc.run_end_decode(array))
    if pa.types.is_struct(kind):
        values = [_plain_array(array.field(i)) for i in range(kind.num_fields)]
        return pa.StructArray.from_arrays(values, fields=list(target), mask=mask_array(null_mask(array)))
    if pa.types.is_fixed_size_list(kind):
        flat = _plain_array(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
        return pa.FixedSizeListArray.from_arrays(flat, type=target, mask=mask_array(null_mask(array)))
    if _is_list(kind):  # Arrow's cast of list views with nulls gives other lists (26.0)
        ends = np.cumsum(np.concatenate([[0], int_values(array.value_lengths(), 0)])).astype(np.int32)
        return pa.ListArray.from_arrays(
            number_array(ends), _plain_array(array.flatten()), type=target, mask=mask_array(null_mask(array))
        )
    if pa.types.is_decimal(kind):  # Arrow's own cast is one bit off for half of the values, and fails for decimal32
        array = array.cast(pa.decimal128(38, 0) if kind.scale < 0 else kind).cast(pa.string())
    return array.cast(target)

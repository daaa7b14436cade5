"""Arrow columns to NumPy, against `to_pylist`."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from winnow.infra.io.arrow import (
    as_matrix,
    float_values,
    int_values,
    mask_array,
    null_mask,
    number_array,
    plain,
    plain_type,
)

VALUES = [3, None, 1, 0, None, 7, 2, 5, 9, 4, None]


def columns(values, kind):
    """The values as an array, a slice of a longer one, and chunks."""
    array = pa.array(values, kind)
    yield array
    yield pa.concat_arrays([pa.array([values[0]] * 3, kind), array]).slice(3)
    yield pa.chunked_array([array.slice(0, 4), array.slice(4, 0), array.slice(4)])


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.float16(), pa.float32(), pa.float64()])
def test_numbers_and_nulls(kind):
    for column in columns(VALUES, kind):
        values = float_values(column)
        assert values.dtype == (kind.to_pandas_dtype() if pa.types.is_floating(kind) else np.float64)
        np.testing.assert_array_equal(values, [np.nan if value is None else value for value in VALUES])
        assert null_mask(column).tolist() == [value is None for value in VALUES]
        if pa.types.is_integer(kind):
            assert int_values(column).tolist() == [-1 if value is None else value for value in VALUES]


def test_empty_and_null_columns():
    assert len(float_values(pa.array([], pa.float32()))) == len(int_values(pa.array([], pa.int64()))) == 0
    assert int_values(pa.nulls(3, pa.int64()), null=9).tolist() == [9, 9, 9]
    assert null_mask(pa.nulls(2)).tolist() == [True, True]


def test_masks():
    mask = np.random.default_rng(0).random(77) < 0.5
    assert mask_array(mask).to_pylist() == mask.tolist()
    assert null_mask(pa.array([1 if keep else None for keep in mask])).tolist() == (~mask).tolist()


def test_matrices():
    rows = [[1.0, 2.0], None, [3.0, None], [5.0, 6.0]]
    for column in columns(rows, pa.list_(pa.float16(), 2)):
        matrix, present = as_matrix(column)
        assert matrix.dtype == np.float16 and present.tolist() == [True, False, True, True]
        np.testing.assert_array_equal(matrix, [[1, 2], [0, 0], [3, np.nan], [5, 6]])
    whole, present = as_matrix(pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)))
    assert whole.dtype == np.float32 and whole.shape == (3, 2) and present.all()
    assert as_matrix(pa.array([], pa.list_(pa.float16(), 4)))[0].shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float16, np.float32])
def test_numbers_as_arrow(dtype):
    values = np.arange(10).astype(dtype)[::2]
    assert number_array(values).equals(pa.array(values)) and len(number_array(values[:0])) == 0


WORDS = ["a", None, "", "caf\u00e9", "a"]
TEXT = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view()]
LISTS = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
DECIMALS = [make(9, scale) for make in (pa.decimal32, pa.decimal64, pa.decimal128, pa.decimal256) for scale in (0, 3)]


def dictionary(values, kind):
    """A dictionary-encoded array; Arrow cannot encode every type itself."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    indices = [None if value is None else distinct.index(value) for value in values]
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int16()), pa.array(distinct, kind))


def odd_columns():
    """(array, its plain type) of every type of string, bytes, decimal and list, and of those that contain them."""
    for kind in TEXT:
        yield pa.array(WORDS, kind), pa.string()
        yield dictionary(WORDS, kind), pa.string()
        yield pa.array([["a", None], None, [], ["b"]], pa.list_(kind)), pa.list_(pa.string())
        yield pa.array([["a", "b"], None, ["c", None]], pa.list_(kind, 2)), pa.list_(pa.string(), 2)
        rows = [{"a": "x", "b": ["y"]}, None, {"a": None, "b": None}]
        nested = pa.struct([("a", kind), ("b", pa.list_view(kind))])
        yield pa.array(rows, nested), pa.struct([("a", pa.string()), ("b", pa.list_(pa.string()))])
    for kind in BYTES:
        yield pa.array([b"a", None, b"\xff"], kind), pa.binary()
    yield pa.array([b"ab", None], pa.binary(2)), pa.binary()
    for make in LISTS:
        yield pa.array([[1.0, 2.0], None, [], [3.0]], make(pa.float32())), pa.list_(pa.float32())
        yield pa.array([[[1], None], None, [[2, 3]]], make(make(pa.int8()))), pa.list_(pa.list_(pa.int8()))
    for kind in DECIMALS:
        yield pa.array([Decimal(7), None, Decimal(-12)], kind), pa.float64() if kind.scale else pa.int64()
    yield pa.array([Decimal(10**30), None], pa.decimal128(38, 0)), pa.decimal128(38, 0)
    yield dictionary([3, 1, None, 3], pa.int64()), pa.int64()
    yield pc.run_end_encode(pa.array([1, 1, None, 2])), pa.int64()
    yield pc.run_end_encode(pa.array(["a", "a", "b"])), pa.string()
    yield pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", None])), pa.string()


ODD = list(odd_columns())


@pytest.mark.parametrize(("array", "kind"), ODD, ids=[str(array.type) for array, _ in ODD])
def test_plain_types_hold_the_same_values(array, kind):
    for column in (array, array.slice(1), array.slice(0, 0), pa.chunked_array([array.slice(0, 1), array.slice(1)])):
        found = plain(pa.table({"x": column}))["x"]
        found.validate(full=True)
        assert found.type == kind and found.to_pylist() == column.to_pylist()
    assert plain_type(kind) == kind


NUMBERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]


@pytest.mark.parametrize("kind", [*NUMBERS, *FLOATS, *DECIMALS, pa.decimal128(38, 0), pa.decimal256(50, 10)])
def test_every_type_of_number_as_floats(kind):
    number = Decimal if pa.types.is_decimal(kind) else float if pa.types.is_floating(kind) else int
    column = pa.chunked_array([pa.array([number(3), None, number(100)], kind)])
    np.testing.assert_array_equal(float_values(column), [3, np.nan, 100])


@pytest.mark.parametrize("kind", [pa.decimal64(12, 5), pa.decimal128(20, 5), pa.decimal256(50, 5)])
def test_decimals_are_the_nearest_floats(kind):
    values = [Decimal(number) / 100000 for number in np.random.default_rng(0).integers(0, 10**9, 200).tolist()]
    assert plain(pa.table({"x": pa.array(values, kind)}))["x"].to_pylist() == [float(value) for value in values]


def test_types_that_are_plain_are_not_touched():
    table = pa.table({"a": ["x"], "b": [1], "c": pa.array([0.5], pa.float16()), "d": dictionary(["x"], pa.string())})
    assert plain(table, leave=("d",)) is table

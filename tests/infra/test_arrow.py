"""Arrow columns to NumPy, against `to_pylist`."""

import numpy as np
import pyarrow as pa
import pytest

from winnow.infra.io.arrow import as_matrix, float_values, int_values, mask_array, null_mask, number_array

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

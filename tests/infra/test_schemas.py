"""Columns that differ in type between shards: one type for all, decided in one place."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.drawing import write_pool
from tests.field.helpers import index
from winnow.infra.errors import WinnowError
from winnow.infra.io.schemas import concat_columns
from winnow.infra.pool.pool import Pool
from winnow.pretrain.data.samples import Samples


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.array([1], pa.int8()), pa.array([300], pa.int16()), [1, 300]),
        (pa.array([1]), pa.array([0.5]), [1.0, 0.5]),
        (pa.array([0.5], pa.float16()), pa.array([0.1], pa.float64()), [0.5, 0.1]),
        (pa.array(["x"], pa.string_view()), pa.array(["y"], pa.large_string()), ["x", "y"]),
        (pa.array(["x"]), pa.array(["y"]).dictionary_encode(), ["x", "y"]),
        (pa.nulls(1), pa.array(["y"], pa.large_string()), [None, "y"]),
        (pa.array([Decimal("1.5")], pa.decimal128(9, 2)), pa.array([2]), [1.5, 2.0]),
        (pa.array([[1.0]], pa.list_view(pa.float64())), pa.array([[2.0]], pa.list_(pa.float32(), 1)), [[1.0], [2.0]]),
    ],
)
def test_columns_typed_differently_get_one_type(first, second, both):
    for one, two, expected in ((first, second, both), (second, first, both[::-1])):
        tables = [pa.table({"x": one}), pa.table({"x": two}), pa.table({"y": [1]})]
        assert concat_columns(tables, "abc")["x"].to_pylist() == [*expected, None]


UNLIKE = [
    (pa.array([2**60 + 1]), pa.array([0.5])),
    (pa.array([[1]]), pa.array(["a"])),
    (pa.array([True]), pa.array([2])),
    (pa.array(["1"]), pa.array([2])),
]


@pytest.mark.parametrize(("first", "second"), UNLIKE)
def test_columns_without_a_common_type_are_refused(first, second):
    with pytest.raises(WinnowError, match=r'"x".*one type in all shards'):
        concat_columns([pa.table({"x": first}), pa.table({"x": second})], ["first", "second"])


@pytest.mark.parametrize("kinds", [(pa.int64(), pa.float32()), (pa.float32(), pa.float64()), (pa.int8(), pa.int64())])
def test_a_pool_of_shards_that_differ(tmp_path, kinds):
    """Read as one column, and by a training."""
    write_pool(tmp_path / "shards", 2, 2)
    for number, kind in enumerate(kinds):
        path = tmp_path / "shards" / f"{number:05d}.parquet"
        table = pq.read_table(path)
        values = pa.array([2 * number, 2 * number + 1]).cast(kind)
        pq.write_table(table.append_column("weight", values).append_column("label", values), path)
    index(tmp_path / "shards", tmp_path / "pool", 0)
    pool = Pool.open(str(tmp_path / "pool"))
    assert pool.column("weight").to_pylist() == [0, 1, 2, 3]
    samples = Samples(str(tmp_path / "pool"), columns=["weight"])
    found = samples.read(np.arange(4))
    assert [item.columns["weight"] for item in found] == [0, 1, 2, 3]
    assert [item.label for item in found] == [0, 1, 2, 3]

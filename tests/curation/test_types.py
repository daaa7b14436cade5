"""Filters over every type of string and number: in a folder of metadata, in an indexed pool, and in memory."""

from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import winnow
from tests.drawing import sample, uid_of, write_tar
from tests.field.helpers import index
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import plain_type
from winnow.infra.pool.pool import Pool

N = 6
TREE = winnow.parse_filters(
    {
        "all": [
            {"clip_score": {"model": "l14", "threshold": 0.25}},
            {"basic": {"language": None, "min_side": 100}},
            {"exact_duplicates": {"by": "text"}},
        ]
    }
)
KEPT = [False, False, True, True, False, False]
BASE = {
    "uid": [uid_of(i) for i in range(N)],
    "key": [f"{i:09d}" for i in range(N)],
    "text": [sample(i)["row"]["text"] if i < 5 else sample(3)["row"]["text"] for i in range(N)],
    "original_width": [200, 200, 200, 200, 50, 200],
    "original_height": [150] * N,
    "clip_l14_similarity_score": [0.0, 0.125, 0.25, 0.375, 0.5, 0.625],
}
MEASURED = pa.table({"caption.words": [5] * N, "caption.characters": [30] * N})

STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
STRINGS += [pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string())]
FLOATS = [pa.float16(), pa.float32(), pa.float64(), pa.decimal64(10, 5), pa.decimal128(38, 18), pa.decimal256(60, 20)]
WHOLE = [pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.decimal32(9, 0)]
WHOLE += [pa.decimal128(38, 0), *FLOATS, pa.string()]
CASES = [(name, kind) for name in ("uid", "key", "text") for kind in STRINGS]
CASES += [("uid", pa.binary(16))]
CASES += [("clip_l14_similarity_score", kind) for kind in (*FLOATS, pa.dictionary(pa.int8(), pa.float32()))]
CASES += [("original_width", kind) for kind in WHOLE]


def column(values, kind):
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([bytes.fromhex(value) for value in values], kind)
    if pa.types.is_decimal(kind):
        return pa.array([Decimal(str(value)) for value in values], kind)
    if pa.types.is_string(kind) and isinstance(values[0], int):
        return pa.array([str(value) for value in values])
    return pa.array(values, kind)


def measured(table):
    for name in MEASURED.column_names:
        table = table.append_column(name, MEASURED[name])
    return table


def check(table):
    assert winnow.fit(TREE, measured(table)).mask(measured(table)).tolist() == KEPT
    assert table["text"].to_pylist() == BASE["text"] and table["uid"].to_pylist() == BASE["uid"]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_types_of_columns(tmp_path, name, kind):
    table = pa.table(BASE | {name: column(BASE[name], kind)})
    (tmp_path / "metadata").mkdir()
    pq.write_table(table, tmp_path / "metadata" / "0.parquet")
    found = Pool.open(str(tmp_path / "metadata")).shards[0]
    check(found.table())
    assert found.uids()["f1"].tolist() == list(range(N))

    samples = [sample(i) for i in range(N)]
    for item in samples:
        item["members"] = {"jpg": item["members"]["jpg"]}
    write_tar(tmp_path / "shards" / "0.tar", samples)
    pq.write_table(table, tmp_path / "shards" / "0.parquet")
    index(tmp_path / "shards", tmp_path / "pool", 0)
    check(Pool.open(str(tmp_path / "pool")).shards[0].table())

    if not pa.types.is_binary(plain_type(kind)):  # bytes are text by what Winnow knows of a pool's columns
        check(table)


def test_numbers_that_are_words_are_named():
    table = measured(pa.table(BASE | {"original_width": ["wide"] * N}))
    with pytest.raises(WinnowError, match=r"a column of numbers has text.*wide"):
        winnow.fit(TREE, table).mask(table)


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_captions_of_metadata_that_are_not_utf8_are_missing(tmp_path, kind):
    octets = pa.array([b"\xff" if i == 2 else text.encode() for i, text in enumerate(BASE["text"])]).view(kind)
    pq.write_table(pa.table(BASE | {"text": octets}), tmp_path / "0.parquet")
    found = measured(Pool.open(str(tmp_path)).shards[0].table())
    assert found["text"].to_pylist() == [None if i == 2 else text for i, text in enumerate(BASE["text"])]
    assert winnow.fit(TREE, found).mask(found).tolist() == [False, False, False, True, False, False]

"""Reports about parquet files; tests/field/README.md names them."""

import datetime
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.drawing import sample, uid_of, write_pool, write_tar
from tests.field.helpers import curate, index, read_shards, winnow, write_metadata

N = 6
SAMPLES = [sample(i) for i in range(N)]


def rows():
    return pa.Table.from_pylist([item["row"] for item in SAMPLES])


def change(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def write_shard(folder, table, **options):
    write_tar(folder / "00000.tar", SAMPLES)
    pq.write_table(table, folder / "00000.parquet", **options)
    return folder


def indexed(folder, table, **options):
    """The pool's rows, by uid, as its parquet has them, and the manifest."""
    manifest = index(write_shard(folder / "shards", table, **options), folder / "pool")
    found = {row["uid"]: row for row in pq.read_table(folder / "pool" / "00000.parquet").to_pylist()}
    return found, manifest


def check_whole(found, manifest):
    assert manifest["skipped"]["count"] == 0
    for item in SAMPLES:
        row = found[item["row"]["uid"]]
        assert row["text"] == item["row"]["text"]
        assert (row["original_width"], row["original_height"]) == (
            item["row"]["original_width"],
            item["row"]["original_height"],
        )


STRINGS = {
    "large_string": lambda table: pa.table(
        {
            name: table[name].cast(pa.large_string()) if pa.types.is_string(table[name].type) else table[name]
            for name in table.column_names
        }
    ),
    "dictionary": lambda table: change(table, "text", table["text"].dictionary_encode()),
}


@pytest.mark.parametrize("kind", STRINGS)
def test_text_in_other_types_of_string(tmp_path, kind):
    check_whole(*indexed(tmp_path, STRINGS[kind](rows())))


@pytest.mark.parametrize("kind", [pa.int16(), pa.uint64(), pa.int64(), pa.float64()])
def test_sizes_in_other_types_of_number(tmp_path, kind):
    table = rows()
    for name in ("original_width", "original_height"):
        table = change(table, name, table[name].cast(kind))
    check_whole(*indexed(tmp_path, table))


def test_sizes_of_which_one_is_missing(tmp_path):
    """pandas makes a column of floats of them; the image's own size stands in."""
    frame = rows().to_pandas()
    frame.loc[0, "original_width"] = None
    found, manifest = indexed(tmp_path, pa.Table.from_pandas(frame.convert_dtypes(dtype_backend="numpy_nullable")))
    assert manifest["skipped"]["count"] == 0
    assert found[uid_of(0)]["original_width"] == 24
    assert found[uid_of(1)]["original_width"] == 241


def test_whole_numbers_with_gaps_stay_whole(tmp_path):
    labels = pd.array([None, 1, 2, 3, 4, 2**53 + 1], dtype="Int64")
    found, _ = indexed(tmp_path, rows().append_column("cluster", pa.array(labels)))
    assert [found[uid_of(i)]["cluster"] for i in range(N)] == [None, 1, 2, 3, 4, 2**53 + 1]


def test_numbers_beyond_63_bits(tmp_path):
    hashes = [12120467241726599441 + i for i in range(N)]
    indexed(tmp_path, rows().append_column("hash", pa.array(hashes, pa.uint64())))
    assert winnow("reshard", tmp_path / "pool", "--out", tmp_path / "again", "--executor", "serial")[0] == 0
    assert pq.read_table(tmp_path / "again" / "00000.parquet")["hash"].to_pylist() == hashes


def test_nested_columns_and_booleans(tmp_path):
    extra = {"boxes": [[1, 2], []] * 3, "meta": [{"a": {"b": [i]}, "c": None} for i in range(N)]}
    extra["nsfw"] = [True, None, False] * 2
    table = rows()
    for name, values in extra.items():
        table = table.append_column(name, pa.array(values))
    found, manifest = indexed(tmp_path, table)
    check_whole(found, manifest)
    for name, values in extra.items():
        assert [found[uid_of(i)][name] for i in range(N)] == values


def test_a_missing_caption_is_null_and_not_nan(tmp_path):
    table = rows()
    frame = table.to_pandas()
    frame["text"] = frame["text"].astype(object)
    frame.loc[1, "text"] = None
    found, manifest = indexed(tmp_path, pa.Table.from_pandas(frame))
    check_whole(found, manifest)  # the tar has the caption


@pytest.mark.parametrize(
    "options",
    [
        {"row_group_size": 1},
        {"write_statistics": False, "compression": "brotli", "version": "1.0"},
        {"data_page_version": "2.0", "use_dictionary": False, "compression": "lz4"},
        {"use_deprecated_int96_timestamps": True},
    ],
    ids=["a row a group", "no statistics", "pages of version 2", "int96"],
)
def test_files_as_other_writers_write_them(tmp_path, options):
    when = [datetime.datetime(2020, 1, 1)] * N
    found, manifest = indexed(tmp_path, rows().append_column("time", pa.array(when, pa.timestamp("ns"))), **options)
    check_whole(found, manifest)


def test_empty_row_groups(tmp_path):
    shards, table = write_shard(tmp_path / "shards", rows()), rows()
    with pq.ParquetWriter(shards / "00000.parquet", table.schema) as writer:
        for low, high in ((0, 0), (0, 3), (3, 3), (3, N)):
            writer.write_table(table.slice(low, high - low))
    assert pq.ParquetFile(shards / "00000.parquet").metadata.num_row_groups == 4
    manifest = index(shards, tmp_path / "pool", budget=0)
    assert manifest["items"] == N and not manifest["skipped"]["count"]


def test_rows_in_another_order_and_with_an_index_of_pandas(tmp_path):
    frame = rows().to_pandas().sample(frac=1, random_state=3)
    check_whole(*indexed(tmp_path, pa.Table.from_pandas(frame, preserve_index=True)))


@pytest.mark.parametrize(("low", "high", "skipped"), [(0, 4, 2), (2, 6, 2)])
def test_rows_that_are_missing_cost_their_samples(tmp_path, low, high, skipped):
    found, manifest = indexed(tmp_path, rows().slice(low, high - low))
    assert sorted(found) == sorted(uid_of(i) for i in range(low, high))
    assert manifest["skipped"]["count"] == skipped


def test_rows_without_a_sample_are_counted(tmp_path):
    more = pa.Table.from_pylist([sample(i)["row"] for i in range(100, 103)])
    found, manifest = indexed(tmp_path, pa.concat_tables([rows(), more]))
    assert len(found) == N
    assert manifest["skipped"]["count"] == 3


@pytest.mark.parametrize("damage", ["empty", "no parquet", "cut"])
def test_a_parquet_that_cannot_be_read_is_reported(tmp_path, damage):
    path = write_shard(tmp_path / "shards", rows()) / "00000.parquet"
    path.write_bytes({"empty": b"", "no parquet": b"<html>", "cut": path.read_bytes()[:-20]}[damage])
    write_tar(tmp_path / "shards" / "00001.tar", [sample(99)])
    assert index(tmp_path / "shards", tmp_path / "pool")["skipped"]["reasons"] == {"unreadable parquet": N}
    args = ("index", tmp_path / "shards", "--out", tmp_path / "strict", "--executor", "serial", "--max-skipped", 0)
    status, printed = winnow(*args)
    assert status == 1 and "parquet" in printed


def test_a_column_of_one_shard_only_is_null_in_the_others(tmp_path):
    shards = write_pool(tmp_path / "shards", 2, 3)
    path = shards / "00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("score", pa.array([0.5] * 3)), path)
    index(shards, tmp_path / "pool", budget=0)
    status, printed = winnow("reshard", tmp_path / "pool", "--out", tmp_path / "again", "--executor", "serial")
    assert status == 0, printed
    assert pq.read_table(tmp_path / "again" / "00000.parquet")["score"].to_pylist() == [None] * 3 + [0.5] * 3
    assert len(read_shards(tmp_path / "again")) == 6


TREE = {"clip_score": {"model": "l14", "threshold": 0.5}}


def test_metadata_files_of_which_one_has_only_a_header(tmp_path):
    for name, scores, first in (("0", [0.4, 0.6], 0), ("1", [], 2), ("2", [0.7], 2)):
        write_metadata(tmp_path / "pool", name, scores, first)
    status, printed, subset = curate(tmp_path / "pool", TREE, tmp_path)
    assert status == 0, printed
    assert len(subset) == 2
    tree = {"semdedup": {"clusters": 2, "column": "l14_img", "epsilon": 0.01}}
    assert curate(tmp_path / "pool", tree, tmp_path / "more")[0] == 0


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_metadata_file_that_is_not_whole_ends_the_run_by_name(tmp_path, content):
    write_metadata(tmp_path / "pool", "0", [0.4, 0.6])
    (tmp_path / "pool" / "tmp_1.parquet").write_bytes(content)
    status, printed, _ = curate(tmp_path / "pool", TREE, tmp_path)
    assert status == 1 and "tmp_1.parquet" in printed


def test_a_marker_beside_metadata_is_no_metadata(tmp_path):
    write_metadata(tmp_path / "pool", "0", [0.4, 0.6])
    (tmp_path / "pool" / "_SUCCESS").write_bytes(b"")
    assert len(curate(tmp_path / "pool", TREE, tmp_path)[2]) == 1


def test_metadata_files_with_other_types_and_orders_of_columns(tmp_path):
    write_metadata(tmp_path / "pool", "0", [0.4, 0.6])
    table = write_metadata(tmp_path / "pool", "1", [0.3, 0.75], first=2)
    table = change(table, "uid", table["uid"].cast(pa.large_string()))
    table = change(table, "original_width", table["original_width"].cast(pa.int16()))
    table = change(table, "clip_l14_similarity_score", table["clip_l14_similarity_score"].cast(pa.float64()))
    pq.write_table(table.select(table.column_names[::-1]), tmp_path / "pool" / "1.parquet")
    tree = {"all": [{"basic": {}}, TREE]}
    status, printed, subset = curate(tmp_path / "pool", tree, tmp_path)
    assert status == 0, printed
    assert subset["f1"].tolist() == np.sort([int(uid_of(i)[16:], 16) for i in (1, 3)]).tolist()


def test_features_of_another_length_than_their_metadata_are_refused(tmp_path):
    write_metadata(tmp_path / "pool", "0", [0.4, 0.6, 0.7])
    np.savez(tmp_path / "pool" / "0.npz", l14_img=np.ones((2, 8), np.float16))
    tree = {"semdedup": {"clusters": 2, "column": "l14_img", "epsilon": 0.01}}
    status, printed, _ = curate(tmp_path / "pool", tree, tmp_path)
    assert status == 1 and "2 rows" in printed


@pytest.mark.parametrize("rule", [{"threshold": 0.0}, {"fraction": 0.5}, {"keep": 9}])
def test_a_score_that_is_nan_never_passes(tmp_path, rule):
    scores = [float("nan")] * 4 + [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    write_metadata(tmp_path / "pool", "0", scores)
    _, _, subset = curate(tmp_path / "pool", {"clip_score": {"model": "l14"} | rule}, tmp_path)
    assert set(subset["f1"].tolist()) <= set(range(4, 10)) and len(subset)


def test_as_many_clusters_as_samples_and_more(tmp_path):
    write_metadata(tmp_path / "pool", "0", [0.5] * 6)
    tree = {"semdedup": {"clusters": 6, "column": "l14_img", "epsilon": 1e-6}}
    assert len(curate(tmp_path / "pool", tree, tmp_path / "as many")[2]) == 6
    tree = {"semdedup": {"clusters": 7, "column": "l14_img", "epsilon": 1e-6}}
    status, printed, _ = curate(tmp_path / "pool", tree, tmp_path / "more")
    assert status == 1 and "6 samples" in printed and "7 clusters" in printed


def test_of_equal_embeddings_exactly_one_is_kept(tmp_path):
    """Also with more clusters than there are different vectors."""
    write_metadata(tmp_path / "pool", "0", [0.5] * 20)
    same = np.repeat(np.eye(8, dtype=np.float16)[:1], 20, 0)
    same[10:] = np.eye(8, dtype=np.float16)[1]
    np.savez(tmp_path / "pool" / "0.npz", l14_img=same)
    tree = {"semdedup": {"clusters": 4, "column": "l14_img", "epsilon": 0.1}}
    status, printed, subset = curate(tmp_path / "pool", tree, tmp_path)
    assert status == 0, printed
    assert sorted(int(number >= 10) for number in subset["f1"]) == [0, 1]


def test_a_copied_folder_gives_the_same_subset(tmp_path):
    """The order of rows and the names of files decide nothing but the order."""
    for name, scores, first in (("0", [0.4, 0.6, 0.55], 0), ("1", [0.1, 0.7], 3)):
        write_metadata(tmp_path / "pool", name, scores, first)
    before = curate(tmp_path / "pool", TREE, tmp_path / "a")[2]
    (tmp_path / "copy").mkdir()
    for old, new in (("0", "z"), ("1", "b")):
        for ext in ("parquet", "npz"):
            shutil.copy(tmp_path / "pool" / f"{old}.{ext}", tmp_path / "copy" / f"{new}.{ext}")
    assert curate(tmp_path / "copy", TREE, tmp_path / "b")[2].tolist() == before.tolist()

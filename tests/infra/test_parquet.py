"""Reading parquet files, and the errors for those that cannot be read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_imports import ROOT
from winnow.infra.errors import WinnowError
from winnow.infra.io import parquet
from winnow.infra.io.parquet import read_parquet


def test_the_whole_file_and_some_columns(tmp_path):
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    assert read_parquet(str(tmp_path / "t.parquet")) == table
    assert read_parquet(str(tmp_path / "t.parquet"), ["b"]) == table.select(["b"])


@pytest.mark.parametrize("cut", [3, 60, None])
def test_files_that_are_not_parquet(tmp_path, cut):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut] if cut else b"")
    with pytest.raises(WinnowError, match=r"t\.parquet: is not a readable parquet file"):
        read_parquet(str(path))
    with pytest.raises(WinnowError, match="no such file"):
        read_parquet(str(tmp_path / "none.parquet"))


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 9\n")
    with pytest.raises(WinnowError, match=r"t\.parquet: is a Git LFS pointer.*git lfs pull"):
        read_parquet(str(tmp_path / "t.parquet"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array([1]), pa.array([2]), pa.array(["x"])]
    pq.write_table(pa.Table.from_arrays(columns, ["score", "score", "text"]), tmp_path / "t.parquet")
    for names in (None, ["text"], ["score"]):
        with pytest.raises(WinnowError, match=r't\.parquet: has 2 columns called "score"'):
            read_parquet(str(tmp_path / "t.parquet"), names)


def test_a_small_file_that_unpacks_to_more_than_fits_is_not_read(tmp_path, monkeypatch):
    assert parquet.MAX_BYTES <= 4 << 30
    monkeypatch.setattr(parquet, "MAX_BYTES", 8 << 20)
    table = pa.table({"text": ["x" * (4 << 20)] * 3})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 16
    with pytest.raises(WinnowError, match=r"t\.parquet: unpacks to 12,58\d,\d+ bytes"):
        read_parquet(str(tmp_path / "t.parquet"))


def test_no_room_uses_pyarrows_scanner():
    """Its threads outlive the call and abort an interpreter that ends before them."""
    rooms = ("infra", "pretrain", "curation", "evaluate", "pipeline")
    assert not [path for room in rooms for path in (ROOT / room).rglob("*.py") if "pq.read_table(" in path.read_text()]

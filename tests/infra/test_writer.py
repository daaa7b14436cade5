"""PoolWriter against plain reading of what it wrote."""

import hashlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.pool.pool import Shard
from winnow.infra.pool.views import LOCATION, located, with_source
from winnow.infra.pool.writer import PoolWriter, view_digest

SAMPLES = {"a": {"png": b"image", "txt": b"text", "json": b"{}", "npy": b"array"}, "b": {"wav": b"sound", "cls": b"7"}}


def test_what_is_written_is_found_by_its_locations(tmp_path):
    writer = PoolWriter(str(tmp_path), "00000", [["pool0/0.tar", "digest"]])
    with writer.tar(".new") as tar:
        rows = [tar.add(key, members) for key, members in SAMPLES.items()]
    table = located(pa.table({"uid": ["1", "2"], "key": list(SAMPLES)}), rows)
    output = writer.view(table, extra=3)
    assert output.files == ["00000.parquet", "00000.new.tar"] and output.items == 2 and output.values["extra"] == 3
    digest = hashlib.sha256((tmp_path / "00000.new.tar").read_bytes()).hexdigest()
    assert output.values["tars"] == [["pool0/0.tar", "digest"], ["./00000.new.tar", digest]]
    assert hashlib.sha256((tmp_path / "00000.parquet").read_bytes()).hexdigest() == view_digest(table)
    with tarfile.open(tmp_path / "00000.new.tar") as tar:
        names = [f"{key}.{ext}" for key, members in SAMPLES.items() for ext in members]
        assert tar.getnames() == names
    shard = Shard("00000", str(tmp_path / "00000.parquet"), ("", str(tmp_path / "00000.new.tar")), 2, "")
    for ext in ("png", "txt", "json", "npy", "wav", "cls"):
        assert shard.member_bytes(shard.table(), ext) == [members.get(ext, b"") for members in SAMPLES.values()]
    assert set(pq.read_schema(tmp_path / "00000.parquet").names) == {"uid", "key", *LOCATION.names}


def test_the_source_is_filled_in_where_it_is_missing():
    assert with_source(pa.table({"uid": ["1", "2"]}), "x")["source"].to_pylist() == ["x", "x"]
    filled = with_source(pa.table({"source": ["a", None], "uid": ["1", "2"]}), "x")
    assert filled.column_names == ["source", "uid"] and filled["source"].to_pylist() == ["a", "x"]

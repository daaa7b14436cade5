"""Joining tars with their parquets: what is taken from which, and what is skipped."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.drawing import sample, uid_of, write_parquet, write_pool, write_tar
from tests.infra.test_index import index, reasons
from winnow.infra.errors import WinnowError
from winnow.infra.pool.pool import Pool


def test_columns_of_the_parquet_are_kept(tmp_path):
    samples = [sample(i) for i in range(3)]
    for i, item in enumerate(samples):
        item["row"] |= {
            "clip_b32_similarity_score": 0.1 * i,
            "status": "success",
            "url": f"https://example.com/{i}.jpg",
        }
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    failed = {"row": samples[0]["row"] | {"key": "000000009", "uid": uid_of(9), "status": "failed_to_download"}}
    write_parquet(tmp_path / "shards" / "00000.parquet", [*samples, failed])
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert manifest.skipped["count"] == 0  # img2dataset lists failed downloads; they are not a disagreement
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["clip_b32_similarity_score"].to_pylist() == pytest.approx([0.0, 0.1, 0.2])
    assert table["original_width"].to_pylist() == [240, 241, 242]
    assert table["url"].to_pylist() == [f"https://example.com/{i}.jpg" for i in range(3)]
    assert "status" not in table.column_names


def test_parquet_that_disagrees_with_its_tar(tmp_path):
    samples = [sample(i) for i in range(6)]
    write_tar(tmp_path / "shards" / "00000.tar", samples[:5])
    rows = [samples[0], samples[2], samples[3], samples[4], samples[5]]  # 1 is missing, 5 is too many
    rows[1]["row"]["uid"] = uid_of(77)
    rows[2]["row"]["text"] = "something else"
    write_parquet(tmp_path / "shards" / "00000.parquet", rows)
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {
        "in the tar but not in the parquet": 1,
        "in the parquet but not in the tar (by key)": 1,
        "uid differs between tar and parquet": 1,
        "caption differs between tar and parquet": 1,
    }
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["uid"].to_pylist() == [uid_of(0), uid_of(4)]


def test_parquet_joined_by_uid_and_by_order(tmp_path):
    samples = [sample(i) for i in range(4)]
    write_tar(tmp_path / "uid" / "00000.tar", samples)
    table = pa.Table.from_pylist([item["row"] for item in reversed(samples)]).drop_columns(["key"])
    table = table.append_column("mark", pa.array([3, 2, 1, 0]))
    pq.write_table(table, tmp_path / "uid" / "00000.parquet")
    index(tmp_path / "uid", tmp_path / "pool")
    assert Pool.open(str(tmp_path / "pool")).shards[0].table()["mark"].to_pylist() == [0, 1, 2, 3]

    for item in samples:
        item["members"]["json"] = b"{}"
    write_tar(tmp_path / "order" / "00000.tar", samples)
    pq.write_table(table.take(pa.array([3, 2, 1, 0])), tmp_path / "order" / "00000.parquet")
    index(tmp_path / "order", tmp_path / "pool2")
    assert Pool.open(str(tmp_path / "pool2")).shards[0].table()["uid"].to_pylist() == [uid_of(i) for i in range(4)]


def test_unreadable_parquet_costs_the_samples_of_its_shard(tmp_path):
    write_pool(tmp_path / "shards", shards=2, per_shard=3)
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"PAR1 nonsense")
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"unreadable parquet": 3}
    assert [shard.rows for shard in Pool.open(str(tmp_path / "pool")).shards] == [0, 3]


@pytest.mark.parametrize("column", ["url", "sha256"])
def test_parquet_joined_by_url_or_sha256(tmp_path, column):
    samples = [sample(i) for i in range(3)]
    for i, item in enumerate(samples):
        item["members"]["json"] = json.dumps({column: f"value {i}"}).encode()
    write_tar(tmp_path / "shards" / "0.tar", samples)
    rows = [{"uid": uid_of(i), column: f"value {i}", "mark": i} for i in (2, 0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "0.parquet")
    manifest = index(tmp_path / "shards", tmp_path / "pool")
    assert reasons(manifest) == {"in the tar but not in the parquet": 1}
    table = Pool.open(str(tmp_path / "pool")).shards[0].table()
    assert table["mark"].to_pylist() == [0, 2] and table["uid"].to_pylist() == [uid_of(0), uid_of(2)]


def test_rows_are_never_joined_by_order_alone(tmp_path):
    samples = [sample(i) for i in range(3)]
    for item in samples:
        item["members"]["json"] = b"{}"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    pq.write_table(pa.table({"mark": [0, 1, 2]}), tmp_path / "shards" / "0.parquet")
    with pytest.raises(WinnowError, match=r"no column to join them by.*key, uid, url or sha256"):
        index(tmp_path / "shards", tmp_path / "pool")

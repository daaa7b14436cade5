"""Finding shards and naming sources."""

import pytest

from tests.drawing import write_pool
from winnow.infra.errors import UsageError
from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.layouts import ShardFiles, find_shards, shard_files, source_names


def test_no_shards(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        IndexStage((str(tmp_path / "nowhere"),), str(tmp_path / "pool")).plan()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.tar shard"):
        IndexStage((str(tmp_path / "empty"),), str(tmp_path / "pool")).plan()


def test_tars_and_their_parquets(tmp_path):
    write_pool(tmp_path, shards=2, per_shard=1)
    (tmp_path / "00001.parquet").unlink()
    url = str(tmp_path)
    assert shard_files(url) == [
        ShardFiles("00000", f"{url}/00000.tar", f"{url}/00000.parquet"),
        ShardFiles("00001", f"{url}/00001.tar"),
    ]
    assert shard_files(f"{url}/00000.tar") == shard_files(url)[:1]


def test_a_pipe_is_one_shard():
    assert shard_files("pipe:cat a.tar b/00007.tar | tee /dev/null") == [
        ShardFiles("00007", "pipe:cat a.tar b/00007.tar | tee /dev/null", stream=True)
    ]
    assert find_shards("pipe:make-shard")[0].startswith("pipe-")


def test_sources_are_named_by_as_many_parts_as_tell_them_apart():
    assert source_names(["/data/pool", "s3://bucket/laion/"]) == ["pool", "laion"]
    assert source_names(["/x/a/shards", "/x/b/shards"]) == ["a/shards", "b/shards"]
    assert source_names(["/x/a", "/x/a"]) == ["/x/a".strip("/")] * 2
    assert source_names(["https://host/dir/00001.tar", "pipe:cat 00002.tar"]) == ["00001", "00002"]

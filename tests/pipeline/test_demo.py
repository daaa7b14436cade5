"""The drawn demo data: layouts, disjoint sets, the same bytes twice."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from winnow.infra.pool.index import IndexStage
from winnow.infra.pool.pool import Pool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pipeline.demo.stage import CLASSIFICATION, DemoConfig, DemoStage

TINY = DemoConfig(pool=50, trusted=30, target=20, test=24, train=12, shard_size=20, seed=5)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, execute(DemoStage(TINY, str(out)), SerialExecutor())


def test_files_and_counts(demo):
    out, manifest = demo
    assert sorted(path.name for path in (out / "pool").iterdir()) == sorted(
        f"{i:05d}.{ext}" for i in range(3) for ext in ("tar", "parquet")
    )
    counts = {"pool": 50, "trusted": 30, "target": 20, "eval/demo-retrieval-test": 24}
    counts |= {f"eval/{task}-{split}": n for task in CLASSIFICATION for split, n in (("test", 24), ("train", 12))}
    assert manifest.values["samples"] == counts and manifest.items == sum(counts.values())


@pytest.mark.parametrize("part", ["pool", "trusted", "target"])
def test_shards_agree_with_their_parquet(demo, part):
    out, _ = demo
    for path in sorted((out / part).glob("*.tar")):
        files = members(path)
        rows = pq.read_table(path.with_suffix(".parquet")).to_pylist()
        assert list(files) == [f"{row['key']}.{ext}" for row in rows for ext in ("jpg", "txt", "json")]
        for row in rows:
            image = files[f"{row['key']}.jpg"]
            facts = json.loads(files[f"{row['key']}.json"])
            assert facts == {name: value for name, value in row.items() if name != "text"} | {"caption": row["text"]}
            assert files[f"{row['key']}.txt"].decode() == row["text"]
            assert row["sha256"] == hashlib.sha256(image).hexdigest()
            assert Image.open(io.BytesIO(image)).size == (row["width"], row["height"])
            assert min(row["width"], row["height"]) >= 48 and max(row["width"], row["height"]) <= 96


def test_clean_samples_pass_datacomps_basic_filter(tmp_path):
    """More than 2 words and 5 characters, short side at least 200, ratio at most 3: nearly all of them."""
    execute(DemoStage(DemoConfig(pool=300, trusted=1, target=1, test=1, train=1), str(tmp_path)), SerialExecutor())
    rows = pq.read_table(tmp_path / "pool" / "00000.parquet").to_pylist()
    assert all(row["text"].strip() for row in rows)
    assert all(min(row["original_width"], row["original_height"]) >= 200 for row in rows)
    assert all(1 / 3 <= row["original_width"] / row["original_height"] <= 3 for row in rows)
    assert sum(len(row["text"].split()) > 2 and len(row["text"]) > 5 for row in rows) > 0.93 * len(rows)


def test_no_sample_is_in_two_sets(demo):
    out, _ = demo
    uids, images = Counter(), Counter()
    for part in ("pool", "trusted", "target"):
        for path in (out / part).glob("*.parquet"):
            uids.update(pq.read_table(path)["uid"].to_pylist())
    for path in out.rglob("*.tar"):
        images.update(data for name, data in members(path).items() if name.endswith(".jpg"))
    assert set(uids.values()) == {1} and set(images.values()) == {1}
    assert len(uids) == 100 and len(images) == 100 + 24 * 4 + 12 * 3


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_classification_layout(demo, task):
    folder = demo[0] / "eval" / f"wds_{task}_test"
    names = (folder / "classnames.txt").read_text().splitlines()
    assert len(set(names)) == len(names) == len(CLASSIFICATION[task].names) >= 8
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates and all("{c}" in line for line in templates)
    for split, n in (("test", 24), ("train", 12)):
        assert (folder / split / "nshards.txt").read_text().strip() == "1"
        files = members(folder / split / "0.tar")
        labels = [int(data) for name, data in files.items() if name.endswith(".cls")]
        assert len(labels) == n and len(files) == 2 * n
        assert set(labels) == set(range(min(n, len(names))))


def test_retrieval_layout(demo):
    folder = demo[0] / "eval" / "wds_demo-retrieval_test"
    assert (folder / "dataset_type.txt").read_text().strip() == "retrieval"
    files = members(folder / "test" / "0.tar")
    texts = [data.decode() for name, data in files.items() if name.endswith(".txt")]
    assert len(texts) == 24 and all(len(text.split("\n")) == 3 and all(text.split("\n")) for text in texts)
    assert [name.split(".")[1] for name in files] == ["jpg", "txt"] * 24


def test_the_same_bytes_twice(demo, tmp_path):
    _, manifest = demo
    again = execute(DemoStage(TINY, str(tmp_path)), SerialExecutor())
    assert again.files == manifest.files and again.digest == manifest.digest


def test_a_larger_pool_keeps_what_is_drawn(demo, tmp_path):
    _, manifest = demo
    larger = execute(DemoStage(TINY.model_copy(update={"pool": 60}), str(tmp_path)), SerialExecutor())
    assert larger.files["pool/00001.tar"] == manifest.files["pool/00001.tar"]


@pytest.mark.parametrize("part", ["pool", "trusted", "target"])
def test_index_takes_all_of_it(demo, tmp_path, part):
    manifest = execute(IndexStage((str(demo[0] / part),), str(tmp_path)), SerialExecutor())
    assert manifest.skipped["count"] == 0 and manifest.items == getattr(TINY, part)
    pool = Pool.open(str(tmp_path))
    assert min(pool.column("original_width").to_pylist()) >= 200


def test_config_is_checked():
    for wrong in ({"pools": 3}, {"min_side": 90, "max_side": 60}, {"pool": 0}):
        with pytest.raises(ValidationError):
            DemoConfig(**wrong)

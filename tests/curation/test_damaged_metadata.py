"""Folders of metadata of which some files are damaged: the budget decides, in samples."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.field.helpers import curate, winnow, write_metadata
from winnow.curation.algebra.parse import parse
from winnow.curation.curate import CurateStage, MeasuredPool
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import Budget, execute

FILES, ROWS = 40, 3
TREE = {"clip_score": {"model": "l14", "fraction": 0.5}}


@pytest.fixture
def pool(tmp_path):
    """Files of ROWS samples whose scores rise with their number."""
    for file in range(FILES):
        first = file * ROWS
        write_metadata(tmp_path / "pool", f"{file:02d}", [(first + i) / 1000 for i in range(ROWS)], first)
    return tmp_path / "pool"


def rows(uids):
    return sorted(int(uid) for uid in uids["f1"])


def expected(lost):
    """The better half of the samples of the files that are not lost; DataComp keeps the threshold's sample, too."""
    left = [file * ROWS + i for file in range(FILES) if file not in lost for i in range(ROWS)]
    return left[-int(len(left) * 0.5) - 1 :]


@pytest.mark.parametrize("damage", ["empty", "cut", "column"])
@pytest.mark.parametrize("number", [0, 17])
def test_a_damaged_file_costs_its_samples(pool, tmp_path, damage, number):
    path = pool / f"{number:02d}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("clip_l14_similarity_score"), path)
    if damage != "column":
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"")
    status, printed, uids = curate(pool, TREE, tmp_path)
    assert status == 0, printed
    assert rows(uids) == expected([number])
    manifest = json.loads((tmp_path / "subset" / "manifest.json").read_text())
    assert manifest["items"] == (FILES - 1) * ROWS and manifest["skipped"]["count"] == ROWS
    args = ("curate", pool, "--filters", tmp_path / "filters.yaml", "--executor", "serial", "--max-skipped", 0.01)
    for out in (tmp_path / "subset", tmp_path / "strict"):
        status, printed = winnow(*args, "--out", out)
        assert status == 1 and f"{ROWS} of {FILES * ROWS} skipped" in printed and path.name in printed


def test_damaged_features_are_lost_where_they_are_read(pool, tmp_path):
    archive = (pool / "05.npz").read_bytes()
    (pool / "05.npz").write_bytes(archive[: len(archive) // 2])
    (pool / "06.npz").unlink()
    status, _, uids = curate(pool, TREE, tmp_path / "scores")
    assert status == 0 and rows(uids) == expected([])
    tree = {"all": [{"semdedup": {"clusters": 2, "column": "l14_img", "epsilon": 0.0001}}, TREE]}
    status, printed, uids = curate(pool, tree, tmp_path / "features")
    assert status == 0, printed
    assert not set(range(5 * ROWS, 7 * ROWS)) & set(rows(uids)) and len(uids) > 20
    skipped = json.loads((tmp_path / "features" / "subset" / "manifest.json").read_text())["skipped"]
    assert skipped["count"] == 2 * ROWS and all(word in str(skipped["reasons"]) for word in ("05.npz", "06.npz"))


def test_subsets_count_a_lost_file_once_and_forget_it_once_it_is_repaired(pool, tmp_path):
    whole = (pool / "07.parquet").read_bytes()
    subsets = (("a", parse(TREE)), ("b", parse({"clip_score": {"model": "l14", "threshold": 0}})))
    for data, lost in ((whole[:100], [7]), (whole, [])):
        (pool / "07.parquet").write_bytes(data)
        stage = CurateStage(MeasuredPool(str(pool)), subsets, str(tmp_path / "out"))
        manifest = execute(stage, SerialExecutor(), budget=Budget(ROWS))
        assert manifest.skipped["count"] == ROWS * len(lost)
        assert rows(np.load(tmp_path / "out" / "a" / "subset.npy")) == expected(lost)


def test_measures_of_metadata_lose_the_same_samples(pool, tmp_path):
    (pool / "00.parquet").write_bytes(b"")
    status, printed, uids = curate(pool, {"score": {"caption.words": 1, "threshold": 0}}, tmp_path)
    assert status == 0, printed
    assert rows(uids) == list(range(ROWS, FILES * ROWS))
    for path in (next(tmp_path.rglob("columns/manifest.json")), tmp_path / "subset" / "manifest.json"):
        assert json.loads(path.read_text())["skipped"]["count"] == ROWS


def test_a_column_that_no_file_has_is_no_damage(pool, tmp_path):
    status, printed, _ = curate(pool, {"clip_score": {"model": "b32", "threshold": 1}}, tmp_path)
    assert status == 1 and 'no column "clip_b32_similarity_score"' in printed

"""A uid that a pool has twice is in a subset once, and counted."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.drawing import uid_of
from tests.field.helpers import curate, winnow, write_metadata
from winnow.infra.pool.uids import UID_DTYPE, sort_uids, split_repeated


def folder(path):
    """Ten samples in two files; those with the numbers 3 and 4 are in both, and 4 passes in one of them only."""
    write_metadata(path, "0", [0.9, 0.9, 0.9, 0.9, 0.9], first=0)
    write_metadata(path, "1", [0.9, 0.1, 0.9, 0.9, 0.9], first=3)
    return path


TREE = {"clip_score": {"model": "l14", "threshold": 0.5}}


def test_a_uid_of_two_files_is_in_the_subset_once(tmp_path):
    (tmp_path / "f.yaml").write_text(json.dumps(TREE))
    args = ("curate", folder(tmp_path / "pool"), "--filters", tmp_path / "f.yaml", "--out", tmp_path / "out")
    status, printed = winnow(*args, "--executor", "serial", "--max-skipped", 1)
    assert status == 0, printed
    subset = np.load(tmp_path / "out" / "subset.npy")
    assert sorted(subset["f1"].tolist()) == list(range(8))  # the numbers of the samples
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["skipped"]["reasons"] == {"duplicated uid": 1} and manifest["items"] == 9
    assert manifest["skipped"]["samples"][0]["id"] == uid_of(3)
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    assert (funnel["pool"], funnel["kept"], funnel["repeated"]) == (10, 8, 1)


def test_too_many_repeats_end_the_run(tmp_path):
    status, printed, _ = curate(folder(tmp_path / "pool"), TREE, tmp_path)
    assert status == 1 and "duplicated uid: 1" in printed


def test_within_one_file(tmp_path):
    table = write_metadata(tmp_path / "pool", "0", [0.9] * 30)
    (tmp_path / "pool" / "0.npz").unlink()
    uids = table["uid"].to_pylist()
    table = table.set_column(table.column_names.index("uid"), "uid", [[uids[0], *uids[:-1]]])
    pq.write_table(table, tmp_path / "pool" / "0.parquet")
    status, printed, subset = curate(tmp_path / "pool", TREE, tmp_path)
    assert status == 0 and "1 skipped" in printed, printed
    assert len(subset) == len(np.unique(subset)) == 29


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_distinct_and_repeated_uids(n):
    random = np.random.default_rng(n)
    uids = np.empty(n, UID_DTYPE)
    uids["f0"], uids["f1"] = random.integers(0, 20, n), random.integers(0, 20, n)
    distinct, repeated = split_repeated(uids)
    expected, counts = np.unique(uids, return_counts=True)
    assert distinct.tolist() == expected.tolist()
    assert repeated.tolist() == np.repeat(expected, counts - 1).tolist()
    assert sort_uids(expected).tolist() == expected.tolist()

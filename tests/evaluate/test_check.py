"""What `winnow evaluate --check` says of sets that are complete, partial, broken or missing."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.evaluate.sets import open_found, samples_of, write_classification, write_packed_wino, write_retrieval
from winnow.evaluate.check import (
    COMPLETE,
    INCOMPLETE,
    MISSING,
    PARTIAL,
    check_table,
    check_tasks,
)
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.infra.errors import UsageError

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_states(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    write_classification(data, "wds_cifar10_test", names=TEN, n=30)
    write_classification(data, "wds_mnist_test", names=TEN[:6], n=30)
    write_classification(data, "wds_colors_test", n=30)
    write_retrieval(data, "wds_retrieval-flickr_1k_test_image_text_retrieval_test", n=1000)
    root = write_classification(data, "wds_stl10_test", names=TEN, n=30, shards=4)
    (root / "test" / "1.tar").unlink()
    (root / "test" / "3.tar").unlink()
    cut = write_classification(data, "wds_gtsrb_test", names=[f"sign {i}" for i in range(43)], n=30) / "test" / "1.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 - 100])
    write_packed_wino(data / "wds_misc-winogavil_test")
    checks = check_tasks(str(data))
    assert len(checks) == 41 and checks[-1].task.key == "colors"
    rows = {check.task.key: check for check in checks}
    assert (rows["cifar10"].state, rows["cifar10"].samples) == (PARTIAL, 30)
    assert (rows["colors"].state, rows["colors"].samples) == (COMPLETE, 30)
    flickr = rows["retrieval/flickr_1k_test_image_text_retrieval"]
    assert (flickr.state, flickr.samples) == (COMPLETE, 1000)
    assert (rows["stl10"].state, rows["stl10"].note) == (INCOMPLETE, "no test/1.tar, test/3.tar")
    assert rows["mnist"].state == INCOMPLETE and "has 6 class names, MNIST has 10" in rows["mnist"].note
    assert rows["gtsrb"].state == INCOMPLETE and "test/1.tar: truncated tar" in rows["gtsrb"].note
    assert rows["gtsrb"].note.startswith("test/1.tar")  # no absolute path
    assert (rows["misc/winogavil"].state, rows["misc/winogavil"].samples) == (PARTIAL, 14)
    assert rows["food101"].state == MISSING
    table = check_table(checks)
    assert "3 of the 38 scored tasks can be evaluated, 2 of them on part of the test set." in table
    assert len(table.splitlines()) == 2 + 41 + 2


def test_named_tasks(tmp_path: Path) -> None:
    write_classification(tmp_path, "wds_colors_test", n=30)
    checks = check_tasks(str(tmp_path), ("colors", "CIFAR-10"))
    assert [(check.task.key, check.state) for check in checks] == [("cifar10", MISSING), ("colors", COMPLETE)]
    with pytest.raises(UsageError, match=r'unknown task "colours".*"colors"'):
        check_tasks(str(tmp_path), ("colours",))
    with pytest.raises(UsageError, match="no such folder"):
        check_tasks(str(tmp_path / "nothing"))


def test_what_evaluating_would_find_wrong(tmp_path: Path) -> None:
    root = write_classification(tmp_path, "wds_garbled_test", shards=1)
    tar = root / "test" / "0.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        content[archive.getmembers()[4].offset + 10] ^= 255
    tar.write_bytes(content)
    (write_retrieval(tmp_path, "wds_odd_test") / "dataset_type.txt").write_text("retreival")
    (write_classification(tmp_path, "wds_probed_test") / "train").mkdir()
    rows = {check.task.key: check for check in check_tasks(str(tmp_path), ("garbled", "odd", "probed"))}
    assert rows["garbled"].state == INCOMPLETE and "test/0.tar" in rows["garbled"].note
    assert rows["odd"].state == INCOMPLETE and 'evaluates the kind "retreival"' in rows["odd"].note
    assert rows["probed"].state == COMPLETE and rows["probed"].note.startswith("train/nshards.txt: no such file")


@pytest.mark.parametrize("size", [100, 600, 1030, 1200, 2047, 2049, 2300, 2577])
def test_a_tar_truncated_anywhere(tmp_path: Path, size: int) -> None:
    root = write_classification(tmp_path, shards=1)
    tar = root / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:size])
    (check,) = check_tasks(str(tmp_path), "colors")
    assert check.state == INCOMPLETE and "truncated tar" in check.note


def test_counts_what_is_read(real_data: Path) -> None:
    """Of real sets: as many samples as reading them yields."""
    for found in find_tasks(str(real_data / "eval"), ("mnist", "renderedsst2")):
        (check,) = check_tasks(str(real_data / "eval"), found.task.key)
        assert check.samples == sum(1 for _ in samples_of(open_found(found)))
        assert check.state == PARTIAL and datacomp_tasks()[found.task.key].size > check.samples

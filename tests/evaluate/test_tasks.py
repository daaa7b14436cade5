"""The 40 entries, and how a faulty task file is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from winnow.evaluate.protocols import KINDS, PROTOCOLS
from winnow.evaluate.protocols.base import load_kind, load_protocol
from winnow.evaluate.tasks.read import datacomp_tasks, find_task, read_task, read_tasks
from winnow.evaluate.tasks.task import folder_of
from winnow.infra.errors import UsageError, WinnowError

GOOD = "name: A\nkey: a/b\nkind: retrieval\nmetric: mean_recall@1\ngroup: retrieval\nversion: 1\n"


def test_the_forty() -> None:
    tasks = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"}
    assert len(tasks) == 40
    assert sum(task.scored for task in tasks.values()) == 38
    assert {task.name for task in tasks.values() if not task.scored} == {"FairFace", "UTKFace"}
    groups = Counter(task.group for task in tasks.values() if task.scored)
    assert groups == {"imagenet": 1, "shift": 6, "vtab": 13, "retrieval": 3, "other": 15}
    assert len({task.data_folder for task in tasks.values()}) == 40
    assert all(task.metric for task in tasks.values() if task.scored)


def test_main_metrics() -> None:
    """As DataComp's paper (appendix N) and task list name them."""
    other = {
        task.name: task.metric for task in datacomp_tasks().values() if task.metric != "acc1" and task.group != "extra"
    }
    assert other == {
        "Caltech-101": "mean_per_class_recall",
        "FGVC Aircraft": "mean_per_class_recall",
        "Oxford Flowers-102": "mean_per_class_recall",
        "Oxford-IIIT Pet": "mean_per_class_recall",
        "Flickr": "mean_recall@1",
        "MSCOCO": "mean_recall@1",
        "WinoGAViL": "jaccard_score_10-12",
        "iWildCam": "F1-macro_all",
        "FMoW": "acc_worst_region",
        "Dollar Street": "acc_top5_wg",
        "GeoDE": "acc_wg",
        "FairFace": None,
        "UTKFace": None,
    }


def test_chance_is_at_least_one_in_classes() -> None:
    # Always guessing the commonest class is never worse than 1 / classes; mean per-class recall is exactly that.
    for task in datacomp_tasks().values():
        if task.metric == "acc1" and task.classes and task.chance:
            assert task.chance >= 1 / task.classes - 1e-5, task.key
        if task.metric == "mean_per_class_recall":
            assert task.chance == pytest.approx(1 / task.classes, abs=1e-6)


def test_folders() -> None:
    assert folder_of("vtab/caltech101") == "wds_vtab-caltech101_test"
    assert datacomp_tasks()["fairness/geode"].data_folder == "wds_geode_test"
    assert datacomp_tasks()["wilds/fmow"].data_folder == "wds_wilds-fmow_test"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD + "grup: vtab\n", 7, 'unknown key "grup".*Did you mean "group"'),
        (GOOD.replace("version: 1", "version: one"), 6, "version must be a whole number, not 'one'"),
        (GOOD.replace("group: retrieval", "group: vtap"), 5, "group must be one of .*vtap"),
        (GOOD + "name: B\n", 7, '"name" is given twice'),
        (GOOD.replace("kind: retrieval", "kind: retreival"), 3, 'unknown kind "retreival". Did you mean "retrieval"'),
        (GOOD.replace("key: a/b", "key: ../b c"), 2, "key: "),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(WinnowError, match=f"task.yaml, line {line}: {message}"):
        read_task(str(path))


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(GOOD.replace("kind: retrieval", "kind: [retrieval"))
    with pytest.raises(WinnowError, match=r"task\.yaml: is not valid YAML .*line 4"):
        read_task(str(tmp_path / "task.yaml"))


def test_a_grouped_task_needs_groups(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(GOOD.replace("kind: retrieval", "kind: grouped_classification"))
    with pytest.raises(WinnowError, match=r"task\.yaml: a grouped_classification task needs group_by"):
        read_task(str(tmp_path / "task.yaml"))


def test_missing_key_and_duplicate_task(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    assert read_tasks(str(tmp_path))["a/b"].name == "A"
    (tmp_path / "b.yaml").write_text(GOOD)
    with pytest.raises(WinnowError, match=r'b.yaml: another file has the key "a/b"'):
        read_tasks(str(tmp_path))
    (tmp_path / "b.yaml").write_text(GOOD.replace("metric: mean_recall@1\n", ""))
    with pytest.raises(WinnowError, match=r'b.yaml: "metric" is missing'):
        read_tasks(str(tmp_path))


def test_unknown_names() -> None:
    assert find_task("Caltech-101", datacomp_tasks()).key == "vtab/caltech101"
    with pytest.raises(UsageError, match=r'unknown task "cifar11".*Did you mean "cifar10"'):
        find_task("cifar11", datacomp_tasks())
    with pytest.raises(UsageError, match=r'unknown protocol "zeroshoot".*"zeroshot"'):
        load_protocol("zeroshoot")


def test_every_registered_protocol_and_kind_loads() -> None:
    kinds = {name: load_kind(name) for name in KINDS.table}
    assert all(name == kind.names[0] for name, kind in kinds.items())
    for name in PROTOCOLS.table:
        protocol = load_protocol(name)
        assert protocol.name == name and protocol.kinds <= set(KINDS.table)
        assert callable(protocol.run) and any(protocol.applies(kind) for kind in kinds.values())
    assert not load_protocol("zeroshot").applies(kinds["images"])


def test_listing_and_planning_import_no_torch() -> None:
    code = (
        "import sys, winnow.evaluate.stage; from winnow.evaluate.protocols.base import *\n"
        "[load_protocol(name) for name in PROTOCOLS.table], [load_kind(name) for name in KINDS.table]\n"
        "print(sorted({'torch', 'ray', 'open_clip', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

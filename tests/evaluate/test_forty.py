"""All 40 entries in DataComp's forms, tiny, through the stages: each has its scores, and DataComp's aggregation
reads what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.drawing import COLORS, draw_image
from tests.evaluate.sets import (
    add_metadata,
    open_found,
    samples_of,
    write_classification,
    write_config,
    write_faces,
    write_packed_retrieval,
    write_packed_wino,
)
from tests.evaluate.test_packed import write_arrow
from winnow.evaluate.report.tables import partial_note
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.stage import EvaluateStage
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.infra.stages.executors import SerialExecutor
from winnow.infra.stages.runner import execute
from winnow.pretrain.encoder import encoder_digest

TASKS = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"}
N = 12


def write_forty(data: Path) -> None:
    rng = np.random.default_rng(0)
    for key, task in TASKS.items():
        root = data / task.data_folder
        if key.startswith("retrieval/flickr"):
            write_packed_retrieval(root)
        elif key.startswith("retrieval/"):
            name = task.hub.partition("/")[2]
            rows = [
                {
                    "image": {"bytes": draw_image(color, i), "path": f"{i}.jpg"},
                    "caption": [f"a {word} one", f"all {word}"],
                }
                for i, (word, color) in enumerate(COLORS.items())
            ]
            folder = data / "hf_cache" / f"nlphuji___{name}" / "TEST" / "1.1.0" / "0f"
            write_arrow(folder / f"{name}-test.arrow", rows)
        elif task.kind == "winogavil":
            write_packed_wino(root)
        elif task.kind == "face_attributes":
            write_faces(data, task.data_folder, n=N)
        else:
            names = [f"{key.rpartition('/')[2]} {i}" for i in range(task.classes)]
            write_classification(data, task.data_folder, n=N, names=names)
            (root / "zeroshot_classification_templates.txt").write_text("a {c}\n")
            if task.metadata:
                columns = len(task.metadata)
                rows = {f"s{i:07d}": [int(v) for v in rng.integers(3, size=columns)] for i in range(N)}
                add_metadata(root, rows)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("forty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINNOW_CACHE", str(folder / "cache"))
        write_forty(folder / "data")
        spec = write_config(folder)
        stage = EvaluateStage((("tiny", spec, encoder_digest(spec)),), str(folder / "data"), str(folder / "out"))
        execute(stage.embedding(), SerialExecutor())
        manifest = execute(stage, SerialExecutor())
    return folder, manifest.values


def test_every_entry_has_its_scores(evaluated) -> None:
    folder, values = evaluated
    assert values["missing"] == [] and values["not_applicable"] == []
    assert set(values["tasks"]) == set(TASKS)
    table = pq.read_table(folder / "out" / "scores.parquet").to_pylist()
    for key, task in TASKS.items():
        mine = {row["metric"]: row for row in table if row["task"] == key}
        assert task.metric is None or task.metric in mine, key
        assert all(0 <= row["value"] <= 1 and row["stderr"] >= 0 and row["n"] > 0 for row in mine.values()), key
        if task.classes and task.classes >= 5:
            assert {"acc1", "acc5", "mean_per_class_recall"} <= set(mine)
    assert any(row["metric"].startswith("acc_slide:") for row in table)
    assert any(row["metric"] == "toxicity_crime_wg" and row["task"] == "fairness/utkface" for row in table)


def test_datacomp_aggregation_reads_the_results(evaluated) -> None:
    folder, _ = evaluated
    lines = [json.loads(line) for line in (folder / "out" / "eval_results.jsonl").read_text().splitlines()]
    assert {line["key"]: line["dataset"] for line in lines} == {key: task.name for key, task in TASKS.items()}
    main = {line["dataset"]: line["metrics"]["main_metric"] for line in lines}
    assert {name for name, value in main.items() if value is None} == {"FairFace", "UTKFace"}
    for line in lines:
        task = TASKS[line["key"]]
        assert task.metric is None or line["metrics"]["main_metric"] == line["metrics"][task.metric]
        assert all(isinstance(v, float | int) for n, v in line["metrics"].items() if n not in ("acc5", "main_metric"))


def test_sizes_are_those_at_hand(evaluated) -> None:
    _, values = evaluated
    sizes = {key: facts["n"] for key, facts in values["tasks"].items()}
    assert sizes["imagenet1k"] == N and sizes["misc/winogavil"] == 14
    assert sizes["retrieval/flickr_1k_test_image_text_retrieval"] == 7
    (note,) = partial_note(values["tasks"])
    assert "ImageNet 1k (12 of 50,000)" in note and "WinoGAViL (14 of 3,563)" in note and note.count(" of ") == 41


def test_group_metadata_that_is_missing_is_named(evaluated, tmp_path: Path) -> None:
    for key, fails in (("fairness/geode", True), ("wilds/camelyon17", False)):
        task = TASKS[key]
        names = [f"class {i}" for i in range(task.classes)]
        write_classification(tmp_path / "data", task.data_folder, n=N, names=names)
        (found,) = find_tasks(str(tmp_path / "data"), key)
        from winnow.evaluate.tasks.task import TaskError

        if fails:
            with pytest.raises(TaskError, match=r"0\.tar, sample s0000000: no metadata \(\.npy\)"):
                list(samples_of(open_found(found)))
        else:
            assert len(list(samples_of(open_found(found)))) == N

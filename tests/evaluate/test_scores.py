"""`eval_results.jsonl`: the keys and names of DataComp's, and its aggregation over it."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.evaluate.protocols.base import Row, load_kind
from winnow.evaluate.report.score_table import scores_text, short_names
from winnow.evaluate.scores import result_line
from winnow.evaluate.statistics.aggregate import AGGREGATES, Estimate, SubsetScores, compare
from winnow.evaluate.tasks.read import datacomp_tasks
from winnow.evaluate.tasks.task import TaskError

TASKS = datacomp_tasks()
PLAIN = {"acc1", "acc5", "mean_per_class_recall"}


def rows(*names: str, protocol: str = "zeroshot", n: int = 50) -> list[dict]:
    return [{"protocol": protocol, "metric": name, "value": 0.01 * (i + 1), "n": n + i} for i, name in enumerate(names)]


def metrics_of(key: str, *names: str) -> dict:
    line = result_line("some/model", TASKS[key], rows(*names))
    assert set(line) == {"key", "dataset", "metrics", "checkpoint"}
    assert (line["key"], line["dataset"], line["checkpoint"]) == (key, TASKS[key].name, "some/model")
    return line["metrics"]


def test_classification() -> None:
    got = metrics_of("cifar10", *PLAIN)
    assert set(got) == {*PLAIN, "main_metric"} and got["main_metric"] == got["acc1"]
    got = metrics_of("vtab/pets", *PLAIN)
    assert got["main_metric"] == got["mean_per_class_recall"]
    got = metrics_of("vtab/pcam", "acc1", "mean_per_class_recall")
    assert got["acc5"] is None  # as DataComp writes it below five classes


def test_wilds() -> None:
    """The names that WILDS's evaluators give, on which DataComp's task list relies."""
    got = metrics_of("wilds/iwildcam", *PLAIN, "F1-macro_all")
    assert set(got) == {*PLAIN, "acc_avg", "recall-macro_all", "F1-macro_all", "main_metric"}
    assert got["acc_avg"] == got["acc1"] and got["recall-macro_all"] == got["mean_per_class_recall"]
    names = ["acc_year:14", "acc_year:15", "acc_worst_year", "acc_region:0", "acc_region:3", "acc_worst_region"]
    got = metrics_of("wilds/fmow", "acc1", "acc5", "mean_per_class_recall", *names)
    counts = {"count_year:14": 53, "count_year:15": 54, "count_region:0": 56, "count_region:3": 57}
    assert set(got) == {*PLAIN, *names, *counts, "acc_avg", "main_metric"}
    assert got["main_metric"] == got["acc_worst_region"] and {key: got[key] for key in counts} == counts


def test_dollar_street() -> None:
    got = metrics_of("fairness/dollar_street", *sorted(PLAIN), "acc_top5_income_ds:0", "acc_top5_wg")
    assert set(got) == {
        *PLAIN,
        "acc_top5_avg",
        "acc_top5_income_ds:0",
        "count_income_ds:0",
        "acc_top5_wg",
        "main_metric",
    }
    assert got["acc_top5_avg"] == got["acc5"] and got["main_metric"] == got["acc_top5_wg"]
    assert got["count_income_ds:0"] == 53


def test_faces_and_the_rest() -> None:
    names = ["acc_race_avg", "acc_race_race_binary:0", "acc_gender_x_race:2_gender:1", "toxicity_crime_race:6"]
    got = metrics_of("fairness/fairface", *names)
    counts = {"count_race_binary:0": 51, "count_race:2_gender:1": 52, "count_race:6": 53}
    assert got == dict(zip(names, (0.01, 0.02, 0.03, 0.04), strict=True)) | counts | {"main_metric": None}
    got = metrics_of("misc/winogavil", "avg_jaccard_score", "jaccard_score_10-12")
    assert got["main_metric"] == got["jaccard_score_10-12"]
    got = metrics_of("retrieval/mscoco_2014_5k_test_image_text_retrieval", "mean_recall@1")
    assert got["main_metric"] == got["mean_recall@1"]


def test_other_protocols_have_a_prefix() -> None:
    mixed = [*rows("acc1"), *rows("acc1", protocol="linear_1pct"), *rows("acc1", protocol="linear_1pct")]
    mixed[-1]["value"] = 0.03
    got = result_line("m", TASKS["cifar10"], mixed)["metrics"]
    assert got["acc1"] == 0.01 and got["linear_1pct/acc1"] == pytest.approx(0.02)


def test_measured() -> None:
    assert load_kind("zeroshot_classification").measured(1500, [1500]) == 1500
    assert load_kind("winogavil").measured(2044, [3567, 3568]) == 3568
    assert load_kind("retrieval").measured(1000, [5000]) == 1000
    assert load_kind("zeroshot_classification").measured(12, []) == 12


# As DataComp's aggregate_scores.py groups them, by name; everything with a main metric is averaged.
SHIFTS = ["ImageNet Sketch", "ImageNet v2", "ImageNet-A", "ImageNet-O", "ImageNet-R", "ObjectNet"]
VTAB = ["Caltech-101", "CIFAR-100", "CLEVR Counts", "CLEVR Distance", "Describable Textures", "EuroSAT"]
VTAB += [
    "KITTI Vehicle Distance",
    "Oxford Flowers-102",
    "Oxford-IIIT Pet",
    "PatchCamelyon",
    "RESISC45",
    "SVHN",
    "SUN397",
]
RETRIEVAL = ["Flickr", "MSCOCO", "WinoGAViL"]


def test_aggregates_are_datacomps() -> None:
    tasks = {key: task for key, task in TASKS.items() if task.group != "extra"}
    values = {task.name: i / 100 for i, task in enumerate(tasks.values())}
    scores = {key: Estimate(values[task.name], 0.0) for key, task in tasks.items() if task.metric}
    facts = {key: task.model_dump() | {"n": task.size} for key, task in tasks.items()}
    result = compare([SubsetScores("one", 1, 1, (0,), (scores,))], facts, "one")
    (row,) = result["rows"]
    scored = [value for name, value in values.items() if name not in ("FairFace", "UTKFace")]
    assert len(scored) == 38 and row["average"]["value"] == pytest.approx(np.mean(scored))
    expected = {"imagenet": ["ImageNet 1k"], "shift": SHIFTS, "vtab": VTAB, "retrieval": RETRIEVAL}
    assert {group: pair["value"] for group, pair in row["groups"].items()} == {
        group: pytest.approx(np.mean([values[name] for name in names])) for group, names in expected.items()
    }
    assert result["group_names"] == AGGREGATES and result["average"]["name"] == "38-task average"


def table_of(keys: list[str]) -> str:
    """The printed table of one checkpoint with 0.5 on DataComp's tasks and 1 on others."""
    facts = {}
    for key in keys:
        task = TASKS.get(key)
        group, metric, scored = (task.group, task.metric, task.scored) if task else ("extra", "acc1", True)
        facts[key] = {"name": key, "group": group, "metric": metric, "scored": scored, "n": 9, "size": None}
    scores = [
        {"checkpoint": "one", "task": key, "protocol": "zeroshot", "metric": facts[key]["metric"]}
        | {"value": 0.5 if key in TASKS else 1.0, "stderr": 0.0, "seed": 0}
        for key in keys
        if facts[key]["metric"]
    ]
    values = {"tasks": facts, "checkpoints": {"one": "d"}, "protocols": ["zeroshot"]}
    return scores_text(scores, values | {"missing": [], "not_applicable": [], "left_out": {}})


def test_names_of_columns() -> None:
    assert short_names(["runs/a/m", "runs/b/m", "pixels:8"]) == ["a/m", "b/m", "pixels:8"]
    assert short_names(["runs/a", "runs/a/b"]) == ["a", "a/b"]
    assert short_names(["x/a", "a"]) == ["x/a", "a"]
    assert short_names(["one"]) == ["one"] and short_names(["/deep/one"]) == ["one"]


def test_an_average_says_what_it_is_over() -> None:
    """DataComp's 38 are averaged alone, whatever else is in the folder; fewer are named."""
    official = [key for key, task in TASKS.items() if task.group != "extra"]
    text = table_of([*official, "mine"])
    (line,) = [line for line in text.splitlines() if "38-task average" in line]
    assert line.rstrip(" |").endswith("0.500") and "average is over" not in text
    text = table_of(["cifar10", "mnist", "mine"])
    assert "average over 3 tasks" in text and "The average is over mnist, cifar10, mine." not in text
    assert "The average is over cifar10, mnist, mine." in text and "0.667" in text


@pytest.mark.parametrize(("value", "stderr"), [(np.nan, 0.1), (np.inf, 0.1), (0.5, np.nan)])
def test_a_score_is_a_number(value, stderr):
    with pytest.raises(TaskError, match=r"acc1 is .* no score"):
        Row("acc1", value, 10, stderr)

"""The comparison's values, by hand on small cases."""

from __future__ import annotations

import math

import pytest

from winnow.evaluate.report.tables import comparison_csv, comparison_text
from winnow.evaluate.sets.layout import extra_task
from winnow.evaluate.statistics.aggregate import (
    Estimate,
    SubsetScores,
    average_name,
    compare,
    headline,
    significance,
)
from winnow.evaluate.tasks.read import datacomp_tasks


def facts(*tasks) -> dict:
    return {task.key: task.model_dump() | {"n": 100} for task in tasks}


ALL = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"}
TASKS = facts(ALL["mnist"], ALL["vtab/dtd"], ALL["vtab/svhn"], ALL["fairness/fairface"])


def subset(name: str, seeds: dict[int, dict[str, tuple[float, float]]], size: int = 10) -> SubsetScores:
    scores = tuple({task: Estimate(*pair) for task, pair in tasks.items()} for tasks in seeds.values())
    return SubsetScores(name, size, 40, tuple(seeds), scores)


def test_by_hand_with_one_seed() -> None:
    none = subset("none", {0: {"mnist": (0.2, 0.03), "vtab/dtd": (0.1, 0.0), "vtab/svhn": (0.3, 0.04)}}, 40)
    clip = subset("clip", {0: {"mnist": (0.5, 0.0), "vtab/dtd": (0.2, 0.0), "vtab/svhn": (0.2, 0.12)}})
    result = compare([none, clip], TASKS, "none")
    first, second = result["rows"]
    assert [first["subset"], second["subset"]] == ["clip", "none"]
    assert first["share"] == 0.25 and second["share"] == 1.0
    assert first["average"]["value"] == pytest.approx(0.3)  # (0.5 + 0.2 + 0.2) / 3
    assert first["average"]["stderr"] == pytest.approx(0.04)  # 0.12 / 3
    assert first["groups"]["vtab"]["value"] == pytest.approx(0.2)
    assert first["groups"]["vtab"]["stderr"] == pytest.approx(0.06)
    assert second["average"]["value"] == pytest.approx(0.2)
    assert second["average"]["stderr"] == pytest.approx(0.05 / 3)  # hypot(3, 4) = 5
    assert first["difference"]["value"] == pytest.approx(0.1)
    assert first["difference"]["stderr"] == pytest.approx(0.13 / 3)  # hypot(5, 12) = 13
    assert second["difference"] is None
    assert result["average"] == {"name": "average over 3 tasks", "tasks": ["vtab/dtd", "vtab/svhn", "mnist"]}
    assert result["group_names"] == {"vtab": "VTAB (2 of 13)"}
    assert result["chance"]["average"] == pytest.approx((0.10035 + 0.021277 + 0.117897) / 3)
    assert "With one seed" in headline(result)


def test_by_hand_with_paired_seeds() -> None:
    none = subset("none", {0: {"mnist": (0.1, 0.0)}, 1: {"mnist": (0.3, 0.0)}})
    clip = subset("clip", {1: {"mnist": (0.42, 0.0)}, 0: {"mnist": (0.2, 0.0)}})
    rows = {row["subset"]: row for row in compare([none, clip], facts(ALL["mnist"]), "none")["rows"]}
    # The averages spread by 0.1 each, their paired differences 0.10 and 0.12 by 0.01 only.
    assert rows["none"]["average"]["stderr"] == pytest.approx(0.1)
    assert rows["clip"]["difference"]["value"] == pytest.approx(0.11)
    assert rows["clip"]["difference"]["stderr"] == pytest.approx(0.01)
    other = subset("clip", {2: {"mnist": (0.42, 0.0)}, 3: {"mnist": (0.2, 0.0)}})
    rows = {row["subset"]: row for row in compare([none, other], facts(ALL["mnist"]), "none")["rows"]}
    assert rows["clip"]["difference"]["stderr"] == pytest.approx(math.hypot(0.1, 0.11))


def test_averages_are_over_shared_scored_tasks() -> None:
    extra = extra_task("wds_shapes_test", "zeroshot_classification", 4)
    tasks = facts(ALL["mnist"], ALL["cifar10"], ALL["fairness/fairface"], extra)
    a = subset("a", {0: dict.fromkeys(tasks, (0.5, 0.1))})
    b = subset("b", {0: {"mnist": (0.4, 0.1), "shapes": (0.2, 0.1)}})
    c = subset("c", {0: {}})
    result = compare([a, b, c], tasks, "b")
    assert result["average"]["tasks"] == ["mnist", "shapes"]
    assert result["not_averaged"] == ["cifar10", "fairness/fairface"]
    assert [row["rank"] for row in result["rows"]] == [1, 2, None]
    assert result["rows"][2]["average"] is None
    assert comparison_text(result) and comparison_csv(result)


def test_only_the_38_are_called_so() -> None:
    scored = [task for task in ALL.values() if task.scored]
    extra = extra_task("wds_shapes_test", "zeroshot_classification", 4)
    tasks = facts(*ALL.values(), extra)
    full = subset("full", {0: dict.fromkeys(tasks, (0.5, 0.1))})
    result = compare([full], tasks, "full")
    assert result["average"]["name"] == "38-task average"
    assert set(result["average"]["tasks"]) == {task.key for task in scored}
    assert result["group_names"]["shift"] == "ImageNet shifts"
    without = {key: value for key, value in tasks.items() if key != "mnist"}
    part = compare([full], without, "full")
    assert part["average"]["name"] == "average over 38 tasks"  # 37 of DataComp's and one more
    assert average_name(tasks, ["mnist"]) == "average over 1 task"


def test_headline_names_the_best_and_its_significance() -> None:
    low = subset("none", {0: {"mnist": (0.10, 0.01)}, 1: {"mnist": (0.10, 0.01)}})
    high = subset("clip", {0: {"mnist": (0.30, 0.01)}, 1: {"mnist": (0.30, 0.01)}})
    assert headline(compare([low, high], TASKS, "none")).startswith("clip beat none by 0.200 ± 0.014")
    assert "No subset beat clip" in headline(compare([low, high], TASKS, "clip"))
    near = subset("clip", {0: {"mnist": (0.101, 0.01)}, 1: {"mnist": (0.101, 0.01)}})
    assert "is ahead of none" in headline(compare([low, near], TASKS, "none"))
    assert "cannot be distinguished" in significance(0.001, 0.01)


def test_tables_agree_with_the_values() -> None:
    none = subset("none", {0: {"mnist": (0.25, 0.03)}}, 40)
    clip = subset("a|b", {0: {"mnist": (0.5, 0.04)}})
    result = compare([none, clip], facts(ALL["mnist"]), "none")
    lines = [line.split(",") for line in comparison_csv(result).splitlines()]
    header = dict(zip(lines[0], lines[1], strict=True))
    assert header["subset"] == "a|b" and float(header["difference to none"]) == 0.25
    assert float(header["mnist"]) == 0.5 and float(header["mnist stderr"]) == 0.04
    assert lines[-1][1] == "chance"
    text = comparison_text(result)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "+0.250 ± 0.050" in table[2] and "a¦b" in table[2]

"""`eval_results.jsonl` as DataComp's evaluation writes it, so that its own tools read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from winnow.evaluate.tasks.task import Task


def result_line(checkpoint: str, task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of it: `key`, `dataset`, `metrics` with `main_metric`, and beside them the checkpoint's name.

    Metrics bear DataComp's names. Each group's number of samples stands beside its accuracy as "count_region:3"; a
    group without samples, for which DataComp writes NaN, is left out. What another protocol than zero-shot gave stands
    as "PROTOCOL/METRIC", the mean over seeds where it has several.

    Args:
        checkpoint: its name.
        task: the task.
        rows: `protocol`, `metric`, `value` and `n` of each figure.
    """
    zero_shot = [row for row in rows if row["protocol"] == "zeroshot"]
    values: dict[str, Any] = {row["metric"]: row["value"] for row in zero_shot}
    if "acc1" in values:
        values.setdefault("acc5", None)
    # What WILDS's evaluators give another name.
    macro = "F1-macro_all" in values
    if macro and "mean_per_class_recall" in values:
        values["recall-macro_all"] = values["mean_per_class_recall"]
    if (macro or task.group_by) and f"acc{task.top}" in values:
        values[f"{task.group_metric}_avg"] = values[f"acc{task.top}"]
    for row in zero_shot:
        fields = [field for field in task.group_by if f"_{field}:" in row["metric"]]
        if fields:
            start = min(row["metric"].index(f"_{field}:") for field in fields)
            values[f"count{row['metric'][start:]}"] = row["n"]
    values["main_metric"] = values.get(task.metric) if task.metric else None
    others: dict[str, list[float]] = {}
    for row in rows:
        if row["protocol"] != "zeroshot":
            others.setdefault(f"{row['protocol']}/{row['metric']}", []).append(row["value"])
    values |= {name: mean(values) for name, values in others.items()}
    return {"key": task.key, "dataset": task.name, "metrics": values, "checkpoint": checkpoint}


def measured(task: Task, images: int, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many samples of the test set the figures rest on, to be held against the task's `size`: images, of
    WinoGAViL associations."""
    if task.kind == "retrieval" or not rows:
        return images
    return max(int(row["n"]) for row in rows)

"""The table of scores, and `eval_results.jsonl` as DataComp's evaluation writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.evaluate.tasks.task import Task
from winnow.infra.io import storage
from winnow.infra.io.parquet import read_parquet
from winnow.infra.stages.kept import check_kept

SCORES = "scores.parquet"
RESULTS = "eval_results.jsonl"
DATACOMP_RESULTS = "datacomp"  # folder of the same for each checkpoint, with DataComp's tasks alone
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("checkpoint", "task", "protocol", "metric")]
    + [("value", pa.float64()), ("n", pa.int64()), ("stderr", pa.float64())]
    + [("task_version", pa.int32()), ("seed", pa.int64())]
)


def write_scores(url: str, scores: pa.Table | Sequence[Mapping[str, Any]]) -> str:
    """Write scores, as a table or as rows with the fields of `SCHEMA`, into a directory; returns the file's name."""
    table = scores if isinstance(scores, pa.Table) else pa.Table.from_pylist(list(scores), SCHEMA)
    with storage.writing(storage.join(url, SCORES)) as path:
        pq.write_table(table, path)
    return SCORES


def read_scores(url: str) -> pa.Table:
    """The scores in a directory. Raises WinnowError where there are none."""
    return read_parquet(check_kept(storage.join(url, SCORES)))


def write_results(url: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines of `result_line`."""
    storage.write_bytes(url, "".join(map(storage.json_line, lines)).encode())


def result_line(checkpoint: str, task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of `eval_results.jsonl`: `key`, `dataset`, `metrics` with `main_metric`, and the checkpoint's name.

    Metrics have DataComp's names. The number of samples of a group is "count_region:3", next to its accuracy; a group
    without samples, for which DataComp writes NaN, is left out. Metrics of other protocols than zero-shot are named
    "PROTOCOL/METRIC", and are the mean over seeds. `rows` have the `protocol`, `metric`, `value` and `n` of each score.
    """
    zero_shot = [row for row in rows if row["protocol"] == "zeroshot"]
    values: dict[str, Any] = {row["metric"]: row["value"] for row in zero_shot}
    if "acc1" in values:
        values.setdefault("acc5", None)
    # WILDS's evaluators have other names for these.
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

"""The scores of an evaluation as a text table: one row a task and protocol, one column a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from statistics import mean
from typing import Any

from winnow.evaluate.report.tables import partial_note, text_table, with_error
from winnow.evaluate.statistics.aggregate import AGGREGATES, ORDER, Estimate, average_name, averaged_tasks, sem

NOT_APPLICABLE = "n/a"


def scores_text(rows: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """Main metrics with their standard errors, below them averages by protocol, then what is missing and why.

    A task's seeds are averaged. An average is over the scored tasks on which every checkpoint has a score. `rows` are
    those of scores.parquet, in the order of the checkpoints; `values` those of the evaluate manifest.
    """
    tasks = values["tasks"]
    keys = sorted(tasks, key=lambda key: (ORDER.index(tasks[key]["group"]), tasks[key]["name"].lower()))
    checkpoints = list(dict.fromkeys([*(row["checkpoint"] for row in rows), *values["checkpoints"]]))
    protocols = list(values["protocols"])
    metrics = values.get("protocol_metrics", {})  # of protocols whose main metric is not the task's
    scores = _main_scores(rows, tasks, metrics)
    unfit = {(entry["checkpoint"], entry["task"], entry["protocol"]) for entry in values["not_applicable"]}
    names = dict(zip(checkpoints, short_names(checkpoints), strict=True))
    lines = []
    for key in keys:
        for protocol in protocols:
            cells = []
            for which in ((c, key, protocol) for c in checkpoints):
                unknown = NOT_APPLICABLE if which in unfit else "–"
                cells.append(with_error(asdict(scores[which])) if which in scores else unknown)
            metric = metrics.get(protocol, tasks[key]["metric"]) or "–"
            lines.append([tasks[key]["name"], protocol, metric, f"{tasks[key]['n']:,}", *cells])
    over: dict[tuple[str, ...], list[str]] = {}
    for protocol in (name for name in protocols if name not in metrics):
        scored = [c for c in checkpoints if any((c, key, protocol) in scores for key in keys)]
        shared = [key for key in keys if all((c, key, protocol) in scores for c in scored)]
        averaged = averaged_tasks(tasks, shared) if scored else []
        failed = {c for c in checkpoints if any((c, key, protocol) not in unfit for key in keys)}
        lines += _averages(protocol, averaged, tasks, checkpoints, scores, failed)
        if len(averaged) > 1 and not average_name(tasks, averaged).startswith("38-"):
            over.setdefault(tuple(averaged), []).append(protocol)
    header = ["task", "protocol", "metric", "n", *(names[checkpoint] for checkpoint in checkpoints)]
    parts = [text_table(header, lines, left=(0, 1, 2))]
    for several, group in over.items():
        of = f" of {', '.join(group)}" if len(over) > 1 else ""
        parts.append(f"The average{of} is over {', '.join(tasks[key]['name'] for key in several)}.")
    parts += partial_note(tasks)
    ignored = {tasks[key]["name"]: names for key, names in values.get("ignored", {}).items() if key in tasks}
    if listed := "; ".join(f"{name}, {', '.join(names[:5])}" for name, names in ignored.items()):
        parts.append(f"Shards beyond the number in nshards.txt, which are not read: {listed}.")
    parts += _left_out(values["left_out"], tasks)
    parts += _reasons(values["not_applicable"], names, "Not applicable (n/a)")
    parts += _reasons(values["missing"], names, "Missing")
    return "\n\n".join(parts)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their common parent folders; distinct names stay distinct."""
    parts = [name.rstrip("/").split("/") for name in names]
    deep = [part for part in parts if len(part) > 1]
    shared = 0
    while deep and all(len(part) > shared + 1 for part in deep) and len({part[shared] for part in deep}) == 1:
        shared += 1
    short = ["/".join(part[shared:] if len(part) > 1 else part) for part in parts]
    return short if len(set(short)) == len(set(names)) else list(names)


def _main_scores(
    rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]
) -> dict[tuple[str, str, str], Estimate]:
    """The main metric by checkpoint, task and protocol, the mean over seeds."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["metric"] == metrics.get(row["protocol"], tasks[row["task"]]["metric"]):
            found.setdefault((row["checkpoint"], row["task"], row["protocol"]), []).append(row)
    scores = {}
    for key, group in found.items():
        seeds = [row["value"] for row in group]
        test = math.sqrt(mean(row["stderr"] ** 2 for row in group))
        scores[key] = Estimate(mean(seeds), math.hypot(test, sem(seeds)))
    return scores


def _averages(
    protocol: str,
    averaged: Sequence[str],
    tasks: Mapping[str, Mapping[str, Any]],
    checkpoints: Sequence[str],
    scores: Mapping[tuple[str, str, str], Estimate],
    failed: Set[str],
) -> list[list[str]]:
    """Rows with the average over all tasks, and over those of each of DataComp's groups that has several."""
    groups = {name: [key for key in averaged if tasks[key]["group"] == group] for group, name in AGGREGATES.items()}
    lines = []
    for name, group in {average_name(tasks, averaged): averaged, **groups}.items():
        if len(group) > 1:
            title = name if group is averaged else f"{name}, average over {len(group)}"
            cells = [
                f"{mean(scores[c, key, protocol].value for key in group):.3f}"
                if all((c, key, protocol) in scores for key in group)
                else ("–" if c in failed else NOT_APPLICABLE)
                for c in checkpoints
            ]
            lines.append([title, protocol, "", "", *cells])
    return lines


def _left_out(left_out: Mapping[str, Mapping[str, Mapping[str, int]]], tasks: Mapping[str, Any]) -> list[str]:
    """A sentence on the undecodable images."""
    parts = []
    for key, splits in left_out.items():
        counts = [
            f"{n:,} {'' if split == 'test' else f'of {split} '}for {reason}"
            for split, reasons in splits.items()
            for reason, n in reasons.items()
        ]
        parts.append(f"{tasks[key]['name']}, {', '.join(counts)}")
    return [f"Images left out: {'; '.join(parts)}."] if parts else []


def _reasons(entries: Sequence[Mapping[str, str]], names: Mapping[str, str], title: str) -> list[str]:
    """A line for each protocol and reason: which tasks, and for which checkpoints where not for all."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in entries:
        by_task = found.setdefault((entry.get("protocol", ""), entry["reason"]), {})
        by_task.setdefault(entry["task"], []).append(names[entry["checkpoint"]])
    lines = []
    for (protocol, reason), by_task in found.items():
        by_who: dict[tuple[str, ...], list[str]] = {}
        for task, who in by_task.items():
            by_who.setdefault(tuple(who), []).append(task)
        parts = [
            ", ".join(group) + ("" if set(who) == set(names.values()) else f" for {', '.join(who)}")
            for who, group in by_who.items()
        ]
        lines.append(f"{title}: {f'{protocol} of ' if protocol else ''}{'; '.join(parts)} ({reason.rstrip('.')}).")
    return lines

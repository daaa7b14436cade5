"""Scores of earlier states of a run: kept when an evaluation replaces them, and compared with those of now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from winnow.evaluate.scores import SCORES, read_scores
from winnow.evaluate.statistics.aggregate import (
    Estimate,
    SubsetScores,
    average,
    average_name,
    averaged_tasks,
    difference,
)
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

HISTORY = "history"  # in the directory of the scores: a folder for each earlier state, 0001 the first
EVALUATION = "evaluation.json"  # there: what the manifest said of checkpoints, tasks and protocols, and digests
FACTS = ("checkpoints", "tasks", "protocols", "protocol_metrics")
MAX_TASKS = 10  # that are listed one by one
_WHICH = ("checkpoint", "task", "protocol", "metric", "seed", "value")
ByCheckpoint = dict[str, dict[str, Estimate]]
Checkpoints = Sequence[tuple[str, Sequence[tuple[int, str]]]]  # by subset, (seed, name) of each


def keep_scores(url: str, values: Mapping[str, Any]) -> None:
    """Copy the scores in a directory, unless they are damaged, into a new folder of its history. `values` are those of
    their manifest."""
    try:
        read_scores(url)
    except WinnowError:
        return
    last = max((int(name) for name in earlier_states(url)), default=0)
    folder = storage.join(url, HISTORY, f"{last + 1:04}")
    data = storage.read_bytes(storage.join(url, SCORES))
    facts = {name: values[name] for name in FACTS if name in values}
    storage.write_bytes(storage.join(folder, SCORES), data)
    digests = {"scores": storage.digest_bytes(data), "facts": storage.digest_json(facts)}
    storage.write_json(storage.join(folder, EVALUATION), {"facts": facts, "sha256": digests})


def _read_state(url: str, name: str) -> tuple[str, dict[str, Any]]:
    """The folder of a state, and what the manifest said. Raises WinnowError where one of its files is damaged."""
    folder = storage.join(url, HISTORY, name)
    content = storage.read_json(storage.join(folder, EVALUATION))
    try:
        facts, digests = content["facts"], content["sha256"]
        found = {"scores": storage.digest_file(storage.join(folder, SCORES)), "facts": storage.digest_json(facts)}
    except (KeyError, TypeError):
        facts, digests, found = {}, {}, None
    if found != digests:
        do = "Remove the folder: these are scores of an earlier state of the run, and nothing else reads them."
        raise WinnowError("is damaged: it does not have the content that was written", where=folder, do=do)
    return folder, facts


def drop_repeated(url: str, rows: Sequence[Mapping[str, Any]], checkpoints: Mapping[str, str]) -> None:
    """Remove the last state of the history if the scores of now, of checkpoints with these digests, have all of it."""
    for name in earlier_states(url)[-1:]:
        folder, facts = _read_state(url, name)
        before = facts["checkpoints"]
        now = {(checkpoints[row["checkpoint"]], *(row[field] for field in _WHICH)) for row in rows}
        if all(
            (before.get(row["checkpoint"]), *(row[field] for field in _WHICH)) in now
            for row in read_scores(folder).to_pylist()
        ):
            storage.remove(folder)


def earlier_states(url: str) -> list[str]:
    """Names of the complete states in the history of a directory of scores, the earliest first."""
    names = [name for name in storage.list_names(storage.join(url, HISTORY)) if name.isdecimal()]
    return [name for name in names if storage.exists(storage.join(url, HISTORY, name, EVALUATION))]


def history_digests(url: str) -> dict[str, str]:
    """Digest of each state in a history, by its path."""
    names = [f"{HISTORY}/{name}" for name in earlier_states(url)]
    files = {name: [storage.join(url, name, file) for file in (SCORES, EVALUATION)] for name in names}
    return {name: storage.digest_json([storage.digest_file(file) for file in urls]) for name, urls in files.items()}


def main_scores(url: str, values: Mapping[str, Any]) -> tuple[str, ByCheckpoint]:
    """The protocol that is compared: the run's first with scores that has the task's main metric. And by it the main
    metric of each checkpoint on each task, the mean over the protocol's seeds."""
    tasks, rows = values["tasks"], read_scores(url).to_pylist()
    given = {row["protocol"] for row in rows} - set(values.get("protocol_metrics", {}))
    protocol = next((name for name in values["protocols"] if name in given), values["protocols"][0])
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["protocol"] == protocol and row["metric"] == tasks[row["task"]]["metric"]:
            found.setdefault((row["checkpoint"], row["task"]), []).append(row)
    scores: ByCheckpoint = {}
    for (checkpoint, task), batch in found.items():
        stderr = math.sqrt(mean(row["stderr"] ** 2 for row in batch))
        scores.setdefault(checkpoint, {})[task] = Estimate(mean(row["value"] for row in batch), stderr)
    return protocol, scores


def before_and_now(url: str, checkpoints: Checkpoints, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What has changed since each earlier state of a run: for each subset with other models or scores the average over
    the tasks that both states have, and up to MAX_TASKS tasks, before and now with the difference.

    Args:
        url: directory of the scores.
        checkpoints: those of each subset.
        values: of the evaluate manifest.
    """
    found = []
    protocol, now = main_scores(url, values)
    for name in earlier_states(url):
        folder, earlier = _read_state(url, name)
        by, before = main_scores(folder, earlier)
        for subset, pairs in checkpoints if by == protocol else ():
            seeds, names = tuple(seed for seed, _ in pairs), [checkpoint for _, checkpoint in pairs]
            old, new = (
                SubsetScores(subset, 0, 0, seeds, tuple(scores.get(checkpoint, {}) for checkpoint in names))
                for scores in (before, now)
            )
            same = [key for key in values["tasks"] if key in old.tasks() and key in new.tasks()]
            shared = [key for key in same if _alike(earlier["tasks"][key], values["tasks"][key])]
            trained = any(earlier["checkpoints"].get(one) != values["checkpoints"][one] for one in names)
            changed = shared if trained else [key for key in shared if old.over_seeds([key]) != new.over_seeds([key])]
            if changed:
                why = "another model" if trained else "another test set"
                rows = _rows(old, new, shared, changed, values["tasks"])
                found.append({"state": name, "subset": subset, "changed": why, "rows": rows})
    return found


def _alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(before[name] == now[name] for name in ("metric", "version"))


def _rows(
    old: SubsetScores, new: SubsetScores, shared: Sequence[str], changed: Sequence[str], tasks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    averaged = averaged_tasks(tasks, shared)
    of = {average_name(tasks, averaged): averaged} if len(averaged) > 1 else {}
    of |= {tasks[key]["name"]: [key] for key in changed[:MAX_TASKS]}
    return [
        {
            "of": name,
            "before": asdict(average(old, keys)),
            "now": asdict(average(new, keys)),
            "difference": asdict(difference(new, old, keys)),
        }
        for name, keys in of.items()
    ]

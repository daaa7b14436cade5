"""From scores to a comparison: task scores over seeds, averages over tasks, differences to the baseline, and how sure
they are.

Standard errors have two parts, added in squares:

* test sets: another draw of the test images. The parts of the tasks are taken as independent of each other, and so
  are those of two subsets on one task; as both saw the same images this overstates the error of a difference.
* seeds: another training run, from the variation over seeds (of the paired differences where both have the same seeds).
  With a single seed this part is unknown and is left out; `seeds` in the result shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from winnow.evaluate.tasks.read import datacomp_tasks

# Aggregates as DataComp reports them: name for people, group.
AGGREGATES = {"imagenet": "ImageNet", "shift": "ImageNet shifts", "vtab": "VTAB", "retrieval": "Retrieval"}
ORDER = (*AGGREGATES, "other", "extra")  # of tasks in tables
DATACOMP_SCORED = 38


@dataclass(frozen=True)
class Estimate:
    """The main metric of one checkpoint on one task, with the standard error that its test set gives it."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SubsetScores:
    """A subset with its checkpoints' scores."""

    name: str
    size: int  # samples in it
    pool: int  # samples in the pool
    seeds: tuple[int, ...]  # of its training runs, in order
    scores: tuple[Mapping[str, Estimate], ...]  # for each seed, by task key

    def tasks(self) -> list[str]:
        """Tasks on which every checkpoint has a score."""
        if not self.scores:
            return []
        return [key for key in self.scores[0] if all(key in scores for scores in self.scores)]

    def test_stderr(self, task: str) -> float:
        """The part of the standard error that the test set gives; it does not shrink with seeds."""
        return math.sqrt(mean(scores[task].stderr ** 2 for scores in self.scores))

    def over_seeds(self, tasks: Sequence[str]) -> list[float]:
        """The average over tasks of each seed."""
        return [mean(scores[task].value for task in tasks) for scores in self.scores]


def sem(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value, whose variation is unknown."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def average(subset: SubsetScores, tasks: Sequence[str]) -> Estimate:
    """Unweighted mean over tasks, with its standard error."""
    by_seed = subset.over_seeds(tasks)
    test = math.sqrt(sum(subset.test_stderr(task) ** 2 for task in tasks)) / len(tasks)
    return Estimate(mean(by_seed), math.hypot(test, sem(by_seed)))


def difference(subset: SubsetScores, baseline: SubsetScores, tasks: Sequence[str]) -> Estimate:
    """Average of the subset minus that of the baseline, with its standard error."""
    local, reference = subset.over_seeds(tasks), baseline.over_seeds(tasks)
    squares = sum(subset.test_stderr(task) ** 2 + baseline.test_stderr(task) ** 2 for task in tasks)
    if set(subset.seeds) == set(baseline.seeds) and len(set(subset.seeds)) == len(local) == len(reference):
        pairs = dict(zip(baseline.seeds, reference, strict=True))
        seeds = sem([value - pairs[seed] for seed, value in zip(subset.seeds, local, strict=True)])
    else:
        seeds = math.hypot(sem(local), sem(reference))
    return Estimate(mean(local) - mean(reference), math.hypot(math.sqrt(squares) / len(tasks), seeds))


def averaged_tasks(tasks: Mapping[str, Mapping[str, Any]], shared: Sequence[str]) -> list[str]:
    """The tasks of an average, out of those on which all have a score: the scored ones; where all of DataComp's 38 are
    among them, those alone."""
    scored = [key for key in shared if tasks[key]["scored"]]
    official = [key for key in scored if tasks[key]["group"] != "extra"]
    return official if len(official) == DATACOMP_SCORED else scored


def average_name(tasks: Mapping[str, Mapping[str, Any]], averaged: Sequence[str]) -> str:
    """ "38-task average" for DataComp's 38 and nothing else, "average over N tasks" otherwise."""
    full = len(averaged) == DATACOMP_SCORED and all(tasks[key]["group"] != "extra" for key in averaged)
    return "38-task average" if full else f"average over {len(averaged)} task{'s' if len(averaged) != 1 else ''}"


def compare(subsets: Sequence[SubsetScores], tasks: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """The comparison as JSON values.

    Averages are over the scored tasks that every subset with any score has, so that they are of the same tasks; when
    all of DataComp's 38 are among them, over those alone. `tasks` has the facts of the evaluate manifest.
    """
    tasks = dict(sorted(tasks.items(), key=lambda item: (ORDER.index(item[1]["group"]), item[1]["name"].lower())))
    scored = [subset for subset in subsets if subset.tasks()]
    shared = [key for key in tasks if all(key in subset.tasks() for subset in scored)]
    averaged = averaged_tasks(tasks, shared)
    groups = {group: [key for key in averaged if tasks[key]["group"] == group] for group in AGGREGATES}
    groups = {group: keys for group, keys in groups.items() if keys}
    base = next((subset for subset in scored if subset.name == baseline), None)
    rows = [_row(subset, base, averaged, groups) for subset in subsets]
    rows.sort(key=lambda row: -row["average"]["value"] if row["average"] else math.inf)
    for rank, row in enumerate(rows, start=1):
        row["rank"] = rank if row["average"] else None
    chance = {key: tasks[key]["chance"] for key in tasks}
    return {
        "baseline": baseline,
        "average": {"name": average_name(tasks, averaged), "tasks": averaged},
        "groups": groups,
        "group_names": {group: _group_name(group, keys) for group, keys in groups.items()},
        "tasks": {key: dict(facts) for key, facts in tasks.items()},
        "not_averaged": [key for key in tasks if key not in averaged],
        "rows": rows,
        "chance": {
            "tasks": chance,
            "average": _known_mean([chance[key] for key in averaged]),
            "groups": {group: _known_mean([chance[key] for key in keys]) for group, keys in groups.items()},
        },
    }


def _group_name(group: str, keys: Sequence[str]) -> str:
    """ "VTAB", or "VTAB (2 of 13)" when some of its tasks are not there."""
    full = sum(task.group == group for task in datacomp_tasks().values())
    return AGGREGATES[group] if len(keys) == full else f"{AGGREGATES[group]} ({len(keys)} of {full})"


def _row(
    subset: SubsetScores, base: SubsetScores | None, averaged: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    scored = bool(averaged) and set(averaged) <= set(subset.tasks())
    per_task = {}
    for key in subset.tasks():
        values = [scores[key].value for scores in subset.scores]
        stderr = math.hypot(subset.test_stderr(key), sem(values))
        per_task[key] = {"value": mean(values), "stderr": stderr, "by_seed": values}
    return {
        "subset": subset.name,
        "size": subset.size,
        "pool": subset.pool,
        "share": subset.size / subset.pool if subset.pool else None,
        "seeds": list(subset.seeds),
        "tasks": per_task,
        "average": asdict(average(subset, averaged)) if scored else None,
        "groups": {group: asdict(average(subset, keys)) for group, keys in groups.items()} if scored else {},
        "difference": asdict(difference(subset, base, averaged))
        if scored and base is not None and subset.name != base.name
        else None,
    }


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def significance(value: float, stderr: float) -> str:
    """How significant a difference with this standard error is, in words."""
    ratio = abs(value) / stderr if stderr > 0 else math.inf
    if ratio < 1:
        return "less than one standard error: the two cannot be distinguished"
    if ratio < 2:
        return f"{ratio:.1f} standard errors: weak evidence"
    if ratio < 3:
        return f"{ratio:.1f} standard errors: likely a real difference"
    return f"{ratio:.1f} standard errors: a clear difference" if math.isfinite(ratio) else "no error is known"


def headline(result: Mapping[str, Any]) -> str:
    """Which subset was better, by how much, and how sure that is, in a sentence or two."""
    ranked = [row for row in result["rows"] if row["average"]]
    name, baseline = result["average"]["name"], result["baseline"]
    if not ranked:
        return "No task has a score for every subset, so nothing can be compared."
    best = ranked[0]
    if len(ranked) == 1:
        return f"{best['subset']}: {best['average']['value']:.3f}, {name}. There is nothing to compare it with."
    if best["subset"] == baseline:
        rival = ranked[1]
        delta = rival["difference"]
        below = f"{-delta['value']:.3f} ± {delta['stderr']:.3f} below it"
        text = f"No subset beat {baseline}. The best of them, {rival['subset']}, is {below}"
        pair = (best, rival)
    elif best["difference"] is None:
        return f"{best['subset']} is first with {best['average']['value']:.3f} ({name}); {baseline} has no score."
    else:
        delta = best["difference"]
        verb = "beat" if delta["value"] >= 2 * delta["stderr"] else "is ahead of"
        text = f"{best['subset']} {verb} {baseline} by {delta['value']:.3f} ± {delta['stderr']:.3f}"
        pair = (best, next(row for row in ranked if row["subset"] == baseline))
    text += f" ({name}; {significance(delta['value'], delta['stderr'])})."
    if any(len(row["seeds"]) < 2 for row in pair):
        text += " With one seed each, the variation between training runs is not part of that error."
    return text

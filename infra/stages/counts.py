"""How many samples the units of a stage have and have skipped, each sample once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from winnow.infra.stages.stage import Record, Stage, Unit


@dataclass
class Counts:
    """The samples of a stage: how many it was given, and those that it skipped."""

    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, Any]] = field(default_factory=list)


def count_samples(stage: Stage, units: Sequence[Unit], done: Mapping[str, Record], lost: Mapping[str, str]) -> Counts:
    """The samples of a stage's units: of those with records, and of the lost ones, given with the reasons.

    A lost unit has lost the samples that it should have had (`Stage.expected`), at least one. Units that read the same
    samples (`Stage.reads`) count each of them once, and have as many as the largest of them.
    """
    whole = [record for record in done.values() if all(_count(item) for item in record.skipped)]
    counts, sizes, skipped = Counts(), Counter[str](), Counter[str]()  # by what is read
    seen: dict[str, set[str]] = {}
    for unit in units:
        if (record := done.get(unit.name)) is None:
            continue
        name = stage.reads(unit)
        items, known = _resolved(stage, unit, record, whole), seen.setdefault(name, set())
        sizes[name] = max(sizes[name], record.items + sum(map(_count, items)))
        new = [item for item in items if item["id"] not in known]
        known.update(item["id"] for item in items)
        counts.skipped += new
        for item in new:
            counts.reasons[item["reason"]] += _count(item)
            skipped[name] += _count(item)
    for unit in units:
        if unit.name in lost:
            name, size = stage.reads(unit), max(stage.expected(unit, whole), 1)
            counts.reasons[lost[unit.name]] += max(size - skipped[name], 0)
            sizes[name], skipped[name] = max(sizes[name], size), max(skipped[name], size)
    counts.total = max(sizes.total(), counts.reasons.total())
    return counts


def _resolved(stage: Stage, unit: Unit, record: Record, whole: Sequence[Record]) -> list[dict[str, Any]]:
    """What a unit has skipped, with the number of what was lost without one."""
    if all(map(_count, record.skipped)):
        return record.skipped
    known = record.items + sum(map(_count, record.skipped))
    expected = stage.expected(unit, whole) or 2 * known
    rest = iter([max(expected - known, 1)])
    return [item if _count(item) else item | {"count": next(rest, 0)} for item in record.skipped]


def _count(item: Mapping[str, Any]) -> int:
    return int(item.get("count", 1))


def mean_samples(records: Sequence[Record]) -> int:
    """How many samples units had on average, those that they skipped included."""
    sizes = [record.items + sum(map(_count, record.skipped)) for record in records]
    return round(sum(sizes) / len(sizes)) if sizes else 0

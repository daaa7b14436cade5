"""Running a stage: what is finished is skipped, the rest goes to an executor, what keeps failing is skipped."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import asdict, dataclass

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.executors import Executor
from winnow.infra.stages.progress import RunLog, StageProgress, read_note
from winnow.infra.stages.stage import (
    INCOMPLETE,
    LOCATIONS,
    MANIFEST,
    Manifest,
    Record,
    Skipped,
    Stage,
    Unit,
    describe_files,
    pending_units,
    read_locations,
    read_manifest,
    remove_stale,
)

NOTES = "notes"


@dataclass(frozen=True)
class Budget:
    """How much may be skipped before a run counts as failed: a share of the items when below 1, else a number.

    Raises UsageError when it is below 0.
    """

    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        if not self.max_skipped >= 0:
            raise UsageError(f"max_skipped cannot be {self.max_skipped:g}", do="Give a share, or a number from 1 up.")

    def check(self, reasons: Counter[str], items: int, where: str) -> None:
        """Raises WinnowError when more was skipped (number by reason) than `items` that were not allow."""
        count, total = reasons.total(), items + reasons.total()
        limit = self.max_skipped * total if self.max_skipped < 1 else self.max_skipped
        if count > limit:
            raise WinnowError(
                f"{count} of {total} skipped, the budget is {self} "
                f"({', '.join(f'{reason}: {n}' for reason, n in reasons.most_common(5))})",
                where=where,
                do="Mend the input, or raise max_skipped.",
            )

    def __str__(self) -> str:
        return f"{self.max_skipped:.1%}" if self.max_skipped < 1 else f"{self.max_skipped:.0f}"


def execute(
    stage: Stage,
    executor: Executor,
    *,
    budget: Budget | None = None,
    log: RunLog | None = None,
    retries: int = 2,
    label: str | None = None,
) -> Manifest:
    """Bring a stage to its manifest.

    Args:
        stage: what to run.
        executor: where to run it.
        budget: how much may be skipped.
        log: where to tell of it.
        retries: how often a failed group is tried again.
        label: the stage's name in messages.

    Returns:
        the manifest, read back or newly written.

    Raises:
        UsageError: a unit found the recipe at fault.
        WinnowError: units kept failing, or more was skipped than the budget allows.
    """
    budget, log, label = budget or Budget(), log or RunLog(stream=None), label or stage.name
    units, done = pending_units(stage)
    key = stage.manifest_key(units)
    todo = [unit for unit in units if unit.name not in done]
    previous = read_manifest(stage.out)
    _refuse_inputs(stage, previous)
    locations_url = stage.url(LOCATIONS)
    if not storage.exists(locations_url) or storage.read_json(locations_url) != stage.locations():
        storage.write_json(locations_url, stage.locations())
    if not todo and previous is not None and previous.key == key and _whole(stage, previous, done):
        budget.check(Counter(previous.skipped["reasons"]), previous.items, label)
        log.event(event="unchanged", stage=label, units=len(units))
        log.say(f"{label:<24} unchanged ({len(units)} units)")
        return previous

    started = time.monotonic()
    log.event(event="start", stage=label, units=len(units), todo=len(todo))
    progress = StageProgress(log, label, len(todo), sum(unit.items for unit in todo))
    failures: dict[str, Exception] = {}
    if todo:
        # What is made anew takes the place of what the manifest speaks of.
        storage.remove(stage.url(MANIFEST))
        _run_groups(stage, executor, _groups(todo), retries, progress, done, failures)
    storage.remove(stage.url(NOTES))
    lost = _failed_units(stage, units, failures, log)

    records = [done[unit.name] for unit in units if unit.name in done]
    items = sum(record.items for record in records)
    left_out = [item for record in records for item in record.skipped]
    reasons = Counter(item["reason"] for item in left_out)
    for unit in lost:
        reasons[_reason(failures[unit.name])] += max(unit.items, 1)
    budget.check(reasons, items, label)
    storage.remove(stage.url(MANIFEST))
    finished = stage.finish(records)
    files = {path: facts for record in records for path, facts in record.files.items()}
    files |= describe_files(stage, finished.files)
    left_out += [asdict(item) for item in finished.skipped]
    items -= len(finished.skipped)
    reasons.update(item.reason for item in finished.skipped)
    budget.check(reasons, items, label)
    n_left = reasons.total()
    remove_stale(stage, units, files)
    manifest = Manifest(
        stage=stage.name,
        version=stage.version,
        key=key,
        params=stage.params(),
        parents=stage.parents(),
        units=len(records),
        items=items,
        skipped={
            "count": n_left,
            "reasons": dict(sorted(Counter(item["reason"] for item in left_out).items())),
            "samples": left_out[:1000],
            "units": {unit.name: _reason(failures[unit.name]) for unit in lost},
        },
        files=dict(sorted(files.items())),
        values=finished.values,
        url=stage.out,
    )
    # With units missing, the next run must try them again, so its key must not match.
    retry = bool(lost) or any(record.key == INCOMPLETE for record in records)
    body = asdict(manifest) | {"key": INCOMPLETE if retry else key}
    body.pop("url")
    storage.write_json(stage.url(MANIFEST), body)
    seconds = time.monotonic() - started
    log.say(progress.line() if not n_left else f"{progress.line()}  {manifest.state}")
    log.event(event="done", stage=label, state=manifest.state, **progress.facts() | {"seconds": round(seconds, 3)})
    return manifest


def _refuse_inputs(stage: Stage, previous: Manifest | None) -> None:
    """Raises UsageError where a stage would write over what it reads, or over what another kind of stage made."""
    if previous is not None and previous.stage != stage.name:
        raise UsageError(
            f"holds what {previous.stage} made, and {stage.name} would write over it",
            where=stage.out,
            do="Give another directory.",
        )
    read = list(stage.locations().values())
    for url in tuple(read):
        with contextlib.suppress(WinnowError):  # no such file
            read += map(str, read_locations(url).values())
    if storage.absolute(stage.out).rstrip("/") in (storage.absolute(url).rstrip("/") for url in read):
        raise UsageError(f"{stage.name} would write over what it reads", where=stage.out, do="Give another directory.")


def _whole(stage: Stage, manifest: Manifest, done: dict[str, Record]) -> bool:
    """Whether what `finish` wrote is there; the units' own files were looked at with their records."""
    looked_at = {path for record in done.values() for path in record.files}
    return all(
        storage.exists(stage.url(path)) and storage.size_of(stage.url(path)) == facts["bytes"]
        for path, facts in manifest.files.items()
        if path not in looked_at
    )


def _groups(units: list[Unit]) -> list[list[Unit]]:
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.group or f"\0{unit.name}", []).append(unit)
    return list(groups.values())


def _run_groups(
    stage: Stage,
    executor: Executor,
    groups: list[list[Unit]],
    retries: int,
    progress: StageProgress,
    done: dict[str, Record],
    failures: dict[str, Exception],
) -> None:
    attempts = dict.fromkeys(range(len(groups)), 0)
    waiting = list(range(len(groups)))
    while waiting:
        retry = []
        for result in executor.results(stage, [(index, groups[index]) for index in waiting]):
            if result is None:
                progress.tick(_notes(stage))
                continue
            if result.error is None:
                for record in result.records:
                    done[record.unit] = record
                    size = sum(facts["bytes"] for facts in record.files.values())
                    progress.add(items=record.items, size=size, skipped=len(record.skipped))
                continue
            if isinstance(result.error, UsageError):
                raise result.error
            attempts[result.index] += 1
            names = ", ".join(unit.name for unit in groups[result.index])
            progress.log.event(event="failure", stage=progress.label, units=names, error=str(result.error))
            if attempts[result.index] <= retries and not isinstance(result.error, WinnowError):
                retry.append(result.index)
            else:
                failures.update({unit.name: result.error for unit in groups[result.index]})
        waiting = retry


def _failed_units(stage: Stage, units: list[Unit], failures: dict[str, Exception], log: RunLog) -> list[Unit]:
    lost = [unit for unit in units if unit.name in failures]
    if not lost:
        return []
    reasons: dict[str, list[str]] = {}
    for unit in lost:
        reasons.setdefault(_reason(failures[unit.name]), []).append(unit.name)
    for reason, names in reasons.items():
        log.say(f"{stage.name}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} failed: {reason}")
    if not stage.allow_failures or len(lost) == len(units):
        first = failures[lost[0].name]
        if len(lost) == 1 and isinstance(first, WinnowError):
            raise first
        raise WinnowError(
            f"{len(lost)} of {len(units)} units failed; the first, {lost[0].name}: {type(first).__name__}: {first}",
            where=stage.name,
            do="What is finished is kept; run again to try the rest.",
        ) from first
    return lost


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _notes(stage: Stage) -> str:
    url = stage.url(NOTES)
    if not storage.is_local(url):
        return ""
    return "  ".join(filter(None, (read_note(storage.join(url, name)) for name in storage.list_names(url))))


def note_url(stage: Stage, unit: Unit) -> str:
    """Where a unit of a stage leaves its progress note."""
    return stage.url(NOTES, unit.name.replace("/", "-"))


__all__ = ["Budget", "Skipped", "execute", "note_url"]

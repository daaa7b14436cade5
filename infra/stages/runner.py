"""Running a stage: finished units are reused, the others go to an executor, those that keep failing are skipped."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from winnow.infra.errors import StorageError, UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.stages.counts import count_samples
from winnow.infra.stages.executors import Executor
from winnow.infra.stages.progress import RunLog, StageProgress, read_note
from winnow.infra.stages.stage import (
    INCOMPLETE,
    LOCATIONS,
    MANIFEST,
    RECORDS,
    SOURCES,
    Manifest,
    Record,
    Stage,
    Unit,
    are_whole,
    describe_files,
    pending_units,
    read_locations,
    read_manifest,
    remove_stale,
)

NOTES = "notes"


@dataclass(frozen=True)
class Budget:
    """How much may be skipped before a run counts as failed: a fraction of the items when below 1, else a number.

    Raises UsageError when it is below 0.
    """

    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        if not self.max_skipped >= 0:
            raise UsageError(f"max_skipped cannot be {self.max_skipped:g}", do="Give a fraction or a number.")

    def check(self, reasons: Counter[str], items: int, where: str, skipped: Iterable[Mapping[str, Any]] = ()) -> None:
        """Raises WinnowError when too much was skipped: numbers by reason, against items that were not skipped. One of
        `skipped` is named."""
        count, total = reasons.total(), items + reasons.total()
        limit = self.max_skipped * total if self.max_skipped < 1 else self.max_skipped
        if count > limit:
            most = reasons.most_common(5)
            first = next((item for item in skipped if item["reason"] == most[0][0]), None)
            listed = ", ".join(f"{reason}: {n}" for reason, n in most)
            example = f"; the first is {first['id']}. {first['detail']}".rstrip(". ") if first else ""
            what = f"{count} of {total} skipped, the budget is {self} ({listed}){example}"
            raise WinnowError(what, where=where, do="Fix the input, or raise max_skipped.")

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
    """Bring a stage to its manifest, which is read back or newly written.

    Args:
        stage: what to run.
        executor: where to run it.
        budget: how much may be skipped.
        log: where to report progress.
        retries: how often a failed group is retried.
        label: the stage's name in messages.

    Raises:
        UsageError: the recipe is wrong, or another process is writing the stage's directory.
        WinnowError: units kept failing, or more was skipped than the budget allows.
    """
    budget, log, label = budget or Budget(), log or RunLog(stream=None), label or stage.name
    units, done = pending_units(stage)
    key = stage.manifest_key(units)
    todo = [unit for unit in units if unit.name not in done]
    groups: dict[str, list[Unit]] = {}
    for unit in todo:
        groups.setdefault(unit.group or f"\0{unit.name}", []).append(unit)
    previous = read_manifest(stage.out)
    _refuse_inputs(stage, previous)
    with storage.locked(stage.out):
        storage.sweep(stage.out, lambda folder: storage.exists(storage.join(folder, LOCATIONS)))
        _write_if_new(stage.url(LOCATIONS), stage.locations())
        if not todo and previous is not None and previous.key == key and _whole(stage, previous, done):
            skipped = Counter(previous.skipped["reasons"])
            total = count_samples(stage, units, done, {}).total
            budget.check(skipped, total - skipped.total(), label, previous.skipped["samples"])
            _write_sources(stage, units, done)
            log.event(event="unchanged", stage=label, units=len(units))
            log.say(f"{label:<24} unchanged ({len(units)} units)")
            return previous

        started = time.monotonic()
        log.event(event="start", stage=label, units=len(units), todo=len(todo))
        progress = StageProgress(log, label, len(todo), sum(unit.items for unit in todo))
        failures: dict[str, Exception] = {}
        if todo:
            storage.remove(stage.url(MANIFEST))  # it describes files that are about to be replaced
            with progress:
                _run_groups(stage, executor, list(groups.values()), retries, progress, done, failures)
        storage.remove(stage.url(NOTES))
        _report_failures(stage, units, failures, log)
        manifest = _finish(stage, units, done, failures, budget, label)
    log.say(progress.line() if not manifest.skipped["count"] else f"{progress.line()}  {manifest.state}")
    seconds = round(time.monotonic() - started, 3)
    log.event(event="done", stage=label, state=manifest.state, **progress.facts() | {"seconds": seconds})
    return manifest


def _whole(stage: Stage, manifest: Manifest, done: dict[str, Record]) -> bool:
    """Whether the files that `finish` wrote are there; those of units were checked with their records."""
    checked = {path for record in done.values() for path in record.files}
    rest = {path: facts for path, facts in manifest.files.items() if path not in checked}
    return are_whole(stage, rest, stage.url(MANIFEST))


def _write_if_new(url: str, content: dict[str, Any]) -> None:
    with contextlib.suppress(WinnowError):  # a damaged file is replaced
        if storage.exists(url) and storage.read_json(url) == content:
            return
    storage.write_json(url, content)


def _write_sources(stage: Stage, units: list[Unit], done: dict[str, Record]) -> None:
    if sources := stage.read_in_place(units, done):
        _write_if_new(stage.url(SOURCES), sources)


def _finish(
    stage: Stage, units: list[Unit], done: dict[str, Record], failures: dict[str, Exception], budget: Budget, label: str
) -> Manifest:
    """Run the stage's last step and write the manifest, unless more was skipped than the budget allows."""
    records = [done[unit.name] for unit in units if unit.name in done]
    lost = {unit.name: _reason(failures[unit.name]) for unit in units if unit.name in failures}
    counts = count_samples(stage, units, done, lost)
    skipped, reasons = counts.skipped, counts.reasons
    budget.check(reasons, counts.total - reasons.total(), label, skipped)
    storage.remove(stage.url(MANIFEST))
    finished = stage.finish(records)
    files = {path: facts for record in records for path, facts in record.files.items()}
    files |= describe_files(stage, finished.files)
    skipped += [item.as_json() for item in finished.skipped]
    reasons.update(item.reason for item in finished.skipped)
    budget.check(reasons, counts.total - reasons.total(), label, skipped)
    remove_stale(stage, units, files)
    manifest = Manifest(
        stage=stage.name,
        version=stage.version,
        key=stage.manifest_key(units),
        params=stage.params(),
        parents=stage.parents(),
        units=len(records),
        items=sum(record.items for record in records) - len(finished.skipped),
        skipped={
            "count": reasons.total(),
            "reasons": dict(sorted(reasons.items())),
            "samples": skipped[:1000],
            "units": lost,
        },
        files=dict(sorted(files.items())),
        values=finished.values,
        url=stage.out,
    )
    # The next run must retry missing units, so its key must not match.
    retry = bool(lost) or any(record.key == INCOMPLETE for record in records)
    _write_sources(stage, units, done)
    body = asdict(manifest) | ({"key": INCOMPLETE} if retry else {})
    body.pop("url")
    storage.write_json(stage.url(MANIFEST), body)
    return manifest


def _refuse_inputs(stage: Stage, previous: Manifest | None) -> None:
    """Raises UsageError where a stage would overwrite what it reads, or the output of another kind of stage."""
    if previous is not None and previous.stage != stage.name:
        what = f"holds the output of {previous.stage}, and {stage.name} would overwrite it"
        raise UsageError(what, where=stage.out, do="Give another directory.")
    check_output(stage.name, stage.out, stage.locations().values(), stage.alone)


def check_output(name: str, out: str, read: Iterable[str], alone: Iterable[str] = ()) -> None:
    """Raises UsageError where a stage would write into a directory that it reads, of shards or of a pool or one that a
    pool's shards lie in, or would mix its files with others in a directory that is no stage's.

    Args:
        name: of the stage.
        out: its directory.
        read: directories that it reads.
        alone: see `Stage.alone`.
    """
    read = list(read)
    for url in tuple(read):
        with contextlib.suppress(WinnowError):  # no such file
            read += map(str, read_locations(url).values())
    do = "Give another directory."
    if _real(out) in map(_real, read):
        raise UsageError(f"{name} would overwrite what it reads", where=out, do=do)
    names = storage.list_names(out) if alone else []
    foreign = [file for file in names if file.endswith(tuple(alone))]
    if foreign and not {LOCATIONS, MANIFEST, RECORDS} & set(names):
        what = f"holds {len(foreign)} files that {name} did not write ({foreign[0]}) and would mix with its own"
        raise UsageError(what, where=out, do=do)


def _real(url: str) -> str:
    url = storage.absolute(url).rstrip("/")
    return os.path.realpath(url) if storage.is_local(url) else url


def _run_groups(
    stage: Stage,
    executor: Executor,
    groups: list[list[Unit]],
    retries: int,
    progress: StageProgress,
    done: dict[str, Record],
    failures: dict[str, Exception],
) -> None:
    """Run the groups, adding to `done` and `failures`. Errors that may pass (any but WinnowError) are retried."""
    attempts: Counter[int] = Counter()
    waiting = list(range(len(groups)))
    while waiting:
        retry = []
        for result in executor.results(stage, [(index, groups[index]) for index in waiting]):
            if isinstance(result, str):
                progress.tick("  ".join(filter(None, (result, _notes(stage)))))
            elif result.error is None:
                for record in result.records:
                    done[record.unit] = record
                    size = sum(facts["bytes"] for facts in record.files.values())
                    skipped = sum(item.get("count", 1) for item in record.skipped)
                    progress.add(items=record.items, size=size, skipped=skipped)
            elif isinstance(result.error, UsageError):
                raise result.error
            else:
                attempts[result.index] += 1
                names = [unit.name for unit in groups[result.index]]
                facts = {"units": ", ".join(names), "error": str(result.error)}
                progress.log.event(event="failure", stage=progress.label, **facts)
                if attempts[result.index] <= retries and not isinstance(result.error, (StorageError, WinnowError)):
                    retry.append(result.index)
                else:
                    failures.update(dict.fromkeys(names, result.error))
        waiting = retry


def _report_failures(stage: Stage, units: list[Unit], failures: dict[str, Exception], log: RunLog) -> None:
    """Say which units failed. Raises WinnowError where the stage allows no failures, or no unit succeeded, or the
    storage failed, on which no result may depend."""
    reasons: dict[str, list[str]] = {}
    for name in (lost := [unit.name for unit in units if unit.name in failures]):
        reasons.setdefault(_reason(failures[name]), []).append(name)
    for reason, names in reasons.items():
        log.say(f"{stage.name}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} failed: {reason}")
    for error in (failures[name] for name in lost):
        if isinstance(error, StorageError):
            raise error
    if not lost or (stage.allow_failures and len(lost) < len(units)):
        return
    first = failures[lost[0]]
    if len(lost) == 1 and isinstance(first, WinnowError):
        raise first
    what = f"{len(lost)} of {len(units)} units failed; the first, {lost[0]}: {type(first).__name__}: {first}"
    raise WinnowError(what, where=stage.name, do="What is finished is kept; run again to retry the rest.") from first


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _notes(stage: Stage) -> str:
    url = stage.url(NOTES)
    names = storage.list_names(url) if storage.is_local(url) else []
    return "  ".join(filter(None, (read_note(storage.join(url, name)) for name in names)))


def note_url(stage: Stage, unit: Unit) -> str:
    """Where a unit of a stage writes its progress note."""
    return stage.url(NOTES, unit.name.replace("/", "-"))

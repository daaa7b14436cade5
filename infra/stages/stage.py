"""The Stage contract: plan(inputs) -> units, run(unit) -> output, finish(records) -> manifest.

A stage writes a directory. Each unit's files appear whole or not at all, its record last, the manifest after all
records. A unit is finished when its record bears the key `sha256(stage, version, parameters, input digests)`, whatever
executor or number of workers made it; so running again does only what is missing, and changed parameters or inputs
never reuse an old file.
"""

from __future__ import annotations

import abc
import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.storage import digest_json
from winnow.infra.stages.resources import Resources

RECORDS = "units"
MANIFEST = "manifest.json"
LOCATIONS = "locations.json"
# Names that files written by earlier versions use.
_OLD_LOCATIONS = "places.json"
_OLD_FIELDS = {"set_aside": "skipped"}
INCOMPLETE = "incomplete"  # key of a record or manifest that the next run must make anew


@dataclass(frozen=True)
class Unit:
    """A piece of a stage's work that is done, retried or skipped as one.

    Attributes:
        name: unique within the stage; may contain "/"; names the record's file.
        inputs: what is read, by digest. Part of the key.
        params: parameters of this unit beyond the stage's. Part of the key; JSON values.
        runtime: where the inputs are and other things that do not change the result. JSON values.
        group: units of one group run in one call of `Stage.run_group`, so that work they share is done once.
        items: how many samples (or steps) it covers, for progress and the skipped budget.
    """

    name: str
    inputs: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    items: int = 0


@dataclass(frozen=True)
class Skipped:
    """A sample left out, and why. `reason` is one of a few fixed phrases, so that they can be counted."""

    id: str
    reason: str
    detail: str = ""


@dataclass
class Output:
    """What running a unit gives: files written below the stage's directory, counts, and JSON values to pass on.

    With `retry` the next run tries the unit anew, for what went wrong may have passed by then.
    """

    files: list[str] = field(default_factory=list)
    items: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    retry: bool = False


@dataclass(frozen=True)
class Record:
    """A finished unit as its record file says. `files` maps relative paths to {"bytes", "sha256"}."""

    unit: str
    key: str
    files: dict[str, dict[str, Any]]
    items: int
    skipped: list[dict[str, str]]
    values: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a stage made, from what. Holds no times, hosts or absolute paths: equal work gives equal manifests."""

    stage: str
    version: int
    key: str
    params: dict[str, Any]
    parents: dict[str, str]
    units: int
    items: int
    skipped: dict[str, Any]
    files: dict[str, dict[str, Any]]
    values: dict[str, Any]
    url: str = field(default="", compare=False)

    @property
    def digest(self) -> str:
        return digest_json({name: value for name, value in asdict(self).items() if name != "url"})

    @property
    def state(self) -> str:
        n = self.skipped["count"]
        return f"complete with {n} skipped" if n else "complete"


class Stage(abc.ABC):
    """One arrow of the graph. Subclasses are dataclasses that pickle; they hold URLs and parameters, never data.

    Class attributes:
        name, version: part of every key; raise the version when the meaning of the output changes.
        keep_stale: keep finished units that the present plan does not list (columns, checkpoints), instead of
            removing their files (shards, which readers may list).
        allow_failures: whether a unit that keeps failing may be skipped within the budget, or ends the run.
        launches_workers: whether a unit itself asks the cluster for processes and waits for them (a training); it then
            runs in a thread of the driver; `resources`, what those processes take, bounds how many run at once.
        run_on_driver: whether a single group takes less time than starting a local Ray; it then runs in the driver.
        keep_workers: whether Ray runs the stage on long-lived processes also without a GPU.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    keep_stale: ClassVar[bool] = False
    allow_failures: ClassVar[bool] = False
    launches_workers: ClassVar[bool] = False
    run_on_driver: ClassVar[bool] = False
    keep_workers: ClassVar[bool] = False
    out: str

    @property
    def resources(self) -> Resources:
        """What a unit asks of the cluster while it runs."""
        return Resources()

    def setup(self) -> None:
        """Load what the units of this stage share (a model, a tokenizer). Called once in each worker process, before
        its first unit; what it loads it keeps in the process, not in the stage."""
        return

    @abc.abstractmethod
    def params(self) -> dict[str, Any]:
        """What decides the output beside the inputs; JSON values, no paths."""

    def parents(self) -> dict[str, str]:
        """Digests of what this stage reads, by name, for the manifest."""
        return {}

    @abc.abstractmethod
    def plan(self) -> list[Unit]:
        """The units, in order. Pure: the same inputs give the same list."""

    def locations(self) -> dict[str, str]:
        """URLs a reader of the output needs, by name. Kept beside the manifest and part of no digest, so that
        data may be moved without being made again."""
        return {}

    def run(self, unit: Unit) -> Output:
        """Do one unit. Deterministic; writes its files through `storage.writing`."""
        raise TypeError(f"{type(self).__name__} runs its units by group")

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        """Do the units of one group, yielding each as it is done."""
        for unit in units:
            yield unit, self.run(unit)

    def finish(self, records: list[Record]) -> Output:
        """Bring the records together; its files and values go into the manifest."""
        return Output()

    def key(self, unit: Unit) -> str:
        """sha256 over stage, version, parameters and input digests."""
        return digest_json([self.name, self.version, self.params(), dict(unit.params), dict(unit.inputs)])

    def manifest_key(self, units: Iterable[Unit]) -> str:
        keys = {unit.name: self.key(unit) for unit in units}
        return digest_json([self.name, self.version, self.params(), self.parents(), keys])

    def url(self, *parts: str) -> str:
        return storage.join(self.out, *parts)


def record_url(stage: Stage, unit_name: str) -> str:
    return stage.url(RECORDS, f"{unit_name}.json")


def describe_files(stage: Stage, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {
        path: {"bytes": storage.size_of(stage.url(path)), "sha256": storage.digest_file(stage.url(path))}
        for path in sorted(files)
    }


def write_record(stage: Stage, unit: Unit, output: Output) -> Record:
    """The last act of a unit."""
    record = Record(
        unit=unit.name,
        key=INCOMPLETE if output.retry else stage.key(unit),
        files=describe_files(stage, output.files),
        items=output.items,
        skipped=[asdict(item) for item in output.skipped],
        values=output.values,
    )
    storage.write_json(record_url(stage, unit.name), asdict(record))
    # As a later run will read it back, so that `finish` cannot tell a fresh record from an old one.
    return Record(**json.loads(storage.canonical_json(asdict(record))))


def read_record(stage: Stage, unit: Unit) -> Record | None:
    """The record of a finished unit; None when it is not there, bears another key, or its files are gone or cut."""
    url = record_url(stage, unit.name)
    if not storage.exists(url):
        return None
    try:
        record = Record(**_renamed(storage.read_json(url)))
    except (WinnowError, TypeError):
        return None
    if record.key != stage.key(unit):
        return None
    for path, facts in record.files.items():
        if not storage.exists(stage.url(path)) or storage.size_of(stage.url(path)) != facts["bytes"]:
            return None
    return record


def attempt(stage: Stage, units: list[Unit]) -> list[Record]:
    """Run one group where it is, skipping the units that an earlier attempt finished."""
    done = {unit.name: record for unit in units if (record := read_record(stage, unit)) is not None}
    todo = [unit for unit in units if unit.name not in done]
    if todo:
        with contextlib.closing(stage.run_group(todo)) as results:  # type: ignore[type-var]
            for unit, output in results:
                done[unit.name] = write_record(stage, unit, output)
    return [done[unit.name] for unit in units if unit.name in done]


def read_manifest(url: str) -> Manifest | None:
    """The manifest of a directory, or None."""
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        return Manifest(**_renamed(storage.read_json(path)), url=url)
    except TypeError:
        raise WinnowError(
            "is not a winnow manifest",
            where=path,
            do="Give another directory; or, if it is winnow's and damaged, remove that file and run again.",
        ) from None


def _renamed(content: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_FIELDS.get(name, name): value for name, value in content.items()}


def read_locations(url: str) -> dict[str, str]:
    """The locations of a directory's inputs by name. Raises WinnowError where there are none."""
    path = storage.join(url, LOCATIONS)
    old = storage.join(url, _OLD_LOCATIONS)
    found = storage.read_json(old if not storage.exists(path) and storage.exists(old) else path)
    return found if isinstance(found, dict) else {}


def need_manifest(url: str, what: str) -> Manifest:
    """The manifest of a directory that must be a finished stage's. Raises WinnowError."""
    manifest = read_manifest(url)
    if manifest is None:
        raise WinnowError(f"holds no finished {what} (no {MANIFEST})", where=url)
    return manifest


def pending_units(stage: Stage) -> tuple[list[Unit], dict[str, Record]]:
    """The plan, and the records of the units in it that are finished."""
    units = stage.plan()
    names = Counter(unit.name for unit in units)
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise WinnowError(f'{stage.name}: unit "{duplicates[0]}" is planned {names[duplicates[0]]} times')
    return units, {unit.name: record for unit in units if (record := read_record(stage, unit)) is not None}


def remove_stale(stage: Stage, units: list[Unit], files: Iterable[str]) -> None:
    """Remove units of an earlier plan that the present one does not list, so that no reader finds their files."""
    if stage.keep_stale:
        return
    planned = {f"{unit.name}.json" for unit in units}
    present = set(files)
    for name in _walk(stage.url(RECORDS)):
        if name in planned:
            continue
        with contextlib.suppress(WinnowError):
            for path in storage.read_json(stage.url(RECORDS, name)).get("files", {}):
                if path not in present:
                    storage.remove(stage.url(path))
        storage.remove(stage.url(RECORDS, name))


def _walk(url: str, prefix: str = "") -> list[str]:
    found = []
    for name in storage.list_names(url):
        inner = storage.join(url, name)
        if storage.is_dir(inner):
            found += _walk(inner, f"{prefix}{name}/")
        elif name.endswith(".json"):
            found.append(prefix + name)
    return found

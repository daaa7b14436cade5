"""The Stage contract: plan(inputs) -> units, run(unit) -> output, finish(records) -> manifest.

The files of a unit are written atomically, its record after them, and the manifest last. A unit is finished when its
record has the key `sha256(stage, version, parameters, input digests)`, whatever the executor and the number of workers.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import digest_json
from winnow.infra.stages.kept import MANIFEST, RECORDS, KeptFile
from winnow.infra.stages.resources import Resources

LOCATIONS, SOURCES = "locations.json", "sources.json"
_OLD_LOCATIONS, _OLD_FIELDS = "places.json", {"set_aside": "skipped"}  # of files that earlier versions wrote
INCOMPLETE = "incomplete"  # key of a record or manifest that the next run must redo


@dataclass(frozen=True)
class Unit:
    """A piece of a stage's work that is done, retried or skipped as one.

    Attributes:
        name: unique within the stage; may contain "/"; names the record's file.
        inputs: what is read, by digest. Part of the key.
        params: parameters of this unit beyond the stage's. Part of the key; JSON values.
        runtime: the URLs of the inputs, and whatever else does not change the result. JSON values.
        group: the units of a group run in one call of `Stage.run_group`, so that shared work is done once.
        items: number of samples (or steps), for progress and the budget of skipped samples.
    """

    name: str
    inputs: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    items: int = 0


@dataclass(frozen=True)
class Skipped:
    """Samples that were left out, and why.

    Attributes:
        id: of the sample, or of the shard that lost several.
        reason: one of a few fixed phrases, so that they can be counted.
        count: number of samples. 0 for the rest of a unit whose size is not known: what the unit has less than
            `Stage.expected`, or, where nothing says how many that is, as many as the unit has.
    """

    id: str
    reason: str
    detail: str = ""
    count: int = 1

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if (name, value) != ("count", 1)}


@dataclass
class Output:
    """The result of a unit.

    Attributes:
        files: written, relative to the stage's directory.
        items: number of samples (or steps) done.
        values: JSON values for the record (of `Stage.finish`: for the manifest).
        retry: whether the next run repeats the unit, because its problems may be temporary.
    """

    files: list[str] = field(default_factory=list)
    items: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    retry: bool = False


@dataclass(frozen=True)
class Record:
    """The content of a finished unit's record file. `files` maps relative paths to {"bytes", "sha256"}."""

    unit: str
    key: str
    files: dict[str, dict[str, Any]]
    items: int
    skipped: list[dict[str, Any]]
    values: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The output of a stage and its inputs. Without times, hosts or absolute paths: equal work, equal manifests."""

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
    """One step of the graph. Subclasses are picklable dataclasses that hold URLs and parameters, never data.

    Class attributes:
        name, version: part of every key; raise the version when the meaning of the output changes.
        keep_stale: keep finished units that the present plan does not list (columns, checkpoints), instead of
            removing their files (shards, which readers may list).
        allow_failures: whether a unit that keeps failing may be skipped within the budget, or ends the run.
        alone: ends of names ("." and extension) of files that readers of the directory list. A new directory must not
            hold such files of somebody else.
        launches_workers: whether a unit itself starts processes on the cluster (a training). It then runs in a thread
            of the driver, and `resources`, which those processes use, bounds how many run at once.
        run_on_driver: whether a single group runs in the driver instead of starting a local Ray, which takes longer.
        keep_workers: whether Ray runs the stage on long-lived processes also without a GPU.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    keep_stale: ClassVar[bool] = False
    allow_failures: ClassVar[bool] = False
    alone: ClassVar[tuple[str, ...]] = ()
    launches_workers: ClassVar[bool] = False
    run_on_driver: ClassVar[bool] = False
    keep_workers: ClassVar[bool] = False
    out: str

    @property
    def resources(self) -> Resources:
        """What a unit needs while it runs."""
        return Resources()

    def setup(self) -> None:
        """Load what the units share (a model, a tokenizer). Executors call it once in each worker process, before the
        first unit. Keep what is loaded in the process (a cache of the module), not in the stage."""
        return

    def setup_key(self) -> Any:
        """What decides what `setup` loads; a JSON value. A process calls `setup` again when it differs."""
        return self.params()

    @abc.abstractmethod
    def params(self) -> dict[str, Any]:
        """Everything but the inputs that decides the output; JSON values, no paths."""

    def parents(self) -> dict[str, str]:
        """Digests of the inputs by name, for the manifest."""
        return {}

    @abc.abstractmethod
    def plan(self) -> list[Unit]:
        """The units, in order. Pure: the same inputs give the same list."""

    def locations(self) -> dict[str, str]:
        """URLs that a reader of the output needs, by name. They are stored next to the manifest and are part of no
        digest, so that data may be moved."""
        return {}

    def read_in_place(self, units: Iterable[Unit], records: Mapping[str, Record]) -> dict[str, list[str]]:
        """Files that readers of the output read in place: by reference, the version token that each had when it was
        planned to be read, and the sha256 of what was read. Stored next to the manifest; part of no digest."""
        return {}

    def run(self, unit: Unit) -> Output:
        """Do one unit. Deterministic; writes its files through `storage.writing`."""
        raise TypeError(f"{type(self).__name__} runs its units by group")

    def run_group(self, units: list[Unit]) -> Iterator[tuple[Unit, Output]]:
        """Do the units of one group, yielding each as it is done."""
        for unit in units:
            yield unit, self.run(unit)

    def finish(self, records: list[Record]) -> Output:
        """Combine the records. The files and values that it returns go into the manifest."""
        return Output()

    def reads(self, unit: Unit) -> str:
        """Names the samples that a unit reads. Units that read the same samples count them once."""
        return unit.group or unit.name

    def expected(self, unit: Unit, whole: Sequence[Record]) -> int:
        """How many samples a unit should have that failed or lost some; 0 if nothing says so. `whole` are the records
        of units that lost no unknown number."""
        return unit.items

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
        path: {"bytes": storage.size_of(stage.url(path)), "sha256": content_digest(stage.url(path))}
        for path in sorted(files)
    }


def write_record(stage: Stage, unit: Unit, output: Output) -> Record:
    """Write the record of a unit whose files are complete."""
    record = {
        "unit": unit.name,
        "key": INCOMPLETE if output.retry else stage.key(unit),
        "files": describe_files(stage, output.files),
        "items": output.items,
        "skipped": [item.as_json() for item in output.skipped],
        "values": output.values,
    }
    storage.write_json(record_url(stage, unit.name), record)
    # Converted as by reading it back, so that `finish` cannot distinguish a new record from an old one.
    return Record(**json.loads(storage.canonical_json(record)))


def read_record(stage: Stage, unit: Unit) -> Record | None:
    """The record of a finished unit; None if it or a file is missing, its key differs, or a file is damaged."""
    url = record_url(stage, unit.name)
    if not storage.exists(url):
        return None
    try:
        record = Record(**_renamed(storage.read_json(url)))
    except (WinnowError, TypeError, AttributeError):
        return None
    return record if record.key == stage.key(unit) and are_whole(stage, record.files, url) else None


def are_whole(stage: Stage, files: Mapping[str, Mapping[str, Any]], since: str) -> bool:
    """Whether files exist with the content that the record or manifest `since` says."""
    kept = [KeptFile.written(stage.url(path), facts, since) for path, facts in files.items()]
    if all(file.is_untouched() for file in kept):
        return True
    if not all(file.is_whole() for file in kept):
        return False
    storage.touch(since)  # a directory that was copied is not read again by every run
    return True


def attempt(stage: Stage, units: list[Unit]) -> list[Record]:
    """Run one group in this process, except the units that an earlier attempt finished."""
    done = {unit.name: record for unit in units if (record := read_record(stage, unit)) is not None}
    todo = [unit for unit in units if unit.name not in done]
    if todo:
        with contextlib.closing(stage.run_group(todo)) as results:  # type: ignore[type-var]
            for unit, output in results:
                done[unit.name] = write_record(stage, unit, output)
    return [done[unit.name] for unit in units if unit.name in done]


def read_manifest(url: str) -> Manifest | None:
    """The manifest of a directory; None where there is none, or none that is whole next to records to go on from."""
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        return Manifest(**_renamed(storage.read_json(path)), url=url)
    except (TypeError, AttributeError, WinnowError) as error:
        if isinstance(error, WinnowError) and storage.is_dir(storage.join(url, RECORDS)):
            return None  # a machine that loses power leaves it empty or cut
        do = "Give another directory. If the file is winnow's and damaged, remove it and run again."
        raise WinnowError("is not a winnow manifest", where=path, do=do) from None


def _renamed(content: dict[str, Any]) -> dict[str, Any]:
    return {_OLD_FIELDS.get(name, name): value for name, value in content.items()}


def read_locations(url: str) -> dict[str, str]:
    """The locations of a directory's inputs by name. Raises WinnowError where there are none."""
    path = storage.join(url, LOCATIONS)
    old = storage.join(url, _OLD_LOCATIONS)
    found = storage.read_json(old if not storage.exists(path) and storage.exists(old) else path)
    return found if isinstance(found, dict) else {}


def read_sources(url: str) -> dict[str, tuple[str, str]]:
    """Version token and sha256 of each file that a directory's readers read in place, by reference
    (`Stage.read_in_place`). Directories of earlier versions have none."""
    path = storage.join(url, SOURCES)
    return _sources(path, storage.version_token(path)) if storage.exists(path) else {}


@functools.lru_cache(maxsize=8)
def _sources(path: str, token: str) -> dict[str, tuple[str, str]]:
    return {reference: (facts[0], facts[1]) for reference, facts in storage.read_json(path).items()}


def need_manifest(url: str, what: str) -> Manifest:
    """The manifest of a directory that must be a finished stage's. Raises WinnowError."""
    manifest = read_manifest(url)
    if manifest is None:
        if not storage.exists(storage.join(url, MANIFEST)):
            raise WinnowError(f"holds no finished {what} (no {MANIFEST})", where=url)
        do = "Run again what makes it; it goes on from what is there."
        raise WinnowError(f"holds no finished {what} ({MANIFEST} is damaged)", where=url, do=do)
    return manifest


def records_in(url: str) -> Iterator[tuple[str, Record | None]]:
    """The URLs of the records in a stage's directory, with what they hold; None where one is damaged."""
    for name in _walk(storage.join(url, RECORDS)):
        path = storage.join(url, RECORDS, name)
        try:
            yield path, Record(**_renamed(storage.read_json(path)))
        except (WinnowError, TypeError, AttributeError):
            yield path, None


def pending_units(stage: Stage) -> tuple[list[Unit], dict[str, Record]]:
    """The plan, and the records of the units in it that are finished."""
    units = stage.plan()
    names = Counter(unit.name for unit in units)
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise WinnowError(f'{stage.name}: unit "{duplicates[0]}" is planned {names[duplicates[0]]} times')
    return units, {unit.name: record for unit in units if (record := read_record(stage, unit)) is not None}


def remove_stale(stage: Stage, units: list[Unit], files: Iterable[str]) -> None:
    """Remove units of an earlier plan that the current plan does not list, so that no reader finds their files."""
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

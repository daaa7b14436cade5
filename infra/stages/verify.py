"""`winnow verify`: everything that the stages below a directory have recorded, compared with what is there now."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.prefetch import prefetch
from winnow.infra.stages.kept import MANIFEST, RECORDS
from winnow.infra.stages.stage import LOCATIONS, read_locations, read_manifest, read_sources, records_in

CHECKPOINT = "checkpoint.json"  # lists the files of a training's checkpoint in its folder


@dataclass(frozen=True)
class Expected:
    """A file, and what it should be: the sha256 of its content, or a fault that was found already."""

    url: str
    sha256: str = ""
    fault: str = ""


def verify(url: str) -> tuple[int, list[tuple[str, str]]]:
    """Read every file that was recorded below a directory: what stages have written, the shards that pools were
    indexed from, checkpoints to resume from. Size and time are not trusted here.

    Returns:
        (number of files, (file, fault) of each that is damaged).

    Raises:
        UsageError: nothing below the directory was written by a stage.
    """
    if not storage.is_dir(url):
        raise UsageError("no such folder", where=url)
    expected = {(file.url, file.sha256, file.fault): file for folder in _folders(url) for file in _expected(folder)}
    if not expected:
        raise UsageError("holds nothing that a stage of winnow has written", where=url)
    files = sorted(expected.values(), key=lambda file: file.url)
    faults = zip(files, prefetch(_fault, files), strict=True)
    return len({file.url for file in files}), sorted({(file.url, fault) for file, fault in faults if fault})


def _folders(url: str) -> Iterator[str]:
    yield url
    for name in storage.list_names(url):
        inner = storage.join(url, name)
        if name != RECORDS and storage.is_dir(inner):
            yield from _folders(inner)


def _expected(folder: str) -> Iterator[Expected]:
    names = set(storage.list_names(folder))
    if CHECKPOINT in names:
        yield from _of_listing(folder)
    if names & {MANIFEST, RECORDS, LOCATIONS}:
        yield from _of_stage(folder, names)
    yield from (Expected(storage.join(folder, name)) for name in names if name.endswith(".npz") and "fits" in folder)


def _of_listing(folder: str) -> Iterator[Expected]:
    try:
        files = storage.read_json(storage.join(folder, CHECKPOINT))["files"]
        yield from (Expected(storage.join(folder, name), str(sha256)) for name, sha256 in files.items())
    except (WinnowError, LookupError, TypeError, AttributeError):
        yield Expected(storage.join(folder, CHECKPOINT), fault="is damaged")


def _of_stage(folder: str, names: set[str]) -> Iterator[Expected]:
    """What the manifest, the records, and the list of what was read in place say of a stage's directory."""
    manifest = None
    if MANIFEST in names:
        try:
            manifest = read_manifest(folder)
            fault = "" if manifest is not None else "is damaged; run again, and the stage goes on from its records"
        except WinnowError as error:
            fault = error.what
        yield Expected(storage.join(folder, MANIFEST), fault=fault)
    listed = {} if manifest is None else manifest.files
    for path, facts in listed.items():
        yield Expected(storage.join(folder, path), facts["sha256"])
    for url, record in records_in(folder):
        yield Expected(url, fault="" if record is not None else "is damaged; run again, and the unit is recomputed")
        for path, facts in record.files.items() if record is not None else ():
            yield Expected(storage.join(folder, path), facts["sha256"])
    try:
        locations = read_locations(folder) if LOCATIONS in names else {}
        for reference, (_, sha256) in read_sources(folder).items():
            location, _, path = reference.partition("/")
            yield Expected(storage.join(locations[location], path), sha256)
    except (WinnowError, LookupError, TypeError, AttributeError):
        yield Expected(storage.join(folder, LOCATIONS), fault="this, or the file of sources next to it, is damaged")


def _fault(file: Expected) -> str:
    """What is wrong with a file; "" if it is as recorded."""
    if file.fault:
        return file.fault
    try:
        if file.sha256:
            return "" if content_digest(file.url) == file.sha256 else "is damaged: its content is not what was recorded"
        if file.url.endswith(".npz"):
            with zipfile.ZipFile(storage.open_read(file.url)) as archive:
                return "is damaged" if archive.testzip() is not None else ""
    except WinnowError as error:
        return error.what
    except (zipfile.BadZipFile, OSError) as error:
        return f"is damaged ({error})"
    return ""

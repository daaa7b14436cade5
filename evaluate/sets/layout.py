"""DataComp's evaluation layout: what lies in a data folder, and the samples of one set.

wds_<task>_test/classnames.txt                          one class a line, in label order
wds_<task>_test/zeroshot_classification_templates.txt   one prompt a line, with {c} for the class name
wds_<task>_test/dataset_type.txt                        "retrieval" for retrieval sets, else absent
wds_<task>_test/test/nshards.txt, test/0.tar, …         samples: KEY.jpg|png|webp with KEY.cls or KEY.txt, and for
                                                        sets with groups KEY.npy, a vector of whole numbers

Flickr, MSCOCO and WinoGAViL are not kept so; `winnow.evaluate.sets.packed` says how, and brings them into this layout.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from winnow.evaluate.sets import hub, packed
from winnow.evaluate.tasks.task import Task, TaskError, datacomp_tasks, extra_task, find_task
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.tar import tar_samples

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
MEMBERS = ("cls", "txt", "npy")  # what is read of a sample beside its image
# Of several images in a sample, the one that DataComp's evaluation takes.
IMAGES = ("webp", "png", "jpg", "jpeg", *(ext for ext in EXTENSIONS if ext not in ("webp", "png", "jpg", "jpeg")))
FOLDERS = r"wds_[^,.\x00-\x1f][^,\x00-\x1f]*_test"
MAX_TEXT_BYTES = 64 << 20
MAX_SHARDS = 100_000
CLASSIFIED = ("zeroshot_classification", "grouped_classification", "face_attributes", "multilabel")  # kinds
DATACOMP_OWNER = "djghosh"  # of DataComp's sets on the hub
MAX_GROUPS = 1_000_000  # values of a field of the metadata
OBJECTIVES = ("race", "gender", "age", "toxic")  # of a set of faces; in its text files a line begins with one and ":"


@dataclass(frozen=True)
class FoundTask:
    """A task and the folder that holds its test set."""

    task: Task
    url: str


@dataclass(frozen=True)
class Association:
    """A cue, the keys of the images shown with it, and of those among them that belong to it (WinoGAViL)."""

    cue: str
    candidates: tuple[str, ...]
    selected: frozenset[str]


@dataclass(frozen=True)
class Sample:
    """One image of a test set, still encoded, with its captions, its task's `metadata` or its label, -1 for one of a
    class that does not count."""

    key: str
    image: bytes
    label: int = -1
    captions: tuple[str, ...] = ()
    metadata: tuple[float, ...] = ()


def find_tasks(data_url: str, names: Sequence[str] | str = "all") -> list[FoundTask]:
    """The tasks of a data folder: DataComp's in the order of their keys, then the others by name.

    Args:
        data_url: the folder of `wds_<task>_test` folders, with `hf_cache/` beside them where DataComp's script filled
            it; or "hf://datasets/OWNER[@REVISION]", on whose every repository the tasks' revisions are read unless one
            is given. There all 40 are taken to be; what is not is told of when it is opened.
        names: "all" for whatever is there, or keys or names of tasks.

    Raises:
        UsageError: no such folder, no task in it, or a named task that is unknown or not there.
    """
    if hub.is_data(data_url):
        return _on_the_hub(data_url, names)
    if not storage.is_dir(data_url):
        raise UsageError("no such folder", where=data_url, do="It should hold wds_<task>_test folders.")
    present = [name for name in storage.list_names(data_url) if re.fullmatch(FOLDERS, name)]
    cached = packed.in_datasets_cache(data_url)
    by_folder = {task.data_folder: task for task in datacomp_tasks().values()}
    found = {}
    for name, task in by_folder.items():
        if name in present:
            found[task.key] = FoundTask(task, storage.join(data_url, name))
        elif task.hub in cached:
            found[task.key] = FoundTask(task, cached[task.hub])
    for name in present:
        if name not in by_folder:
            url = storage.join(data_url, name)
            task = extra_task(name, _kind(url), _count_classes(url))
            found[task.key] = FoundTask(task, url)
    if not found:
        raise UsageError("holds no wds_<task>_test folder", where=data_url)
    if names == "all":
        return list(found.values())
    known = datacomp_tasks() | {entry.task.key: entry.task for entry in found.values()}
    selected = {}
    for word in [names] if isinstance(names, str) else names:
        task = find_task(word, known)
        if task.key not in found:
            raise UsageError(
                f'no data for task "{task.key}"', where=data_url, do=f"It should lie in {task.data_folder}/."
            )
        selected[task.key] = found[task.key]
    return [entry for key, entry in found.items() if key in selected]


def is_data(data_url: str) -> bool:
    """Whether `find_tasks` can be asked for the tasks of a URL."""
    return hub.is_data(data_url) or storage.is_dir(data_url)


def _on_the_hub(data_url: str, names: Sequence[str] | str) -> list[FoundTask]:
    owner, revision = hub.parse_data(data_url)
    known = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"}
    selected = known
    if names != "all":
        words = {find_task(word, known).key for word in ([names] if isinstance(names, str) else names)}
        selected = {key: task for key, task in known.items() if key in words}
    found = []
    for task in selected.values():
        pinned = task.revision if task.hub or owner == DATACOMP_OWNER else None
        repo = task.hub or f"{owner}/{task.data_folder}"
        found.append(FoundTask(task, hub.url_of(repo, revision or pinned or hub.MAIN)))
    return found


def _kind(url: str) -> str:
    """The kind of a set outside the list: what `dataset_type.txt` says, else classification."""
    path = storage.join(url, TYPE)
    if not storage.exists(path):
        return "zeroshot_classification"
    word = storage.read_bytes(path)[:100].decode("utf-8-sig", "replace").strip().lower()
    # What the groups are would stand in a task file; without one the set is one of classes.
    return "zeroshot_classification" if word in ("", "classification", "grouped_classification") else word


def _count_classes(url: str) -> int | None:
    path = storage.join(url, CLASSNAMES)
    try:
        count = len(_lines(path))
    except WinnowError:
        return None
    return count if count > 1 else None


def _lines(path: str) -> list[str]:
    """Stripped lines without the empty ones at the end. Raises TaskError."""
    if not storage.exists(path):
        raise TaskError("no such file", where=path)
    if storage.size_of(path) > MAX_TEXT_BYTES:
        raise TaskError(f"is larger than {MAX_TEXT_BYTES >> 20} MiB", where=path)
    try:
        lines = [line.strip() for line in storage.read_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise TaskError(f"is not UTF-8 (byte {error.start})", where=path) from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


@dataclass(frozen=True)
class EvalSet:
    """A test set whose text files have been read and agree with its task.

    Attributes:
        task: what is evaluated.
        url: its folder.
        classnames: in label order; empty for a set whose images have captions instead of labels.
        templates: prompts with {c}; empty likewise.
        tars: URLs of the shards, in order.
        kept: for a set with more classes than its task, the place of each kept class by its label there, else None.
    """

    task: Task
    url: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    tars: tuple[str, ...]
    kept: Mapping[int, int] | None = None

    @staticmethod
    def open(found: FoundTask) -> EvalSet:
        """Read the text files of a set; a packed one is unpacked first. Raises TaskError naming the file at fault.

        Retrieval sets have captions, classification sets labels; sets of other kinds have labels if they have a
        `classnames.txt`.
        """
        task, url = found.task, packed.layout(found.url)
        tars = split_tars(url)
        names_url, templates_url = storage.join(url, CLASSNAMES), storage.join(url, TEMPLATES)
        if task.kind not in CLASSIFIED and (task.kind in ("retrieval", "winogavil") or not storage.exists(names_url)):
            test_set = EvalSet(task, url, (), (), tars)
            if task.kind == "winogavil":
                test_set.associations()
            return test_set
        classnames, templates = _lines(names_url), _lines(templates_url)
        kept = None
        mapping = storage.join(url, task.mapping) if task.mapping else ""
        if mapping and task.classes is not None and len(classnames) > task.classes and storage.exists(mapping):
            classnames, kept = _mapped(classnames, mapping)
        if task.classes is not None and len(classnames) != task.classes:
            raise TaskError(
                f"has {len(classnames)} class names, {task.name} has {task.classes} classes", where=names_url
            )
        if len(classnames) < 2:
            raise TaskError("fewer than two class names", where=names_url)
        if "" in classnames:
            raise TaskError("the class name is empty", where=f"{names_url}:{classnames.index('') + 1}")
        if not templates:
            raise TaskError("holds no template", where=templates_url)
        for number, template in enumerate(templates, start=1):
            if "{c}" not in template:
                raise TaskError(
                    f'the template "{template}" has no {{c}} for the class name', where=f"{templates_url}:{number}"
                )
        if task.kind == "face_attributes":
            _check_objectives(classnames, names_url)
            _check_objectives(templates, templates_url)
        return EvalSet(task, url, tuple(classnames), tuple(templates), tars, kept)

    def prompts(self, classname: str) -> list[str]:
        """The prompts of a class. (`{c}` is replaced as text; other braces mean nothing, unlike in `str.format`.)

        Of a set of faces, where a class name reads "race:white", the templates that read "race:…", both without it.
        """
        if self.task.kind != "face_attributes":
            return [template.replace("{c}", classname) for template in self.templates]
        objective, _, name = classname.partition(":")
        templates = [template.partition(":") for template in self.templates]
        return [template.replace("{c}", name) for start, _, template in templates if start == objective]

    def samples(self) -> Iterator[Sample]:
        """The samples in order. Raises TaskError for a cut tar, a missing image or label, a label out of range."""
        count = 0
        for tar in self.tars:
            with storage.open_read(tar) as file:
                try:
                    for key, members in tar_samples(file, (*EXTENSIONS, *MEMBERS)):
                        yield self.sample(tar, key, {ext: member.data for ext, member in members.items()})
                        count += 1
                except TaskError:
                    raise
                except WinnowError as error:
                    raise TaskError(error.what, where=tar, do=error.do) from error
        if not count:
            raise TaskError("holds no sample", where=storage.join(self.url, "test"))

    def associations(self) -> list[Association]:
        """Those of a WinoGAViL set, out of its `associations.jsonl`. Raises TaskError naming the line at fault."""
        path = storage.join(self.url, packed.ASSOCIATIONS)
        found = []
        for number, line in enumerate(_lines(path), start=1):
            try:
                entry = json.loads(line)
                one = Association(entry["cue"], tuple(entry["candidates"]), frozenset(entry["associations"]))
                # Those that were not shown do not count, as in DataComp's evaluation.
                one = replace(one, selected=one.selected & set(one.candidates))
                fault = not one.cue or not one.selected
            except (ValueError, TypeError, KeyError):
                fault = True
            if fault:
                raise TaskError(
                    "should be an object with a cue, candidates, and associations among them", where=f"{path}:{number}"
                )
            found.append(one)
        return found

    def sample(self, tar: str, key: str, members: Mapping[str, bytes]) -> Sample:
        """What the members of a sample (by extension) say. Raises TaskError."""
        where = f"{tar}, sample {key}"
        ext = next((ext for ext in IMAGES if ext in members), None)
        if ext is None:
            raise TaskError("no image", where=where)
        if self.task.kind == "winogavil":
            return Sample(key, members[ext])
        metadata = self._metadata(members.get("npy"), where)
        if self.task.kind in ("face_attributes", "multilabel"):
            return Sample(key, members[ext], metadata=metadata)
        if not self.classnames:
            if "txt" not in members:
                raise TaskError("no captions (.txt)", where=where)
            try:
                lines = [line for line in members["txt"].decode("utf-8").splitlines() if line.strip()]
            except UnicodeDecodeError:
                raise TaskError("captions are not UTF-8", where=where) from None
            if not lines:
                raise TaskError("no captions (.txt is empty)", where=where)
            return Sample(key, members[ext], captions=tuple(lines))
        if "cls" not in members:
            raise TaskError("no label (.cls)", where=where)
        if not re.fullmatch(rb"\s*-?\d{1,18}\s*", members["cls"]):
            raise TaskError(f"the label {members['cls'][:32]!r} is no whole number", where=where)
        label = int(members["cls"])
        if self.kept is not None and label >= 0:
            label = self.kept.get(label, -1)
        elif not 0 <= label < len(self.classnames):
            raise TaskError(
                f"label {label} is out of range: {CLASSNAMES} has {len(self.classnames)} classes", where=where
            )
        return Sample(key, members[ext], label=label, metadata=metadata)

    def _metadata(self, data: bytes | None, where: str) -> tuple[float, ...]:
        """The values of the task's `metadata`, of a multi-label set one for each class; nan where the sample has none
        and no main metric needs them."""
        task = self.task
        size = len(self.classnames) if task.kind == "multilabel" else len(task.metadata)
        if not size:
            return ()
        if data is None:
            if task.needs_metadata:
                raise TaskError("no metadata (.npy)", where=where)
            return (math.nan,) * size
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False).ravel()
        except (ValueError, EOFError, OSError) as error:
            raise TaskError(f"the metadata (.npy) cannot be read ({error})", where=where) from None
        if len(array) < size or array.dtype.kind not in "biuf":
            raise TaskError(
                f"the metadata (.npy) holds {len(array)} values of type {array.dtype}, {size} numbers are due",
                where=where,
            )
        values = tuple(float(value) for value in array[:size])
        for name in task.group_by or task.metadata:
            value = values[task.metadata.index(name)]
            if not 0 <= value < MAX_GROUPS:
                raise TaskError(f"the metadata (.npy) gives {name} as {value:g}, which is no group", where=where)
        return values


def _mapped(classnames: Sequence[str], mapping: str) -> tuple[list[str], dict[int, int]]:
    """The class names that are keys of a JSON object (case apart), in their order, and the new labels by the old."""
    names = storage.read_json(mapping)
    if not isinstance(names, dict):
        raise TaskError("should be an object with class names for keys", where=mapping)
    wanted = {str(name).lower() for name in names}
    labels = [label for label, name in enumerate(classnames) if name.lower() in wanted]
    return [classnames[label] for label in labels], {label: index for index, label in enumerate(labels)}


def _check_objectives(lines: Sequence[str], url: str) -> None:
    starts = [line.partition(":")[0] for line in lines]
    for number, start in enumerate(starts, start=1):
        if start not in OBJECTIVES:
            raise TaskError(f'"{start}" is none of {", ".join(OBJECTIVES)}', where=f"{url}:{number}")
    for objective in OBJECTIVES:
        if objective not in starts:
            raise TaskError(f'no line begins with "{objective}:"', where=url)


def split_tars(url: str, split: str = "test") -> tuple[str, ...]:
    """URLs of the shards of a split, in order. Raises TaskError when one is missing."""
    url = packed.layout(url)
    path = storage.join(url, split, "nshards.txt")
    lines = _lines(path)
    if len(lines) != 1 or not lines[0].isdecimal() or not 0 < int(lines[0]) <= MAX_SHARDS:
        raise TaskError(f"should hold the number of {split} shards", where=path)
    tars = tuple(storage.join(url, split, f"{number}.tar") for number in range(int(lines[0])))
    for tar in tars:
        if not storage.exists(tar):
            raise TaskError("no such file", where=tar, do=f"nshards.txt counts {len(tars)} shards.")
        if storage.is_local(tar) and storage.is_dir(tar):
            raise TaskError("is a folder", where=tar)
    return tars


def data_digest(url: str, split: str = "test") -> str:
    """Digest of a split of a set: of the content of its text files and shards where they are local, of the store's
    version tokens where they are not. One that cannot be read counts as such; the one who wants it says so."""
    files = [name for name in storage.list_names(url) if name.endswith((".txt", ".json", ".jsonl"))]
    inner = [name for name in storage.list_names(storage.join(url, split)) if name.endswith((".txt", ".tar"))]
    files += [f"{split}/{name}" for name in inner]
    files += packed.files(url)

    def digest(name: str) -> str:
        try:
            return file_digest(storage.join(url, name))
        except OSError as error:
            return f"unreadable: {error.strerror}"

    return storage.digest_json({name: digest(name) for name in files})


def file_digest(url: str) -> str:
    """Digest of a file's content where it is local, else the store's version token."""
    token = storage.version_token(url)
    return _content_digest(url, token) if storage.is_local(url) else token


@functools.lru_cache(maxsize=4096)
def _content_digest(url: str, token: str) -> str:
    """The token is there so that a file that changed is read again."""
    return storage.digest_file(url)

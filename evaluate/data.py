"""DataComp's evaluation layout: what lies in a data folder, and the samples of one set.

wds_<task>_test/classnames.txt                          one class a line, in label order
wds_<task>_test/zeroshot_classification_templates.txt   one prompt a line, with {c} for the class name
wds_<task>_test/dataset_type.txt                        "retrieval" for retrieval sets, else absent
wds_<task>_test/test/nshards.txt, test/0.tar, …         samples: KEY.jpg|png|webp with KEY.cls or KEY.txt
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluate.tasks import Task, datacomp_tasks, extra_task, find_task
from infra import storage
from infra.errors import UsageError, WinnowError
from infra.index import tar_samples
from infra.pictures import EXTENSIONS

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
MAX_TEXT_BYTES = 64 << 20
MAX_SHARDS = 100_000


class TaskError(WinnowError):
    """A test set that cannot be evaluated as it is; trying again does not help."""


@dataclass(frozen=True)
class FoundTask:
    """A task and the folder that holds its test set."""

    task: Task
    url: str


@dataclass(frozen=True)
class Sample:
    """One picture of a test set, still encoded, with its label or its captions."""

    key: str
    image: bytes
    label: int = -1
    captions: tuple[str, ...] = ()


def find_tasks(data_url: str, names: Sequence[str] | str = "all") -> list[FoundTask]:
    """The tasks of a data folder: DataComp's in the order of their keys, then the others by name.

    Args:
        data_url: the folder of `wds_<task>_test` folders.
        names: "all" for whatever is there, or keys or names of tasks.

    Raises:
        UsageError: no such folder, no task in it, or a named task that is unknown or not there.
    """
    if not storage.is_dir(data_url):
        raise UsageError("no such folder", where=data_url, do="It should hold wds_<task>_test folders.")
    present = [name for name in storage.list_names(data_url) if name.startswith("wds_") and name.endswith("_test")]
    by_folder = {task.data_folder: task for task in datacomp_tasks().values()}
    found = {
        task.key: FoundTask(task, storage.join(data_url, name)) for name, task in by_folder.items() if name in present
    }
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
    chosen = {}
    for word in [names] if isinstance(names, str) else names:
        task = find_task(word, known)
        if task.key not in found:
            raise UsageError(
                f'no data for task "{task.key}"', where=data_url, do=f"It should lie in {task.data_folder}/."
            )
        chosen[task.key] = found[task.key]
    return [entry for key, entry in found.items() if key in chosen]


def _kind(url: str) -> str:
    """The kind of a set outside the list: what `dataset_type.txt` says, else classification."""
    path = storage.join(url, TYPE)
    if not storage.exists(path):
        return "zeroshot_classification"
    word = storage.read_bytes(path)[:100].decode("utf-8", "replace").strip().lower()
    return "zeroshot_classification" if word in ("", "classification") else word


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
        lines = [line.strip() for line in storage.read_bytes(path).decode("utf-8").splitlines()]
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
        classnames: in label order; empty for a set whose pictures have captions instead of labels.
        templates: prompts with {c}; empty likewise.
        tars: URLs of the shards, in order.
    """

    task: Task
    url: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    tars: tuple[str, ...]

    @staticmethod
    def open(found: FoundTask) -> EvalSet:
        """Read the text files of a set. Raises TaskError naming the file at fault.

        Retrieval sets have captions, classification sets labels; sets of other kinds have labels if they have a
        `classnames.txt`.
        """
        task, url = found.task, found.url
        tars = _tars(url)
        names_url, templates_url = storage.join(url, CLASSNAMES), storage.join(url, TEMPLATES)
        if task.kind == "retrieval" or (task.kind != "zeroshot_classification" and not storage.exists(names_url)):
            return EvalSet(task, url, (), (), tars)
        classnames, templates = _lines(names_url), _lines(templates_url)
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
        return EvalSet(task, url, tuple(classnames), tuple(templates), tars)

    def prompts(self, classname: str) -> list[str]:
        """The prompts of a class. (`{c}` is replaced as text; other braces mean nothing, unlike in `str.format`.)"""
        return [template.replace("{c}", classname) for template in self.templates]

    def samples(self) -> Iterator[Sample]:
        """The samples in order. Raises TaskError for a cut tar, a missing picture or label, a label out of range."""
        count = 0
        for tar in self.tars:
            with storage.open_read(tar) as file:
                try:
                    for key, members in tar_samples(file, (*EXTENSIONS, "cls", "txt")):
                        yield self._sample(tar, key, {ext: member.data for ext, member in members.items()})
                        count += 1
                except TaskError:
                    raise
                except WinnowError as error:
                    raise TaskError(error.what, where=tar, do=error.do) from error
        if not count:
            raise TaskError("holds no sample", where=storage.join(self.url, "test"))

    def _sample(self, tar: str, key: str, members: dict[str, bytes]) -> Sample:
        where = f"{tar}, sample {key}"
        ext = next((ext for ext in EXTENSIONS if ext in members), None)
        if ext is None:
            raise TaskError("no picture", where=where)
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
        try:
            label = int(members["cls"][:32])
        except ValueError:
            raise TaskError(f"the label {members['cls'][:32]!r} is no whole number", where=where) from None
        if not 0 <= label < len(self.classnames):
            raise TaskError(
                f"label {label} is out of range: {CLASSNAMES} has {len(self.classnames)} classes", where=where
            )
        return Sample(key, members[ext], label=label)


def _tars(url: str) -> tuple[str, ...]:
    path = storage.join(url, "test", "nshards.txt")
    lines = _lines(path)
    if len(lines) != 1 or not lines[0].isdecimal() or not 0 < int(lines[0]) <= MAX_SHARDS:
        raise TaskError("should hold the number of test shards", where=path)
    tars = tuple(storage.join(url, "test", f"{number}.tar") for number in range(int(lines[0])))
    for tar in tars:
        if not storage.exists(tar):
            raise TaskError("no such file", where=tar, do=f"nshards.txt counts {len(tars)} shards.")
    return tars


def data_digest(url: str) -> str:
    """Digest of a test set: of the content of its text files and test shards where they are local, of the store's
    version tokens where they are not."""
    files = [name for name in (CLASSNAMES, TEMPLATES, TYPE) if storage.exists(storage.join(url, name))]
    files += [f"test/{name}" for name in storage.list_names(storage.join(url, "test"))]
    return storage.digest_json({name: _file_digest(storage.join(url, name)) for name in files})


def _file_digest(url: str) -> str:
    token = storage.version_token(url)
    return _content_digest(url, token) if storage.is_local(url) else token


@functools.lru_cache(maxsize=4096)
def _content_digest(url: str, token: str) -> str:
    """The token is there so that a file that changed is read again."""
    return storage.digest_file(url)

"""Finding the test sets of a data folder, in DataComp's layout.

tasks/*.yaml                                            task files, for sets that DataComp does not have
wds_<task>_test/classnames.txt                          one class a line, in label order
wds_<task>_test/zeroshot_classification_templates.txt   one prompt a line, with {c} for the class name
wds_<task>_test/dataset_type.txt                        kind of a set without a task file; classification by default
wds_<task>_test/test/nshards.txt, test/0.tar, …         samples: KEY.jpg|png|webp with KEY.cls or KEY.txt, and for
                                                        sets with groups KEY.npy, a vector of whole numbers

Flickr, MSCOCO and WinoGAViL are distributed in another form; `winnow.evaluate.sets.packed` converts them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from winnow.evaluate.protocols import KINDS
from winnow.evaluate.protocols.base import Kind, kind_of, load_kind
from winnow.evaluate.sets import hub, packed
from winnow.evaluate.sets.files import class_names
from winnow.evaluate.tasks.read import datacomp_tasks, find_task, read_task, read_tasks
from winnow.evaluate.tasks.task import Task
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage

TYPE = "dataset_type.txt"
TASKS = "tasks"  # folder of task files in a data folder
FOLDERS = r"wds_[^,.\x00-\x1f][^,\x00-\x1f]*_test"
DATACOMP_OWNER = "djghosh"  # of DataComp's sets on the hub
CLASSIFICATION = "zeroshot_classification"


@dataclass(frozen=True)
class FoundTask:
    """A task and the folder that holds its test set."""

    task: Task
    url: str

    @property
    def kind(self) -> Kind | None:
        """None where the set's `dataset_type.txt` names a kind that does not exist."""
        return kind_of(self.task)


def find_tasks(data_url: str, names: Sequence[str] | str = "all") -> list[FoundTask]:
    """The tasks of a data folder: DataComp's in the order of their keys, then the others by name.

    Args:
        data_url: the folder of `wds_<task>_test` folders, with `hf_cache/` next to them where DataComp's script filled
            it; or "hf://datasets/OWNER[@REVISION]", on whose every repository the tasks' revisions are read unless one
            is given. There all 40 are assumed to exist; what does not is reported when it is opened.
        names: "all" for whatever is there; or keys, names or task files ("birds.yaml", relative to the working
            directory or the data folder) of tasks.

    Raises:
        UsageError: no such folder, no task in it, a faulty task file, or a named task that is unknown or not there.
    """
    words = [] if names == "all" else [names] if isinstance(names, str) else list(names)
    files = {word: _read_file(word, data_url) for word in words if word.endswith((".yaml", ".yml"))}
    words = [files[word].key if word in files else word for word in words]
    given = {task.key: task for task in files.values()}
    if data_url.startswith(hub.DATA):
        return _on_the_hub(data_url, words, given)
    if not storage.is_dir(data_url):
        raise UsageError("no such folder", where=data_url, do="It should hold wds_<task>_test folders.")
    tasks = datacomp_tasks() | read_tasks(storage.join(data_url, TASKS)) | given
    found = _present(data_url, {task.data_folder: task for task in tasks.values()})
    if not found:
        raise UsageError("holds no wds_<task>_test folder", where=data_url)
    if names == "all":
        return list(found.values())
    known = tasks | {entry.task.key: entry.task for entry in found.values()}
    selected = set()
    for word in words:
        task = find_task(word, known)
        if task.key not in found:
            do = f"It should be in {task.data_folder}/."
            raise UsageError(f'no data for task "{task.key}"', where=data_url, do=do)
        selected.add(task.key)
    return [entry for key, entry in found.items() if key in selected]


def _read_file(path: str, data_url: str) -> Task:
    """A task file that is named relative to the working directory or to the data folder."""
    inside = storage.join(data_url, path)
    data = not storage.exists(path) and not data_url.startswith(hub.DATA) and storage.exists(inside)
    return read_task(inside if data else path, data)


def _present(data_url: str, by_folder: dict[str, Task]) -> dict[str, FoundTask]:
    """The sets in a folder by key: those of known tasks, then the others."""
    present = [name for name in storage.list_names(data_url) if re.fullmatch(FOLDERS, name)]
    cached = packed.in_datasets_cache(data_url)
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
    return found


def is_data(data_url: str) -> bool:
    """Whether `find_tasks` can be asked for the tasks of a URL."""
    return data_url.startswith(hub.DATA) or storage.is_dir(data_url)


def extra_task(folder: str, kind: str, classes: int | None) -> Task:
    """A task for a folder without a task file: named after the folder, with the kind's default metric."""
    key = folder.removeprefix("wds_").removesuffix("_test")
    described = load_kind(kind if kind in KINDS.table else CLASSIFICATION)
    metric, chance = described.metric, described.default_chance(classes)
    return Task(name=key, key=key, kind=kind, metric=metric, classes=classes, chance=chance, group="extra", version=1)


def _on_the_hub(data_url: str, words: Sequence[str], given: dict[str, Task]) -> list[FoundTask]:
    owner, revision = hub.parse_data(data_url)
    known = {key: task for key, task in datacomp_tasks().items() if task.group != "extra"} | given
    keys = {find_task(word, known).key for word in words} or set(known)

    def url(task: Task) -> str:
        pinned = task.revision if task.hub or owner == DATACOMP_OWNER else None
        return hub.url_of(task.hub or f"{owner}/{task.data_folder}", revision or pinned or hub.MAIN)

    return [FoundTask(task, url(task)) for key, task in known.items() if key in keys]


def _kind(url: str) -> str:
    """The kind of a set without a task file: what `dataset_type.txt` says, else classification."""
    path = storage.join(url, TYPE)
    if not storage.exists(path):
        return CLASSIFICATION
    with storage.open_read(path) as file:
        word = file.read(100).decode("utf-8-sig", "replace").strip().lower()
    # Only a task file can say what the groups are.
    return CLASSIFICATION if word in ("", "classification", "grouped_classification") else word.replace(":", " ")


def _count_classes(url: str) -> int | None:
    try:
        return len(class_names(url, None))
    except WinnowError:
        return None

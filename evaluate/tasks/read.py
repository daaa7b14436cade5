"""Task files: DataComp's 40 in this folder, and those of a user next to the data or the recipe."""

from __future__ import annotations

import functools
from pathlib import Path

from winnow.evaluate.protocols import KINDS
from winnow.evaluate.protocols.base import load_kind
from winnow.evaluate.tasks.task import Task
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.text import read_text
from winnow.infra.io.yaml_lines import read_yaml
from winnow.infra.params import ParameterError, build
from winnow.infra.registry import unknown

FOLDER = Path(__file__).parent


def read_task(url: str, data: bool = False) -> Task:
    """One task file; in a folder of `data` its kind must be a registered one, or one that the user named as well.

    Raises UsageError naming the file and line of the first fault.
    """
    try:
        text = read_text(url)
    except WinnowError as error:
        raise UsageError(error.what, where=url, do=error.do) from None
    values, lines = read_yaml(text, url)
    try:
        task = build(Task, values, "")
    except ParameterError as error:
        raise UsageError(error.what, where=lines.where(error.path), do=error.do) from None
    try:
        if data:
            KINDS.check_data(task.kind, url)
        load_kind(task.kind).check_task(task)
    except UsageError as error:
        raise UsageError(error.what, where=lines.where(("kind",)), do=error.do) from None
    except ValueError as error:
        raise UsageError(str(error), where=url) from None
    return task


def read_tasks(folder: str) -> dict[str, Task]:
    """Every task file of a folder of data, by key. Raises UsageError also when two have the same key."""
    tasks: dict[str, Task] = {}
    for url in (storage.join(folder, name) for name in storage.list_names(folder) if name.endswith(".yaml")):
        task = read_task(url, data=True)
        if task.key in tasks:
            raise UsageError(f'another file has the key "{task.key}", too', where=url)
        tasks[task.key] = task
    return tasks


@functools.cache
def datacomp_tasks() -> dict[str, Task]:
    """Every task with a file in this folder, by key, in the order of their keys: DataComp's 40, of which 38 are scored,
    and any in the group "extra"."""
    return dict(sorted(read_tasks(str(FOLDER)).items()))


def find_task(word: str, known: dict[str, Task]) -> Task:
    """The task of a key or name. Raises UsageError with the nearest one."""
    for task in known.values():
        if word in (task.key, task.name):
            return task
    raise unknown("task", word, [*known, *(task.name for task in known.values())])

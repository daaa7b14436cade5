"""The tasks: DataComp's 40 entries as YAML in `tasks/`, read strictly, and what any other set in a folder is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from winnow.infra.errors import WinnowError
from winnow.infra.registry import closest_word, unknown

FOLDER = Path(__file__).parent
Group = Literal["imagenet", "shift", "vtab", "retrieval", "other", "extra"]


class TaskError(WinnowError):
    """A test set that cannot be evaluated as it is; trying again does not help."""


class NotApplicable(WinnowError):
    """What a protocol needs is not there, and nothing is wrong with that."""


class Task(BaseModel):
    """What is evaluated, and by which figure it is judged.

    Attributes:
        name: for people ("Caltech-101").
        key: DataComp's ("vtab/caltech101").
        kind: which functions of `winnow.evaluate.protocols.base` apply.
        metric: the main metric; None when the task has no summary figure.
        size: samples of the complete test set; None for tasks outside the list.
        classes: number of classes; None where there are none.
        chance: the main metric of guessing (DataComp's `random_score`), in [0, 1].
        group: which aggregate it counts in.
        scored: whether it counts in averages.
        folder: name of its data folder; by rule `wds_<key>_test`, with "-" for "/".
        metadata: names of what a sample's `.npy` holds, from the first on.
        group_by: which of them to report accuracy by, each value of it being a group.
        top: an image counts as right in a group's accuracy when its class is among so many first.
        mapping: file in the data folder (ObjectNet's own `objectnet_to_imagenet_1k.json`) whose keys are the names of
            the classes to keep, where `classnames.txt` has more than `classes`.
        hub: its repository on the Hugging Face hub; by rule the data folder's name, of the owner that is asked for.
        revision: the commit that is read there, unless another revision is asked for.
        version: raised when a change makes older scores incomparable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    key: str = Field(pattern=r"^[^/,.\x00-\x1f][^/,\x00-\x1f]*(/[^/,.\x00-\x1f][^/,\x00-\x1f]*)*$")
    kind: str = Field(min_length=1)
    metric: str | None
    size: int | None = Field(default=None, ge=1)
    classes: int | None = Field(default=None, ge=2)
    chance: float | None = Field(default=None, ge=0, le=1)
    group: Group
    scored: bool = True
    folder: str = Field(default="", pattern=r"^(wds_.+_test)?$")
    metadata: list[str] = []
    group_by: list[str] = []
    top: int = Field(default=1, ge=1)
    mapping: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.\-]+$")
    hub: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.\-]+/[A-Za-z0-9_.\-]+$")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    version: int = Field(ge=1)

    @model_validator(mode="after")
    def _groups_are_metadata(self) -> Task:
        for name in self.group_by:
            if name not in self.metadata:
                raise ValueError(f'group_by names "{name}", which is not in metadata')
        if self.kind == "grouped_classification" and not self.group_by:
            raise ValueError("a grouped_classification task needs group_by")
        return self

    @property
    def data_folder(self) -> str:
        return self.folder or folder_of(self.key)

    @property
    def group_metric(self) -> str:
        """What accuracy within a group is called: "acc", or "acc_top5"."""
        return "acc" if self.top == 1 else f"acc_top{self.top}"

    def worst_metric(self, field: str) -> str:
        """What the lowest accuracy over the groups of a field is called: "acc_wg"; with several fields
        "acc_worst_region"."""
        return f"{self.group_metric}_wg" if len(self.group_by) == 1 else f"{self.group_metric}_worst_{field}"

    @property
    def needs_metadata(self) -> bool:
        """Whether there is no main metric, or nothing at all, without the samples' metadata."""
        worst = [self.worst_metric(field) for field in self.group_by]
        return self.kind in ("face_attributes", "multilabel") or self.metric in worst


def folder_of(key: str) -> str:
    """DataComp's folder name of a task: "vtab/caltech101" -> "wds_vtab-caltech101_test"."""
    return f"wds_{key.replace('/', '-')}_test"


def read_task(path: Path) -> Task:
    """One task file. Raises WinnowError naming the file and line of the first fault."""
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise WinnowError(f"is not valid YAML ({getattr(error, 'problem', error)})", where=where) from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise WinnowError("a task file is a mapping of names to values", where=str(path))
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            raise WinnowError(f'"{key_node.value}" is given twice', where=f"{path}:{line}")
        lines[key_node.value] = line
    try:
        return Task.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        field = str(fault["loc"][0]) if fault["loc"] else ""
        where = f"{path}:{lines.get(field, 1)}"
        if fault["type"] == "extra_forbidden":
            near = closest_word(field, Task.model_fields)
            raise WinnowError(
                f'unknown key "{field}"', where=where, do=f'Did you mean "{near}"?' if near else None
            ) from None
        if fault["type"] == "missing":
            raise WinnowError(f'"{field}" is missing', where=str(path)) from None
        raise WinnowError(f"{field}: {fault['msg']} (here {fault['input']!r})", where=where) from None


def read_tasks(folder: Path) -> dict[str, Task]:
    """Every task file of a folder, by key. Raises WinnowError also when two give the same key."""
    tasks: dict[str, Task] = {}
    for path in sorted(folder.glob("*.yaml")):
        task = read_task(path)
        if task.key in tasks:
            raise WinnowError(f'key "{task.key}" is that of another file too', where=str(path))
        tasks[task.key] = task
    return tasks


@functools.cache
def datacomp_tasks() -> dict[str, Task]:
    """Every task that has a file, by key, in the order of their keys: DataComp's 40, of which 38 are scored, and any in
    the group "extra"."""
    return dict(sorted(read_tasks(FOLDER).items()))


def extra_task(folder: str, kind: str, classes: int | None) -> Task:
    """A task for a folder that is none of the 40: named after the folder, judged by acc1, mean recall@1 or, with
    several labels an image, mean average precision."""
    key = folder.removeprefix("wds_").removesuffix("_test")
    retrieval = kind == "retrieval"
    metric = {"retrieval": "mean_recall@1", "multilabel": "mean_average_precision"}.get(kind, "acc1")
    return Task(
        name=key,
        key=key,
        kind=kind,
        metric=metric,
        classes=None if retrieval else classes,
        chance=1 / classes if metric == "acc1" and classes else None,
        group="extra",
        version=1,
    )


def find_task(word: str, known: dict[str, Task]) -> Task:
    """The task of a key or name. Raises UsageError with the nearest one."""
    for task in known.values():
        if word in (task.key, task.name):
            return task
    raise unknown("task", word, [*known, *(task.name for task in known.values())])

"""A task: what is evaluated, and by which metric."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from winnow.infra.errors import WinnowError
from winnow.infra.params import Section

Group = Literal["imagenet", "shift", "vtab", "retrieval", "other", "extra"]


class TaskError(WinnowError):
    """A test set that cannot be evaluated as it is; trying again does not help."""


class NotApplicable(WinnowError):
    """What a protocol needs does not exist, and nothing is wrong with that."""


class Task(Section):
    """What is evaluated, and by which metric.

    Attributes:
        name: for people ("Caltech-101").
        key: DataComp's ("vtab/caltech101").
        kind: one of `winnow.evaluate.protocols.KINDS`, or "module:Class".
        metric: the main metric; None when the task has none.
        size: samples of the complete test set; None for tasks outside DataComp's list.
        classes: number of classes; None where there are none.
        chance: the main metric of guessing (DataComp's `random_score`), in [0, 1].
        group: the aggregate it belongs to.
        scored: whether it counts in averages.
        folder: name of its data folder; `wds_<key>_test`, with "-" for "/", by default.
        metadata: names of the numbers in a sample's `.npy`, in order.
        group_by: which of them to report accuracy by; each value is a group.
        top: a prediction counts as right in a group's accuracy when the class is among the first `top`.
        mapping: file in the data folder (ObjectNet's `objectnet_to_imagenet_1k.json`) whose keys are the names of
            the classes to keep, where `classnames.txt` has more than `classes`.
        hub: its repository on the Hugging Face hub; by default the data folder's name, of the owner in the data URL.
        revision: the commit that is read there, unless the data URL names a revision.
        version: raised when a change makes older scores incomparable.
    """

    name: str = Field(min_length=1)
    key: str = Field(max_length=200, pattern=r"^[^/,.\x00-\x1f][^/,\x00-\x1f]*(/[^/,.\x00-\x1f][^/,\x00-\x1f]*)*$")
    kind: str = Field(min_length=1)
    metric: str | None
    size: int | None = Field(default=None, ge=1)
    classes: int | None = Field(default=None, ge=2)
    chance: float | None = Field(default=None, ge=0, le=1)
    group: Group
    scored: bool = True
    folder: str = Field(default="", pattern=r"^(wds_[^/\x00-\x1f]+_test)?$", max_length=200)
    metadata: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()
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
        return self

    @property
    def data_folder(self) -> str:
        return self.folder or folder_of(self.key)

    @property
    def group_metric(self) -> str:
        """Name of the accuracy within a group: "acc", or "acc_top5"."""
        return "acc" if self.top == 1 else f"acc_top{self.top}"

    def worst_metric(self, field: str) -> str:
        """Name of the lowest accuracy over the groups of a field: "acc_wg"; with several fields "acc_worst_region"."""
        return f"{self.group_metric}_wg" if len(self.group_by) == 1 else f"{self.group_metric}_worst_{field}"


def folder_of(key: str) -> str:
    """DataComp's folder name of a task: "vtab/caltech101" -> "wds_vtab-caltech101_test"."""
    return f"wds_{key.replace('/', '-')}_test"

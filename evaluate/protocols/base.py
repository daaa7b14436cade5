"""The base classes of kinds of task and protocols, and the data that they work on.

A `Kind` says what a test set consists of: which files, which members of each sample, and what these mean. A
`Protocol` says how an encoder is scored on it. The tables are in `winnow.evaluate.protocols`.
"""

from __future__ import annotations

import abc
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from winnow.evaluate.protocols import KINDS, PROTOCOLS
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.errors import UsageError
from winnow.infra.io.arrays import load_array
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.text import text_lines
from winnow.infra.pool.sample import Sample

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

MAX_CAPTION_BYTES, MAX_METADATA = 1 << 20, 65_536  # of a sample; numbers in its `.npy`
SEED = 0  # of every bootstrap, and of protocols that draw nothing
# Of several images in a sample, the one that DataComp's evaluation takes.
IMAGES = ("webp", "png", "jpg", "jpeg", *(ext for ext in EXTENSIONS if ext not in ("webp", "png", "jpg", "jpeg")))


@dataclass(frozen=True)
class Target:
    """What is known of one sample."""

    label: int | None = None  # the class; None where the kind has none
    captions: tuple[str, ...] = ()
    metadata: tuple[float, ...] = ()  # numbers, for groups or several labels


@dataclass(frozen=True)
class Targets:
    """What is known of n samples, as columns."""

    keys: list[str]
    labels: np.ndarray  # int64 [n]; -1 where there is none, or where the class does not count
    captions: list[tuple[str, ...]]
    metadata: list[tuple[float, ...]]  # empty where the sample has none

    @staticmethod
    def concatenate(parts: Sequence[Targets], indices: Sequence[int]) -> Targets:
        """Those of the samples with these indices, counted over all parts."""
        keys = [key for part in parts for key in part.keys]
        captions = [captions for part in parts for captions in part.captions]
        metadata = [values for part in parts for values in part.metadata]
        labels = np.concatenate([part.labels for part in parts])[list(indices)]
        return Targets(
            [keys[i] for i in indices], labels, [captions[i] for i in indices], [metadata[i] for i in indices]
        )


@dataclass(frozen=True)
class SetTexts:
    """What the text files of a set say."""

    classnames: tuple[str, ...] = ()  # in label order
    templates: tuple[str, ...] = ()  # prompts, with {c} for the class name
    extra: Any = None  # what else the kind keeps of them


@dataclass(frozen=True)
class EvalSet:
    """A test set whose text files have been read and agree with its task."""

    task: Task
    url: str
    kind: Kind
    texts: SetTexts = SetTexts()
    tars: tuple[str, ...] = ()  # URLs of the test shards, in order

    @property
    def classnames(self) -> tuple[str, ...]:
        return self.texts.classnames

    @property
    def templates(self) -> tuple[str, ...]:
        return self.texts.templates

    def prompts(self, classname: str) -> list[str]:
        """The prompts of a class."""
        return self.kind.prompts(self, classname)


@dataclass(frozen=True)
class Split:
    """The features of a split of a set by one encoder."""

    images: np.ndarray  # float32 [n, dim], L2-normalised
    labels: np.ndarray  # int64 [n]
    samples: Callable[[Sequence[int]], list[Sample]]  # those at the given indices, with their members; read when called


@dataclass(frozen=True)
class Features:
    """The features of a test set by one encoder. `splits` has "test"; for protocols that need it also "train" and,
    where there is one, "val"."""

    images: np.ndarray  # float32 [n, dim], L2-normalised
    labels: np.ndarray  # int64 [n]; -1 where there is none
    encode_texts: Callable[[list[str]], np.ndarray]  # strings to float32 [m, dim], L2-normalised
    captions: list[tuple[str, ...]] = field(default_factory=list)  # of each image
    class_weights: np.ndarray | None = None  # float32 [classes, dim], where the prompts were embedded before
    splits: Mapping[str, Split] = field(default_factory=dict)
    encoder: Callable[[], Encoder] | None = None  # loads it
    seed: int = 0  # of what the protocol draws
    device: str = "cpu"  # for torch; "auto" takes a GPU where there is one
    keys: list[str] = field(default_factory=list)  # of the samples, in the order of the images
    metadata: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))  # float64 [n, fields]


@dataclass(frozen=True)
class Row:
    """One score: `value` over `n` samples, with its standard error. Raises TaskError where one is not finite."""

    metric: str
    value: float
    n: int
    stderr: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and math.isfinite(self.stderr)):
            raise TaskError(f"{self.metric} is {self.value:g}, with a standard error of {self.stderr:g}: no score")


class Kind(abc.ABC):
    """A kind of task: which files its sets consist of, how their samples are read, and how they are scored zero-shot.

    Instances hold nothing. A subclass is scored by every protocol that scores its base class.
    """

    images: ClassVar[tuple[str, ...]] = IMAGES  # extensions of the image, the preferred ones first
    # Whether transparent parts become white; otherwise the alpha channel is dropped, as by open_clip's preprocessing.
    flatten: ClassVar[bool] = False
    embeds_captions: ClassVar[bool] = False  # whether the captions of the samples are embedded with the images
    protocols: ClassVar[frozenset[str]] = frozenset()  # names of those that score it, beyond those that name it
    metric: ClassVar[str | None] = "acc1"  # the main metric of a set without a task file
    version: ClassVar[int] = 1  # raise it when `read` gives other values for the same members

    @property
    def names(self) -> list[str]:
        """The name of the kind and of those it is derived from."""
        bases = [base for base in type(self).__mro__ if issubclass(base, Kind) and base is not Kind]
        return [KINDS.name_of(base) for base in bases]

    def check_task(self, task: Task) -> None:
        """Raise ValueError when a task file lacks what the kind needs."""
        return

    def members(self, task: Task) -> tuple[str, ...]:
        """Extensions of the members that `read` looks at, besides the image."""
        return ()

    def open(self, task: Task, url: str) -> SetTexts:
        """Read the text files of a set. Raises TaskError naming the file at fault."""
        return SetTexts()

    @abc.abstractmethod
    def read(self, sample: Sample) -> Target:
        """What the members of a sample say. Called once a sample, when its image is embedded. Raises TaskError where a
        member is missing or cannot be read; without a location, which the caller adds."""

    def check(self, targets: Targets, test_set: EvalSet, tar: str) -> Targets:
        """Check the targets of a shard against the text files, and map them where needed. Raises TaskError."""
        return targets

    def prompts(self, test_set: EvalSet, classname: str) -> list[str]:
        """The prompts of a class. (`{c}` is replaced as text; other braces have no meaning.)"""
        return [template.replace("{c}", classname) for template in test_set.templates]

    def zeroshot(self, features: Features, test_set: EvalSet) -> list[Row]:
        """The scores under the protocol `zeroshot`."""
        raise NotImplementedError(f"{type(self).__name__} has no zero-shot scores")

    def chance(self, task: Task, n: int) -> float | None:
        """The main metric of guessing, on n samples."""
        return task.chance

    def default_chance(self, classes: int | None) -> float | None:
        """The main metric of guessing, for a set without a task file."""
        return 1 / classes if classes and self.metric == "acc1" else None

    def count(self, test_set: EvalSet, images: int) -> int:
        """The number that a task's `size` refers to, for a set with so many images."""
        return images

    def measured(self, images: int, counts: Sequence[int]) -> int:
        """That number of what was scored: images that could be decoded, and `n` of each score."""
        return max(counts, default=images)

    def encoded_image(self, sample: Sample) -> bytes | None:
        """The encoded image of a sample, or None."""
        return next((sample.members[ext] for ext in self.images if ext in sample.members), None)


@dataclass(frozen=True)
class Protocol:
    """A way to score an encoder on a set.

    It may need "text" (an encoder that reads text), "train" (a train split), "pixels" (the images themselves, not the
    features alone) and "sampler" (a checkpoint that draws images).
    """

    name: str  # as it is called in scores
    kinds: frozenset[str]  # kinds of task that it scores
    run: Callable[[Features, EvalSet], list[Row]]
    needs: frozenset[str] = frozenset()
    seeds: tuple[int, ...] = ()  # it runs once with each; empty for a protocol that draws nothing
    metric: str | None = None  # its main metric; None where that is the task's
    version: int = 1  # raise it when it gives other scores for the same features

    def applies(self, kind: Kind | None) -> bool:
        """Whether it scores tasks of a kind; None is a kind that does not exist."""
        return kind is not None and (self.name in kind.protocols or not self.kinds.isdisjoint(kind.names))


@functools.cache
def load_kind(name: str) -> Kind:
    """The kind of a name or "module:Class". Raises UsageError."""
    found = KINDS.load(name)
    if not (isinstance(found, type) and issubclass(found, Kind)):
        raise UsageError(f'"{name}" is not a kind of task', do="It must name a subclass of Kind.")
    return found()


def kind_of(task: Task) -> Kind | None:
    """The kind of a task; None where a set's `dataset_type.txt` names an unknown one."""
    return load_kind(task.kind) if task.kind in KINDS.table or ":" in task.kind else None


@functools.cache
def load_protocol(name: str) -> Protocol:
    """The protocol of a name or "module:OBJECT". Raises UsageError."""
    found = PROTOCOLS.load(name)
    if not isinstance(found, Protocol):
        raise UsageError(f'"{name}" is not a protocol', do="It must name an instance of Protocol.")
    return found


def read_label(sample: Sample) -> int:
    """The label in a sample's `.cls`. Raises TaskError."""
    if "cls" not in sample.members:
        raise TaskError("no label (.cls)")
    data = sample.member("cls")
    if not re.fullmatch(rb"\s*-?\d{1,18}\s*", data):
        raise TaskError(f"the label {data[:32]!r} is not a whole number")
    return int(data)


def read_captions(sample: Sample) -> tuple[str, ...]:
    """The captions in a sample's `.txt`, one a line. Raises TaskError where there is none."""
    if "txt" not in sample.members:
        raise TaskError("no captions (.txt)")
    if len(data := sample.member("txt")) > MAX_CAPTION_BYTES:
        raise TaskError(f"the captions (.txt) have more than {MAX_CAPTION_BYTES >> 20} MiB")
    try:
        lines = [line for line in text_lines(data.decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError:
        raise TaskError("captions are not UTF-8") from None
    if not lines:
        raise TaskError("no captions (.txt is empty)")
    return tuple(lines)


def read_metadata(sample: Sample) -> tuple[float, ...]:
    """The numbers in a sample's `.npy`; () where there is none. Raises TaskError."""
    if "npy" not in sample.members:
        return ()
    try:
        array = load_array(sample.member("npy")).ravel()
    except ValueError as error:
        raise TaskError(f"the metadata (.npy) cannot be read ({error})") from None
    if array.dtype.kind not in "biuf":
        raise TaskError(f"the metadata (.npy) holds {len(array)} values of type {array.dtype}, not numbers")
    if len(array) > MAX_METADATA:
        raise TaskError(f"the metadata (.npy) holds {len(array):,} values")
    return tuple(float(value) for value in array)

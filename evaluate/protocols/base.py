"""Kinds: how a task is turned into figures. A kind is one function `(features, test set) -> rows`.

`PROTOCOLS` is the table of them: for each protocol, which function evaluates which kind of task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from winnow.evaluate.sets.layout import EvalSet
from winnow.infra.registry import Registry, unknown

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder


def _labelled(function: str) -> Registry:
    """The table of a protocol that learns from labels, for the kinds of task that have a label an image."""
    return Registry("kind", {"zeroshot_classification": function, "grouped_classification": function})


PROTOCOLS: dict[str, Registry] = {
    "zeroshot": Registry(
        "kind",
        {
            "zeroshot_classification": "winnow.evaluate.protocols.zeroshot:zeroshot",
            "grouped_classification": "winnow.evaluate.protocols.zeroshot:zeroshot",
            "multilabel": "winnow.evaluate.protocols.multilabel:multilabel",
            "face_attributes": "winnow.evaluate.protocols.faces:faces",
            "winogavil": "winnow.evaluate.protocols.winogavil:winogavil",
            "retrieval": "winnow.evaluate.protocols.retrieval:retrieval",
        },
    ),
    "linear_probe": _labelled("winnow.evaluate.protocols.linear:linear_probe"),
    "linear_sgd": _labelled("winnow.evaluate.protocols.sgd:linear_sgd"),
    "knn": _labelled("winnow.evaluate.protocols.knn:knn"),
    "linear_1pct": _labelled("winnow.evaluate.protocols.few_labels:linear_1pct"),
    "linear_10pct": _labelled("winnow.evaluate.protocols.few_labels:linear_10pct"),
    "finetune_1pct": _labelled("winnow.evaluate.protocols.fine_tune:finetune_1pct"),
    "finetune_10pct": _labelled("winnow.evaluate.protocols.fine_tune:finetune_10pct"),
}
# Protocols that ask the encoder for text embeddings.
NEED_TEXT = frozenset({"zeroshot"})
# Protocols that learn from the set's train split.
NEED_TRAIN = frozenset(PROTOCOLS) - NEED_TEXT
# Protocols that draw something, once with each of these seeds.
SEEDS = dict.fromkeys(("linear_1pct", "linear_10pct", "finetune_1pct", "finetune_10pct"), (0, 1, 2))
SEED = 0  # of every bootstrap


@dataclass(frozen=True)
class Split:
    """What one encoder makes of a split of a set.

    Attributes:
        images: float32 [n, dim], L2-normalised.
        labels: int64 [n].
        images: the encoded images at the given places, read when called.
    """

    images: np.ndarray
    labels: np.ndarray
    image_bytes: Callable[[Sequence[int]], list[bytes]]


@dataclass(frozen=True)
class Features:
    """What one encoder makes of one test set.

    Attributes:
        images: float32 [n, dim], L2-normalised.
        labels: int64 [n]; empty for retrieval.
        captions: for retrieval, those of each image.
        encode_texts: strings to float32 [m, dim], L2-normalised.
        class_weights: float32 [classes, dim], where the prompts were embedded before.
        splits: "test", and for protocols in `NEED_TRAIN` "train" and where there is one "val".
        encoder: loads it.
        seed: of what the protocol draws.
        device: for torch; "auto" takes a GPU where there is one.
        keys: of the samples, in the order of the images (`Sample.key`).
        metadata: float64 [n, fields], `Sample.metadata` of each; [n, 0] where there is none.
    """

    images: np.ndarray
    labels: np.ndarray
    encode_texts: Callable[[list[str]], np.ndarray]
    captions: list[tuple[str, ...]] = field(default_factory=list)
    class_weights: np.ndarray | None = None
    splits: Mapping[str, Split] = field(default_factory=dict)
    encoder: Callable[[], Encoder] | None = None
    seed: int = 0
    device: str = "cpu"
    keys: list[str] = field(default_factory=list)
    metadata: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))


@dataclass(frozen=True)
class Row:
    """One figure: `value` over `n` samples, with its standard error."""

    metric: str
    value: float
    n: int
    stderr: float


Kind = Callable[[Features, EvalSet], list[Row]]


def applies(protocol: str, kind: str) -> bool:
    """Whether a protocol evaluates tasks of a kind. Raises UsageError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    return kind in PROTOCOLS[protocol].table


def kind_of(protocol: str, kind: str) -> Kind | None:
    """The function for a kind of task under a protocol, or None where there is none. Raises UsageError for an unknown
    protocol."""
    registry = PROTOCOLS.get(protocol)
    if registry is None:
        raise unknown("protocol", protocol, PROTOCOLS)
    return registry.load(kind) if kind in registry.table else None

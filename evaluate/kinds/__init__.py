"""Kinds: how a task is turned into figures. A kind is one function `(features, test set) -> rows`.

`PROTOCOLS` is the table of them: for each protocol, which function evaluates which kind of task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from evaluate.data import EvalSet
from infra.registry import Registry, unknown

PROTOCOLS: dict[str, Registry] = {
    "zeroshot": Registry(
        "kind",
        {
            "zeroshot_classification": "evaluate.kinds.zeroshot:zeroshot",
            "retrieval": "evaluate.kinds.retrieval:retrieval",
        },
    ),
}
# Protocols that ask the encoder for text embeddings.
NEED_TEXT = frozenset({"zeroshot"})
SEED = 0  # of every bootstrap


@dataclass(frozen=True)
class Features:
    """What one encoder makes of one test set.

    Attributes:
        images: float32 [n, dim], L2-normalised.
        labels: int64 [n]; empty for retrieval.
        captions: for retrieval, those of each picture.
        encode_texts: strings to float32 [m, dim], L2-normalised.
    """

    images: np.ndarray
    labels: np.ndarray
    encode_texts: Callable[[list[str]], np.ndarray]
    captions: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One figure: `value` over `n` samples, with its standard error."""

    metric: str
    value: float
    n: int
    stderr: float


Kind = Callable[[Features, EvalSet], list[Row]]


def kind_of(protocol: str, kind: str) -> Kind | None:
    """The function for a kind of task under a protocol, or None where there is none. Raises UsageError for an unknown
    protocol."""
    registry = PROTOCOLS.get(protocol)
    if registry is None:
        raise unknown("protocol", protocol, PROTOCOLS)
    return registry.load(kind) if kind in registry.table else None

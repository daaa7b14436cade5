"""CLIP score filtering: keep pairs whose picture and caption are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from curation.filters.base import Filter, State, numbers
from infra.errors import UsageError
from infra.registry import unknown

if TYPE_CHECKING:
    from curation.view import View

_COLUMNS = {
    "scorer": "clip.score",
    "b32": "clip_b32_similarity_score",
    "l14": "clip_l14_similarity_score",
}


@dataclass(frozen=True)
class ClipScore(Filter):
    """Keep samples whose score reaches a threshold, given or set by the fraction to keep.

    Gadre et al. 2023 (DataComp), "CLIP score filtering" (threshold: Schuhmann et al. 2022, LAION). The fractional
    threshold is DataComp's exactly: of the pool's scores in falling order the one at place `int(n * fraction)`,
    counted from 0, and scores equal to it are kept; so one sample more than n * fraction is, and more on ties. A
    fraction of 1 keeps every score. Deviation: missing and NaN scores count in n, stand last in the order, and never
    pass.

    With a scorer trained on trusted pairs this is Data Filtering Networks (Fang et al. 2023).

    Args:
        fraction: of the pool, in (0, 1].
        threshold: of the score; instead of a fraction.
        model: whose score: `scorer`, the recipe's, or DataComp's columns `b32` and `l14`.
    """

    fraction: float | None = None
    threshold: float | None = None
    model: str = "scorer"

    name: ClassVar[str] = "clip_score"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp); Fang et al. 2023 (DFN)"

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.threshold is None):
            raise UsageError("clip_score takes either a fraction or a threshold")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UsageError(f"clip_score: fraction {self.fraction} is not in (0, 1]")
        if self.model not in _COLUMNS:
            raise unknown("model for clip_score", self.model, _COLUMNS)

    def columns(self) -> tuple[str, ...]:
        return (_COLUMNS[self.model],)

    def numeric(self) -> tuple[str, ...]:
        return self.columns()

    def fit(self, view: View) -> State:
        if self.threshold is not None:
            return {"threshold": np.array(self.threshold)}
        assert self.fraction is not None
        scores = np.concatenate([numbers(batch[self.columns()[0]]) for batch in view.batches(self.columns())])
        return {"threshold": np.array(fraction_threshold(scores, self.fraction))}

    def keep(self, batch: pa.Table, state: State) -> np.ndarray:
        return numbers(batch[self.columns()[0]]) >= float(state["threshold"])


def fraction_threshold(scores: np.ndarray, fraction: float) -> float:
    """DataComp's quantile: the `int(n * fraction)`-th largest counted from 0; -inf when that is past the end.

    Args:
        scores: shape [n]; NaN stands below all numbers.
        fraction: in (0, 1].
    """
    place = int(len(scores) * fraction)
    if place >= len(scores):
        return -np.inf
    ordered = np.where(np.isnan(scores), -np.inf, scores)
    return float(-np.partition(-ordered, place)[place])

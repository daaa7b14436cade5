"""CLIP score filtering: keep pairs whose image and caption are alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.threshold import Threshold, scores_of
from winnow.curation.filters.base import Filter, State
from winnow.infra.registry import unknown

if TYPE_CHECKING:
    from winnow.curation.columns.table import View

MODELS = {
    "scorer": "clip.score",
    "b32": "clip_b32_similarity_score",
    "l14": "clip_l14_similarity_score",
}


@dataclass(frozen=True, init=False)
class ClipScore(Filter):
    """Keep samples whose score reaches a threshold, given or set by how many to keep.

    Gadre et al. 2023 (DataComp), "CLIP score filtering" (threshold: Schuhmann et al. 2022, LAION);
    `winnow.curation.columns.threshold` says what fractions and budgets do on ties.
    With a scorer trained on trusted pairs this is Data Filtering Networks
    (Fang et al. 2023).

    Args:
        fraction: of the pool, in (0, 1], by DataComp's quantile rule.
        threshold: of the score; instead of a fraction.
        model: whose score: `scorer`, the recipe's, or DataComp's columns `b32` and `l14`.
        keep: how many samples; instead of a fraction.
        of: `pool` or `survivors`: what fraction and keep are of.
    """

    fraction: float | None = None
    threshold: float | None = None
    model: str = "scorer"
    budget: int | None = field(default=None, metadata={"parameter": "keep"})
    of: str = "pool"

    name: ClassVar[str] = "clip_score"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp); Fang et al. 2023 (DFN)"
    example: ClassVar[Mapping[str, Any]] = {"fraction": 0.3}

    def __init__(
        self,
        fraction: float | None = None,
        threshold: float | None = None,
        model: str = "scorer",
        keep: int | None = None,
        of: str = "pool",
    ) -> None:
        values = {"fraction": fraction, "threshold": threshold, "model": model, "budget": keep, "of": of}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.cutoff.check(self.name)
        if model not in MODELS:
            raise unknown("model for clip_score", model, MODELS)

    @property
    def cutoff(self) -> Threshold:
        return Threshold(self.fraction, self.threshold, self.budget, self.of)

    @property
    def column(self) -> str:
        return MODELS[self.model]

    def columns(self) -> tuple[str, ...]:
        return (self.column, *self.cutoff.columns)

    def numeric(self) -> tuple[str, ...]:
        return (self.column,)

    def fit(self, view: View) -> State:
        return self.cutoff.fit(view, (self.column,), lambda batch: scores_of(batch, self.column))

    def keep(self, batch: pa.Table, state: State) -> np.ndarray:
        return self.cutoff.keep(scores_of(batch, self.column), batch, state)

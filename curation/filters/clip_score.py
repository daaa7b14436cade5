"""CLIP score filtering: keep pairs whose image and caption match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View, model_columns
from winnow.curation.columns.threshold import scores_of
from winnow.curation.filters.base import Fraction, Model, Positive, Scope, State, ThresholdFilter
from winnow.infra.params import params


@params
class ClipScore(ThresholdFilter):
    """Keep samples whose score reaches a threshold, which is given or follows from how many to keep.

    Gadre et al. 2023 (DataComp), "CLIP score filtering" (threshold: Schuhmann et al. 2022, LAION);
    `winnow.curation.columns.threshold` documents ties. With a scorer trained on trusted pairs this is Data Filtering
    Networks (Fang et al. 2023).

    Args:
        fraction: of the pool, in (0, 1], by DataComp's quantile rule.
        threshold: of the score; instead of a fraction.
        model: whose score: `scorer`, the recipe's; `b32` or `l14`, DataComp's columns; or an instance of the measure
            `clip`.
        keep: how many samples; instead of a fraction.
        of: `pool` or `survivors`: what fraction and keep refer to.
    """

    fraction: Fraction | None = None
    threshold: float | None = None
    model: Model = "scorer"
    keep: Positive | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "clip_score"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp); Fang et al. 2023 (DFN)"
    example: ClassVar[Mapping[str, Any]] = {"fraction": 0.3}

    @property
    def column(self) -> str:
        return model_columns(self.model)[2]

    def columns(self) -> tuple[str, ...]:
        return (self.column, *self.cutoff.columns)

    def fit(self, view: View) -> State:
        return self.cutoff.fit(view, (self.column,), lambda batch: scores_of(batch, self.column))

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        return self.cutoff.mask(scores_of(batch, self.column), batch, state)

"""Several scores as one: a weighted sum of their ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.threshold import Threshold, scores_of
from winnow.curation.filters.base import Filter, State
from winnow.curation.filters.clip_score import MODELS
from winnow.curation.measures import MEASURES
from winnow.infra.errors import UsageError
from winnow.infra.io.arrow import mask_array
from winnow.infra.pool.uids import decode_uids, hash_unit
from winnow.infra.registry import unknown

if TYPE_CHECKING:
    from winnow.curation.columns.table import View

# Ranks are among all samples of pools up to this size, and among as many drawn by uid of larger ones.
RANKED = 1 << 22
_OWN = ("fraction", "threshold", "keep", "of")


@dataclass(frozen=True, init=False)
class Score(Filter):
    """Keep the samples with the largest weighted sum of ranked scores.

    A score's rank is its percentile in the pool: the share of the pool's scores below it and half of those equal to
    it, in (0, 1). So scores of any scale add up (rank aggregation by weighted Borda counts; Borda 1781, Dwork et al.
    2001). A sample that lacks one of the scores has no sum and never passes. Of pools beyond `RANKED` samples the rank
    is among that many, drawn by a hash of the uid: its standard error is below 0.00025.

    In YAML the weights stand beside the other parameters: `score: {clip: 0.5, aesthetic: 0.5, fraction: 0.3}`.

    Args:
        weights: by score: the name of a measure whose column is `NAME.score`, DataComp's `b32` or `l14`, or a column
            (`caption.words`). Negative ones prefer small scores.
        fraction, threshold, keep, of: where to cut, as for `clip_score`; the threshold is of the sum.
    """

    weights: tuple[tuple[str, float], ...]
    fraction: float | None = None
    threshold: float | None = None
    budget: int | None = field(default=None, metadata={"parameter": "keep"})
    of: str = "pool"

    name: ClassVar[str] = "score"
    paper: ClassVar[str] = "Dwork et al. 2001 (rank aggregation)"
    example: ClassVar[Mapping[str, Any]] = {"weights": {"b32": 0.5, "l14": 0.5}, "fraction": 0.3}

    def __init__(
        self,
        weights: Mapping[str, float] | tuple[tuple[str, float], ...],
        fraction: float | None = None,
        threshold: float | None = None,
        keep: int | None = None,
        of: str = "pool",
    ) -> None:
        pairs = tuple(sorted((str(name), weight) for name, weight in dict(weights).items()))
        values = {"weights": pairs, "fraction": fraction, "threshold": threshold, "budget": keep, "of": of}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.cutoff.check(self.name)
        if not pairs:
            raise UsageError("score has no weights", do="Write them as `score: {clip: 0.5, aesthetic: 0.5, …}`.")
        for name, weight in pairs:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UsageError(f"score: the weight of {name} is {weight!r}, not a number")
            if "." not in name and name not in MODELS and name not in MEASURES.table:
                raise unknown("score", name, [*MEASURES.table, "b32", "l14", *_OWN])
        if not any(weight for _, weight in pairs):
            raise UsageError("score: all weights are 0")

    @classmethod
    def read(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        local = {key: value for key, value in params.items() if key in (*_OWN, "weights")}
        weights = {key: value for key, value in params.items() if key not in local}
        return local if "weights" in local and not weights else local | {"weights": weights}

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"weights": dict(self.weights)}

    def given(self) -> dict[str, Any]:
        local = super().given()
        return {**local.pop("weights"), **local}

    @property
    def cutoff(self) -> Threshold:
        return Threshold(self.fraction, self.threshold, self.budget, self.of)

    def scores(self) -> dict[str, float]:
        """The weight of each column."""
        weights: dict[str, float] = {}
        for name, weight in self.weights:
            column = name if "." in name else MODELS.get(name, f"{name}.score")
            weights[column] = weights.get(column, 0.0) + weight
        return weights

    def columns(self) -> tuple[str, ...]:
        return (*self.scores(), *self.cutoff.columns)

    def numeric(self) -> tuple[str, ...]:
        return tuple(self.scores())

    def fit(self, view: View) -> State:
        columns = tuple(self.scores())
        pool = view.whole
        fraction = min(1.0, RANKED / max(len(pool), 1))
        found: dict[str, list[np.ndarray]] = {column: [] for column in columns}
        for batch in pool.batches(columns if fraction == 1 else ("uid", *columns)):
            if fraction < 1:
                batch = batch.filter(mask_array(hash_unit(decode_uids(batch["uid"]), 0, "rank") < fraction))
            for column in columns:
                values = scores_of(batch, column).astype(np.float64)
                found[column].append(values[~np.isnan(values)])
        ranks = {f"sorted {column}": np.sort(np.concatenate(parts)) for column, parts in found.items() if parts}
        return ranks | self.cutoff.fit(view, columns, lambda batch: self.total(batch, ranks))

    def total(self, batch: pa.Table, state: State) -> np.ndarray:
        """The weighted sum of ranks; float64, NaN where a score is missing, shape [n]."""
        total = np.zeros(batch.num_rows)
        for column, weight in self.scores().items():
            total += weight * percentile(scores_of(batch, column), state[f"sorted {column}"])
        return total

    def keep(self, batch: pa.Table, state: State) -> np.ndarray:
        return self.cutoff.keep(self.total(batch, state), batch, state)

    def explain(self, batch: pa.Table, state: State) -> dict[str, Any]:
        total = float(self.total(batch, state)[0])
        return super().explain(batch, state) | {"score": None if math.isnan(total) else total}


def percentile(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """The share of ordered values below each value plus half of those equal to it; NaN for NaN. float64, shape [n]."""
    values = values.astype(np.float64)
    ranks = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.where(np.isnan(values), np.nan, ranks / (2 * max(len(ordered), 1)))

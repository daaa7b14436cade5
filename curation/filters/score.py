"""Several scores combined: a weighted sum of their ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, model_validator
from pydantic_core import ArgsKwargs

from winnow.curation.columns.table import View, model_columns
from winnow.curation.columns.threshold import scores_of
from winnow.curation.filters.base import Fraction, Positive, Scope, State, ThresholdFilter
from winnow.infra.io.arrow import mask_array
from winnow.infra.params import ParameterError, params
from winnow.infra.pool.uids import decode_uids, hash_unit

# In larger pools, ranks are among this many samples, drawn by uid.
RANKED = 1 << 22
_OTHERS = ("fraction", "threshold", "keep", "of")
Weights = Annotated[dict[str, float], AfterValidator(lambda weights: dict(sorted(weights.items())))]


@params
class Score(ThresholdFilter):
    """Keep the samples with the largest weighted sum of ranked scores.

    The rank of a score is its percentile in the pool: the fraction of the pool's scores below it plus half of those
    equal to it, in (0, 1). So scores of any scale can be added (rank aggregation by weighted Borda counts; Borda 1781,
    Dwork et al. 2001). A sample without one of the scores never passes. In pools of more than `RANKED` samples the rank
    is among that many samples, drawn by a hash of the uid; its standard error is below 0.00025.

    In YAML the weights are given next to the other parameters: `score: {clip: 0.5, aesthetic: 0.5, fraction: 0.3}`.

    Args:
        weights: by score: an instance of a measure that has a column `score`, DataComp's `b32` or `l14`, or a column
            (`caption.words`). Negative ones prefer small scores.
        fraction, threshold, keep, of: as for `clip_score`; the threshold is of the sum.
    """

    weights: Weights
    fraction: Fraction | None = None
    threshold: float | None = None
    keep: Positive | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "score"
    paper: ClassVar[str] = "Dwork et al. 2001 (rank aggregation)"
    example: ClassVar[Mapping[str, Any]] = {"weights": {"b32": 0.5, "l14": 0.5}, "fraction": 0.3}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: ArgsKwargs) -> ArgsKwargs:
        """Weights from YAML, where they are given next to the other parameters."""
        kwargs = given.kwargs or {}
        if given.args or "weights" in kwargs:
            return given
        weights = {key: value for key, value in kwargs.items() if key not in _OTHERS}
        return ArgsKwargs((), {"weights": weights} | {key: kwargs[key] for key in kwargs if key in _OTHERS})

    def __post_init__(self) -> None:
        if not any(self.weights.values()):
            what = "all weights are 0" if self.weights else "there are no weights"
            raise ParameterError(f"score: {what}", do="Write them as `score: {clip: 0.5, aesthetic: 0.5, …}`.")
        super().__post_init__()

    def __hash__(self) -> int:
        return hash(str(self))

    def yaml(self) -> dict[str, Any]:
        others = super().yaml()
        return {**others.pop("weights"), **others}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"weights": list(self.weights.items())}

    def scores(self) -> dict[str, float]:
        """The weight of each column."""
        weights: dict[str, float] = {}
        for name, weight in self.weights.items():
            column = name if "." in name else model_columns(name)[2]
            weights[column] = weights.get(column, 0.0) + weight
        return weights

    def columns(self) -> tuple[str, ...]:
        return (*self.scores(), *self.cutoff.columns)

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

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        return self.cutoff.mask(self.total(batch, state), batch, state)

    def explain(self, batch: pa.Table, state: State) -> dict[str, Any]:
        total = float(self.total(batch, state)[0])
        return super().explain(batch, state) | {"score": None if math.isnan(total) else total}


def percentile(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """The fraction of the ordered values below each value plus half of those equal to it; NaN for NaN. float64, [n]."""
    values = values.astype(np.float64)
    ranks = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.where(np.isnan(values), np.nan, ranks / (2 * max(len(ordered), 1)))

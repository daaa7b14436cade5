"""The threshold of a filter by score: given, or set by a fraction of the pool or a number of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from winnow.curation.columns.quantile import nth_largest
from winnow.curation.columns.table import State, View
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import float_values, mask_array
from winnow.infra.params import ParameterError
from winnow.infra.pool.uids import decode_uids, sort_uids

ScoreFunction = Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True)
class Threshold:
    """One of three ways to set a threshold; the two others are None.

    A fraction is DataComp's rule (Gadre et al. 2023, `baselines/apply_filter.py`): of n scores in descending order, the
    one at index `int(n * fraction)` is the threshold, and scores equal to it are kept. So one sample more than
    n * fraction is kept, and more with ties. A fraction of 1 keeps every score, where DataComp's code fails. Scores
    that are missing, NaN or infinite are counted in n, come last and never pass; when the index is that of such a
    score, every score passes, where with DataComp's code none does.

    A budget keeps exactly that many samples: those with the largest scores and, among scores equal to the smallest of
    these, those with the smallest uids.

    Args:
        fraction: of the scope, in (0, 1].
        threshold: the smallest score that is kept, compared in the precision of the column.
        keep: how many samples.
        of: what fraction and keep refer to: `pool`, or `survivors`, what the filters before it in the enclosing
            `all`s kept.
    """

    fraction: float | None
    threshold: float | None
    keep: int | None
    of: str = "pool"

    def check(self, name: str) -> None:
        """Raises ParameterError, as the filter of that name, unless exactly one way is given."""
        ways = {"fraction": self.fraction, "threshold": self.threshold, "keep": self.keep}
        given = [word for word, value in ways.items() if value is not None]
        if len(given) != 1:
            said = f", not {' and '.join(given)}" if given else ""
            raise ParameterError(f"{name} takes either a fraction, a threshold or keep{said}", do="Give exactly one.")
        if self.of != "pool" and self.threshold is not None:
            what = f"{name}: `of` goes with a fraction or with keep, a threshold is the same for all"
            raise ParameterError(what).below("of")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads besides those of the score."""
        return ("uid",) if self.keep is not None else ()

    def fit(self, view: View, columns: Sequence[str], score: ScoreFunction) -> State:
        """Find the threshold.

        Args:
            view: the scope.
            columns: what `score` reads.
            score: float scores of a batch, NaN where there is none, shape [n].

        Returns:
            `threshold`, float64; with a budget that does not keep all ties also `last`, the two halves of the largest
            uid that is kept among them.
        """
        if self.threshold is not None:
            return {"threshold": np.array(float(self.threshold))}

        def stream() -> Sequence[np.ndarray]:
            return (score(batch) for batch in view.batches(columns))  # type: ignore[return-value]

        if self.fraction is not None:
            fraction = self.fraction
            return {"threshold": np.array(nth_largest(stream, lambda n: int(n * fraction))[0])}
        assert self.keep is not None
        budget = self.keep
        threshold, _ = nth_largest(stream, lambda n: budget - 1)
        state = {"threshold": np.array(threshold)}
        if threshold == -np.inf:
            return state
        above, tied = 0, []
        for batch in view.batches(tuple(dict.fromkeys((*columns, "uid")))):
            scores = score(batch)
            above += int((scores > threshold).sum())
            tied.append(_uids(batch, scores == threshold))
        ties = np.concatenate(tied)
        if above + len(ties) > budget:
            last = sort_uids(ties)[budget - above - 1]
            state["last"] = np.array([last["f0"], last["f1"]], np.uint64)
        return state

    def mask(self, scores: np.ndarray, batch: pa.Table, state: State) -> np.ndarray:
        """Which of a batch's scores pass; bool, shape [n]."""
        with np.errstate(invalid="ignore"):
            # A Python float is compared in the array's precision, a NumPy float64 (fitted, exact) in float64.
            mask = scores >= (self.threshold if self.threshold is not None else state["threshold"])
            if "last" in state and (tied := scores == state["threshold"]).any():
                uids, (high, low) = _uids(batch, tied), state["last"]
                mask[tied] = (uids["f0"] < high) | ((uids["f0"] == high) & (uids["f1"] <= low))
        return mask


def _uids(batch: pa.Table, mask: np.ndarray) -> np.ndarray:
    return decode_uids(batch["uid"].filter(mask_array(mask)))


def scores_of(batch: pa.Table, column: str) -> np.ndarray:
    """A numeric column in its precision (integers as float64), with NaN for null and infinite values, shape [n].

    Raises WinnowError when the column holds no numbers.
    """
    values = batch[column]
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    if not any(test(values.type) for test in (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)):
        raise WinnowError(f'column "{column}" has the type {values.type}, and a score must be a number')
    scores = float_values(values)
    infinite = np.isinf(scores)
    return np.where(infinite, np.array(np.nan, scores.dtype), scores) if infinite.any() else scores

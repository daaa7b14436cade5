"""Where a filter by score cuts: at a threshold, at a fraction of the pool, or at a number of samples."""

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
    """One of three ways to cut; the two others are None.

    A fraction cuts as DataComp does (Gadre et al. 2023, `baselines/apply_filter.py`): of n scores in falling order the
    one at place `int(n * fraction)`, counted from 0, is the threshold, and scores equal to it are kept; so one more
    than n * fraction is, and more on ties. A fraction of 1 keeps every score (there it fails). Missing and NaN scores
    count in n, stand last and never pass; when the place falls on one, every score passes (there none does).

    A budget keeps that many and no more: the largest scores, and among those equal to the smallest of them the samples
    with the smallest uids.

    Args:
        fraction: of the scope, in (0, 1].
        threshold: smallest score kept, compared in the column's own precision.
        keep: how many samples.
        of: what fraction and keep are of: `pool`, or `survivors`, what the filters before it in the enclosing
            `all`s have kept.
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
            raise ParameterError(
                f"{name}: `of` goes with a fraction or with keep, a threshold is the same for all"
            ).below("of")

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads beside the score's columns."""
        return ("uid",) if self.keep is not None else ()

    def fit(self, view: View, columns: Sequence[str], score: ScoreFunction) -> State:
        """Find the threshold.

        Args:
            view: the scope.
            columns: what `score` reads.
            score: float scores of a batch, NaN where there is none, shape [n].

        Returns:
            `threshold`, float64; with a budget that ties are left out of, `last`: the two halves of the greatest uid
            that is kept among the tied.
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
            # A Python float takes the array's precision; a NumPy one (fitted, exact) would widen the array.
            mask = scores >= (self.threshold if self.threshold is not None else state["threshold"])
            if "last" in state and (tied := scores == state["threshold"]).any():
                uids, (high, low) = _uids(batch, tied), state["last"]
                mask[tied] = (uids["f0"] < high) | ((uids["f0"] == high) & (uids["f1"] <= low))
        return mask


def _uids(batch: pa.Table, mask: np.ndarray) -> np.ndarray:
    return decode_uids(batch["uid"].filter(mask_array(mask)))


def scores_of(batch: pa.Table, column: str) -> np.ndarray:
    """A numeric column in its own precision (integers as float64), null as NaN, shape [n]. Raises WinnowError."""
    values = batch[column]
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise WinnowError(f'column "{column}" holds {values.type}, a score is a number')
    return float_values(values)

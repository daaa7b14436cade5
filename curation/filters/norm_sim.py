"""NormSim: keep samples whose image is similar to the images of a target set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from winnow.curation.columns.pool_columns import dimensions, passing, split_targets, target_vectors
from winnow.curation.columns.table import State, View, embeddings, measure_of
from winnow.curation.filters.base import Fraction, Names, Positive, Scope, SelectionFilter, ThresholdFilter, as_state
from winnow.infra.errors import WinnowError
from winnow.infra.io.arrays import matrix_shape
from winnow.infra.params import params
from winnow.infra.pool.uids import UID_DTYPE, decode_uids

_ROWS = 1024


@params
class NormSim(ThresholdFilter, SelectionFilter):
    """Keep samples whose p-norm of the cosines with all target images is largest.

    Wang et al. 2024 ("CLIPLoss and Norm-Based Data Selection Methods"), section 3.2, with f the image embedding:

        NormSim_p(X, i) = || f(X) f_i ||_p,

    which is the root of the sum of squared cosines for p = 2, and the largest absolute cosine for p = inf. The paper
    applies it to what negCLIPLoss or the CLIP score has kept; a tree of filters expresses that.

    Args:
        target: folder of shards with the target images, .npy file of their embeddings, or a list of such.
        p: 2 or "inf".
        fraction, threshold, keep, of: as for `clip_score` (the paper: threshold 0.7 for p = inf).
        column: the pool's embeddings, by the model that embedded the targets (`l14_img` in DataComp's metadata).
    """

    target: Names
    p: Literal[2, "inf"] = "inf"
    fraction: Fraction | None = None
    threshold: float | None = None
    column: str = "clip.image"
    keep: Positive | None = None
    of: Scope = "pool"

    name: ClassVar[str] = "norm_sim"
    paper: ClassVar[str] = "Wang et al. 2024 (negCLIPLoss, NormSim)"
    example: ClassVar[dict[str, Any]] = {"target": "targets", "threshold": 0.7}
    files: ClassVar[tuple[str, ...]] = ("target",)

    def numeric(self) -> tuple[str, ...]:
        return (self.column,)

    def targets(self) -> tuple[str, ...]:
        return split_targets(self.target)[0]

    def target_columns(self) -> tuple[str, ...]:
        return (self.column if measure_of(self.column) else "clip.image",)

    def check(self, view: View) -> None:
        width = dimensions(view, self.column)
        for name in split_targets(self.target)[1]:
            rows, dim = matrix_shape(name)
            if not rows:
                raise WinnowError("the target set is empty", where=name, do="Give one with images.")
            if width is not None:
                self._compare(width, dim, name)

    def fit(self, view: View) -> State:
        target = target_vectors(view, self.target, self.target_columns()[0])
        scores, uids = [np.empty(0)], [np.empty(0, UID_DTYPE)]
        for batch in view.batches(self.columns()):
            vectors, usable = embeddings(batch, self.column)
            score = np.full(len(usable), np.nan)
            if usable.any():
                self._compare(vectors.shape[1], target.shape[1])
                score[usable] = norm_sim(vectors[usable], target, self.p)
            scores.append(score)
            uids.append(decode_uids(batch["uid"]))
        values = np.concatenate(scores)
        found = np.concatenate(uids)
        return as_state(found, passing(self.cutoff, found, values, len(values)))

    def _compare(self, width: int, dim: int, where: str | None = None) -> None:
        if dim != width:
            what = f'the pool\'s "{self.column}" has {width} dimensions, the targets {dim}'
            raise WinnowError(what, where=where, do="Both must come from one model.")


def norm_sim(vectors: np.ndarray, target: np.ndarray, p: int | str) -> np.ndarray:
    """NormSim_p of each vector; `vectors` [n, d], `target` [m, d]; float64, shape [n]."""
    aim = target.astype(np.float32)
    result = np.empty(len(vectors))
    # ||T x||^2 = x' (T' T) x, so for p = 2 the target reduces to a d x d matrix.
    square = aim.astype(np.float64).T @ aim.astype(np.float64)
    for start in range(0, len(vectors), _ROWS):
        block = vectors[start : start + _ROWS].astype(np.float32)
        if p == 2:
            wide = block.astype(np.float64)
            result[start : start + _ROWS] = np.sqrt(np.maximum(np.einsum("nd,nd->n", wide @ square, wide), 0))
        else:
            result[start : start + _ROWS] = np.abs(block @ aim.T).max(axis=1)
    return result

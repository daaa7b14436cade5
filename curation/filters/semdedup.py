"""SemDeDup: drop semantic duplicates within k-means clusters of the embeddings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from winnow.curation.columns.pool_columns import collect, passing
from winnow.curation.columns.table import View
from winnow.curation.columns.threshold import Threshold
from winnow.curation.filters.base import Fraction, Positive, Scope, SelectionFilter, State, as_state
from winnow.curation.search.centroids import assign
from winnow.curation.search.kmeans import enough, train_centroids
from winnow.curation.search.neighbours import runs
from winnow.infra.params import ParameterError, params
from winnow.infra.pool.uids import hash_unit

_BLOCK = 4096


@params
class SemDeDup(SelectionFilter):
    """Drop a sample whose cosine with an earlier one of its cluster exceeds 1 - epsilon.

    Abbas et al. 2023 (SemDeDup), section 3 and algorithm A7. The embeddings are clustered by spherical k-means;
    each cluster is sorted by descending distance to its centroid, so that of several duplicates the one farthest from
    the centroid is kept. With M the column maxima of the strictly upper triangle of the cluster's cosine matrix, at
    least 0, a sample is dropped when M > 1 - epsilon. Samples at equal distance are in pool order.

    With `fraction`, epsilon is chosen to keep that fraction: DataComp's quantile rule on -M, where samples at the
    quantile are kept.

    Args:
        clusters: k of k-means (the paper: 50,000 for 440 M samples).
        epsilon: 1 minus a cosine, in [0, 1]; instead of a fraction.
        fraction: of the pool to keep, in (0, 1].
        which_to_keep: "hard" (far from the centroid, the paper's default), "easy" (near it), or "random".
        column: of the embeddings.
        seed: of k-means and of the random order.
        of: `pool` or `survivors`: what is clustered and compared.
    """

    clusters: Positive
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    fraction: Fraction | None = None
    which_to_keep: Literal["hard", "easy", "random"] = "hard"
    column: str = "clip.image"
    seed: int = 0
    of: Scope = "pool"

    name: ClassVar[str] = "semdedup"
    paper: ClassVar[str] = "Abbas et al. 2023 (SemDeDup)"
    example: ClassVar[dict[str, Any]] = {"clusters": 100, "epsilon": 0.05}

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.fraction is None):
            raise ParameterError("semdedup takes either an epsilon or a fraction", do="Give exactly one.")

    @property
    def cutoff(self) -> Threshold:
        """The threshold of the negated similarity."""
        threshold = None if self.epsilon is None else self.epsilon - 1
        return Threshold(self.fraction, threshold, None, self.of if self.fraction is not None else "pool")

    def numeric(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, view: View) -> None:
        enough(self.name, self.clusters, len(view))

    def fit(self, view: View) -> State:
        pool = collect(view, (self.column,))
        vectors = pool.vectors[self.column]
        centroids = train_centroids(vectors, self.clusters, seed=self.seed)
        label = assign(vectors, centroids)
        if self.which_to_keep == "random":
            sort_key = hash_unit(pool.uids, self.seed, "semdedup")
        else:
            sort_key = _similarity(vectors, centroids, label) * (1 if self.which_to_keep == "hard" else -1)
        similarity = similarity_before(vectors, label, sort_key)
        mask = passing(self.cutoff, pool.uids, -similarity, pool.total)
        return as_state(pool.uids, mask, epsilon=np.array(1 - similarity[mask].max(initial=0)))


def _similarity(vectors: np.ndarray, centroids: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Cosine of each vector and its centroid; float32, shape [n]."""
    result = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        rows = slice(start, start + _BLOCK)
        result[rows] = np.einsum("nd,nd->n", vectors[rows].astype(np.float32), centroids[label[rows]])
    return result


def similarity_before(vectors: np.ndarray, label: np.ndarray, sort_key: np.ndarray) -> np.ndarray:
    """The largest cosine of each sample with the samples before it in its cluster, at least 0. float32, shape [n].

    Args:
        vectors: L2-normalised, shape [n, d].
        label: cluster of each, shape [n].
        sort_key: by which a cluster is sorted, ascending; equal keys by index. Shape [n].
    """
    order = np.lexsort((np.arange(len(label)), sort_key, label))
    result = np.zeros(len(label), np.float32)
    for low, high in runs(label[order]):
        members = order[low:high]
        cluster = np.asarray(vectors[members], dtype=np.float32)
        for first in range(0, len(members), _BLOCK):
            last = min(first + _BLOCK, len(members))
            cosines = cluster[:last] @ cluster[first:last].T
            block = cosines[first:last]
            block[np.tril_indices(last - first)] = 0
            result[members[first:last]] = np.maximum(cosines.max(axis=0), 0)
    return result

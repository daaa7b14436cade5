"""Cluster-balanced sampling: rare kinds of images are drawn as often as common ones."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from winnow.curation.columns.pool_columns import collect
from winnow.curation.columns.table import View
from winnow.curation.filters.base import Fraction, Positive, Scope, SelectionFilter, State, as_state
from winnow.curation.search.centroids import assign
from winnow.curation.search.kmeans import enough, train_centroids
from winnow.infra.params import params
from winnow.infra.pool.uids import hash_unit


@params
class ClusterBalanced(SelectionFilter):
    """Keep a fraction of the pool, spread evenly over the clusters of its embeddings.

    Vo et al. 2024 ("Automatic Data Curation for Self-Supervised Learning"), section 3.4, for one level of clusters:
    min(s, c) samples are drawn at random from a cluster of s, with the cap c such that they sum to the budget. With a
    power a above 0 the cap is c s^a, which keeps part of the imbalance (all of it for a = 1); Conneau & Lample 2019
    smooth languages by p^a in this way. Deviations: one level of spherical k-means instead of a hierarchy; the paper
    takes the integer c whose sum is nearest to the budget, while this filter splits the budget `int(n * fraction)`
    exactly and gives the remaining samples to the clusters with the largest remainders.

    Args:
        clusters: k of k-means.
        fraction: of the pool to keep, in (0, 1].
        power: a, in [0, 1].
        column: of the embeddings.
        seed: of k-means and of the draw, which is by the hash of the uid.
        of: `pool` or `survivors`: what is clustered and drawn from.
    """

    clusters: Positive
    fraction: Fraction
    power: Annotated[float, Field(ge=0, le=1)] = 0.0
    column: str = "clip.image"
    seed: int = 0
    of: Scope = "pool"

    name: ClassVar[str] = "cluster_balanced"
    paper: ClassVar[str] = "Vo et al. 2024 (automatic data curation)"
    example: ClassVar[dict[str, Any]] = {"clusters": 100, "fraction": 0.3}

    def numeric(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, view: View) -> None:
        enough(self.name, self.clusters, len(view))

    def fit(self, view: View) -> State:
        pool = collect(view, (self.column,))
        vectors = pool.vectors[self.column]
        label = assign(vectors, train_centroids(vectors, self.clusters, seed=self.seed))
        sizes = np.bincount(label, minlength=self.clusters)
        quota = quotas(sizes, min(int(pool.total * self.fraction), len(pool)), self.power)
        order = np.lexsort((hash_unit(pool.uids, self.seed, "cluster_balanced"), label))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return as_state(pool.uids, rank < quota[label])


def quotas(sizes: np.ndarray, budget: int, power: float) -> np.ndarray:
    """How many to draw from each cluster of sizes s, shape [k]: min(s, c s^power) in whole numbers, shape [k], that sum
    to the budget, which is at most the sum of the sizes."""
    weight = np.where(sizes > 0, np.maximum(sizes, 1.0) ** power, 0.0)
    # Clusters fill up in the order of s / weight. The cap c is where the clusters that are not full take the rest.
    order = np.argsort(np.where(sizes > 0, sizes / np.maximum(weight, 1e-300), -1), kind="stable")
    full = np.r_[0, np.cumsum(sizes[order])]
    open_weight = np.r_[np.cumsum(weight[order][::-1])[::-1], 0]
    fraction = np.asarray(sizes, dtype=np.float64)
    for i, at in enumerate(order):
        if open_weight[i] > 0:
            cap = (budget - full[i]) / open_weight[i]
            if cap * weight[at] < sizes[at]:
                fraction = np.minimum(sizes, cap * weight)
                break
    whole = np.floor(fraction + 1e-9).astype(np.int64)
    rest = np.argsort(whole - fraction, kind="stable")
    whole[rest[: budget - int(whole.sum())]] += 1
    return whole

"""Image-based filtering: keep the clusters of the pool that contain images of a target set."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View, embeddings
from winnow.curation.filters.base import Filter, Names, Positive, Search, State, each
from winnow.curation.search.centroids import NearestCentroid, fitted_state, hit_report, nearest_centroid_of
from winnow.curation.search.kmeans import check_clusters, enough, sample_vectors, train_centroids
from winnow.infra.errors import WinnowError
from winnow.infra.params import params


@params
class ImageCluster(Filter):
    """Cluster the pool's image embeddings, and keep clusters that are nearest to at least one target image.

    Gadre et al. 2023 (DataComp), "image-based filtering", without its caption pre-filter. DataComp uses 100,000
    clusters and the ImageNet training images as targets; nearest is by inner product.

    Args:
        target: folder of shards with the target images, or a list of folders.
        clusters: k.
        min_hits: target images that a cluster needs to be kept (DataComp: 1).
        seed: of k-means.
        sample: pool embeddings to train k-means on; None for 256 a cluster, fewer if those took more than 8 GiB.
        iterations: of k-means.
        column: of the embeddings, the pool's and the targets' (`l14_img` in DataComp's metadata).
        search: "exact"; "coarse", whose recall the funnel reports; "auto", exact up to 20,000 clusters and on a GPU.
    """

    target: Names
    clusters: Positive = 100_000
    min_hits: Positive = 1
    seed: int = 0
    sample: Positive | None = None
    iterations: Positive = 20
    column: str = "clip.image"
    search: Search = "auto"

    name: ClassVar[str] = "image_cluster"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp)"
    example: ClassVar[dict[str, Any]] = {"target": "targets"}

    def __post_init__(self) -> None:
        check_clusters(self.name, self.clusters, self.sample)

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    target_columns = columns

    def targets(self) -> tuple[str, ...]:
        return each(self.target)

    def check(self, view: View) -> None:
        enough(self.name, self.clusters, len(view))
        sizes = [len(view.target(name)) for name in self.targets() if name in view.targets]
        if len(sizes) == len(self.targets()) and not sum(sizes):
            raise WinnowError("the target set is empty", where=", ".join(self.targets()), do="Give one with images.")

    def fit(self, view: View) -> State:
        pool = sample_vectors(view, self.column, self.clusters, self.sample, self.seed)
        centroids = train_centroids(
            pool, self.clusters, seed=self.seed, iterations=self.iterations, sample=len(pool), search=self.search
        )
        nearest_centroid = NearestCentroid(centroids, self.search)
        nearest_centroid.tune(pool)
        hits, ignored = np.zeros(self.clusters, np.int64), 0
        for name in self.targets():
            for batch in view.target(name).batches((self.column,)):
                vectors, usable = embeddings(batch, self.column)
                hits += np.bincount(nearest_centroid(vectors[usable]), minlength=self.clusters)
                ignored += int(np.count_nonzero(~usable))
        if not hits.any():
            raise WinnowError("the target set has no usable image", where=", ".join(self.targets()))
        return fitted_state(nearest_centroid, hits, ignored)

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        vectors, mask = embeddings(batch, self.column)
        if mask.any():
            mask[mask] = (state["hit"] >= self.min_hits)[nearest_centroid_of(state)(vectors[mask])]
        return mask

    def report(self, state: State) -> dict[str, Any]:
        return hit_report(state, self.min_hits)

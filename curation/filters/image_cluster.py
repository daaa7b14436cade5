"""Image-based filtering: keep the clusters of the pool that a target set's pictures fall into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from curation.clusters import assign, stack, train_centroids
from curation.filters.base import Filter, State
from curation.measures.clip import as_matrix
from infra.errors import UsageError, WinnowError

if TYPE_CHECKING:
    from curation.view import View


@dataclass(frozen=True)
class ImageCluster(Filter):
    """Cluster the pool's image embeddings; keep clusters that are the nearest of at least one target picture.

    Gadre et al. 2023 (DataComp), "image-based filtering", without its caption pre-filter. DataComp uses 100,000
    clusters and the ImageNet training pictures as targets; nearest is by inner product.

    Args:
        target: folder of shards with the target pictures, or a list of folders.
        clusters: k.
        min_hits: target pictures that a cluster needs to be kept (DataComp: 1).
        seed: of k-means.
        sample: pool embeddings to train k-means on; None for 256 a cluster.
    """

    target: str | tuple[str, ...]
    clusters: int = 100_000
    min_hits: int = 1
    seed: int = 0
    sample: int | None = None

    name: ClassVar[str] = "image_cluster"
    paper: ClassVar[str] = "Gadre et al. 2023 (DataComp)"

    def __post_init__(self) -> None:
        if isinstance(self.target, list):
            object.__setattr__(self, "target", tuple(self.target))
        if not self.target:
            raise UsageError("image_cluster: the target is empty")
        if self.clusters < 1 or self.min_hits < 1:
            raise UsageError("image_cluster: clusters and min_hits start at 1")

    def columns(self) -> tuple[str, ...]:
        return ("clip.image",)

    def numeric(self) -> tuple[str, ...]:
        return ("clip.image",)

    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    def target_columns(self) -> tuple[str, ...]:
        return ("clip.image",)

    def fit(self, view: View) -> State:
        pool = stack(_embeddings(batch) for batch in view.batches(self.columns()))
        wanted = stack(
            _embeddings(batch) for name in self.targets() for batch in view.target(name).batches(("clip.image",))
        )
        if not len(wanted):
            raise WinnowError("the target set has no usable picture", where=", ".join(self.targets()))
        centroids = train_centroids(pool, self.clusters, seed=self.seed, sample=self.sample)
        hits = np.bincount(assign(wanted, centroids), minlength=self.clusters)
        return {"centroids": centroids, "hits": hits}

    def keep(self, batch: pa.Table, state: State) -> np.ndarray:
        vectors, present = as_matrix(batch["clip.image"])
        return (state["hits"] >= self.min_hits)[assign(vectors, state["centroids"])] & present


def _embeddings(batch: pa.Table) -> np.ndarray:
    vectors, present = as_matrix(batch["clip.image"])
    return vectors[present]

"""k-means over embeddings with FAISS."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from infra.errors import WinnowError


def train_centroids(
    vectors: np.ndarray, clusters: int, *, seed: int = 0, iterations: int = 20, sample: int | None = None
) -> np.ndarray:
    """Spherical k-means (Dhillon & Modha 2001): centroids on the unit sphere, similarity by inner product.

    Args:
        vectors: L2-normalised, float16 or float32, shape [n, d].
        clusters: number of centroids, k.
        seed: of the sample and of FAISS's initial centroids.
        iterations: of Lloyd's algorithm.
        sample: train on this many, drawn uniformly without replacement; None for 256 a centroid (FAISS's own bound).

    Returns:
        float32, shape [k, d].

    Raises:
        WinnowError: fewer vectors than clusters.
    """
    import faiss

    if len(vectors) < clusters:
        raise WinnowError(
            f"{len(vectors)} samples cannot make {clusters} clusters",
            do="Ask for fewer clusters, or measure more samples.",
        )
    sample = max(256 * clusters if sample is None else sample, clusters)
    if len(vectors) > sample:
        chosen = np.random.default_rng(seed).choice(len(vectors), sample, replace=False)
        vectors = vectors[np.sort(chosen)]
    gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        gpu=gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, -(-len(vectors) // clusters)),
    )
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(kmeans.centroids).reshape(clusters, -1)


def assign(vectors: np.ndarray, centroids: np.ndarray, batch: int = 16384) -> np.ndarray:
    """The nearest centroid of each vector by inner product; ties go to the lower number. int64, shape [n]."""
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    parts = []
    for start in range(0, len(vectors), batch):
        block = np.ascontiguousarray(vectors[start : start + batch], dtype=np.float32)
        parts.append(index.search(block, 1)[1][:, 0])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def stack(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate matrices; an empty one if there are none."""
    found = list(parts)
    return np.concatenate(found) if found else np.empty((0, 0), np.float16)

"""k-means over embeddings, with FAISS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View, embeddings
from winnow.curation.search.centroids import has_gpu, is_exact
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError

# Embeddings to train on per centroid by default (FAISS's upper bound); fewer if they exceed LARGEST bytes as float32.
PER_CENTROID = 256
LARGEST = 8 << 30


def check_clusters(name: str, clusters: int, sample: int | None) -> None:
    """Raises ParameterError, as the filter of that name, when the sample has fewer vectors than clusters."""
    if sample is not None and sample < clusters:
        what = f"{name}: a sample of {sample} cannot make {clusters} clusters"
        raise ParameterError(what, do="Raise the sample.").below("sample")


def enough(name: str, clusters: int, n: int) -> None:
    """Raises WinnowError when n samples cannot make the clusters."""
    if n < clusters:
        do = f"Set `clusters` to at most {n}." if n else "The pool is empty."
        raise WinnowError(f"{n} samples cannot make {clusters} clusters", where=name, do=do)


def sample_size(clusters: int, dim: int, sample: int | None) -> int:
    """The number of embeddings that k-means is trained on."""
    return max(clusters, min(PER_CENTROID * clusters, LARGEST // (4 * dim))) if sample is None else sample


def sample_vectors(view: View, column: str, clusters: int, sample: int | None, seed: int) -> np.ndarray:
    """A uniform sample, without replacement, of a pool's embeddings to train k-means on; float16, shape [m, d].

    Row indices are drawn, and the drawn rows that have a finite embedding are taken in pool order. So no more than the
    sample is in memory.
    """
    n = len(view)
    rows: np.ndarray | None = None
    found, start = [], 0
    for batch in view.batches((column,)):
        taken = batch
        dim = embeddings(batch.slice(0, 1), column)[0].shape[1]
        if rows is None and dim and (size := sample_size(clusters, dim, sample)) < n:
            rows = np.sort(np.random.default_rng(seed).choice(n, size, replace=False, shuffle=False))
        if rows is not None:
            low, high = np.searchsorted(rows, (start, start + batch.num_rows))
            taken = batch.take(pa.array(rows[low:high] - start))
        matrix, usable = embeddings(taken, column)
        if usable.any():
            found.append(matrix[usable])
        start += batch.num_rows
    return np.concatenate(found) if found else np.empty((0, 0), np.float16)


def train_centroids(
    vectors: np.ndarray,
    clusters: int,
    *,
    seed: int = 0,
    iterations: int = 20,
    sample: int | None = None,
    search: str = "auto",
) -> np.ndarray:
    """Spherical k-means (Dhillon & Modha 2001): centroids on the unit sphere, similarity by inner product.

    Args:
        vectors: L2-normalised, float16 or float32, shape [n, d].
        clusters: number of centroids, k.
        seed: of the sample and of FAISS's initial centroids.
        iterations: of Lloyd's algorithm.
        sample: train on this many, drawn uniformly without replacement; None for 256 per centroid (FAISS's bound),
            fewer if these take more than 8 GiB.
        search: how each iteration finds the nearest centroid: "exact"; "coarse", by FAISS's HNSW graph; "auto", exact
            up to 20,000 centroids and on a GPU.

    Returns:
        float32, shape [k, d].

    Raises:
        WinnowError: fewer vectors than clusters.
    """
    import faiss

    enough("k-means", clusters, len(vectors))
    size = sample_size(clusters, vectors.shape[1], sample)
    if len(vectors) > size:
        selected = np.random.default_rng(seed).choice(len(vectors), size, replace=False, shuffle=False)
        vectors = vectors[np.sort(selected)]
    dim = vectors.shape[1]
    kmeans = faiss.Clustering(dim, clusters)
    kmeans.niter, kmeans.seed, kmeans.spherical = iterations, seed, True
    kmeans.min_points_per_centroid = 1
    kmeans.max_points_per_centroid = -(-len(vectors) // clusters)
    if is_exact(clusters, search):
        index: Any = faiss.IndexFlatIP(dim)
        if has_gpu():
            index = faiss.index_cpu_to_all_gpus(index)
    else:
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = 64
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32), index)
    return faiss.vector_float_to_array(kmeans.centroids).reshape(clusters, dim)

"""Nearest neighbours of embeddings, pairs above a cosine, and groups of near samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

# Up to this many vectors the search is exhaustive. Above, it uses an inverted file, and its recall is measured.
EXACT = 200_000
_BATCH = 4096
_PROBES = 64
_TESTED = 1000


def nearest_neighbours(vectors: np.ndarray, k: int, exact: int = EXACT) -> tuple[np.ndarray, np.ndarray, float]:
    """The k nearest other vectors of each, by Euclidean distance.

    Args:
        vectors: float16 or float32, shape [n, d], n > k.
        k: neighbours, at least 1.
        exact: most vectors to search exhaustively; above, FAISS's inverted file of 4 sqrt(n) lists, 64 probed.

    Returns:
        neighbours, int64, shape [n, k], nearest first; squared distances computed from the differences, float64,
        shape [n, k]; recall against the exhaustive search on 1,000 evenly spread vectors (1.0 where exhaustive).
    """
    import faiss

    n = len(vectors)
    index = _index(vectors, faiss.METRIC_L2, exact)
    found = np.empty((n, k), np.int64)
    squared = np.empty((n, k), np.float64)
    for start in range(0, n, _BATCH):
        block = _float(vectors[start : start + _BATCH])
        found[start : start + len(block)] = _others(index.search(block, k + 1)[1], start, k)
    for start in range(0, n, _BATCH):
        rows = found[start : start + _BATCH]
        block = _float(vectors[start : start + _BATCH])[:, None, :]
        squared[start : start + _BATCH] = ((_float(vectors[rows.ravel()]).reshape(*rows.shape, -1) - block) ** 2).sum(2)
    recall = 1.0
    if n > exact:
        tested = np.unique(np.linspace(0, n - 1, _TESTED).astype(np.int64))
        true = _index(vectors, faiss.METRIC_L2, n).search(_float(vectors[tested]), k + 1)[1]
        true = np.stack([_others(row[None], at, k)[0] for row, at in zip(true, tested, strict=True)])
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(true, found[tested], strict=True)]))
    return found, squared, recall


def cosine_pairs(
    a: np.ndarray, b: np.ndarray | None, threshold: float, exact: int = EXACT
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) whose inner product is at least `threshold`.

    Args:
        a: L2-normalised, float16 or float32, shape [n, d].
        b: the same, shape [m, d]; None for a with itself, each unordered pair once with i < j.
        threshold: of the inner product.
        exact: largest number of vectors in b to compare exhaustively; above, an inverted file that may miss pairs.

    Returns:
        i and j, int64, shape [pairs], sorted by i, then j.
    """
    import faiss

    other = a if b is None else b
    index = _index(other, faiss.METRIC_INNER_PRODUCT, exact)
    lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(a), _BATCH):
        block = _float(a[start : start + _BATCH])
        # FAISS's range search excludes the threshold.
        limits, _, j = index.range_search(block, float(np.nextafter(np.float32(threshold), np.float32(-2))))
        i = start + np.repeat(np.arange(len(block)), np.diff(limits.astype(np.int64)))
        keep = i < j if b is None else slice(None)
        lefts.append(i[keep])
        rights.append(j[keep].astype(np.int64))
    i, j = np.concatenate(lefts), np.concatenate(rights)
    order = np.lexsort((j, i))
    return i[order], j[order]


def _float(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block, dtype=np.float32)


def _index(vectors: np.ndarray, metric: int, exact: int) -> Any:
    import faiss

    n, dim = vectors.shape
    if n <= exact:
        index: Any = faiss.IndexFlat(dim, metric)
    else:
        lists = int(4 * n**0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlat(dim, metric), dim, lists, metric)
        selected = np.sort(np.random.default_rng(0).choice(n, min(n, 64 * lists), replace=False))
        index.cp.min_points_per_centroid = 1
        index.train(_float(vectors[selected]))
        index.nprobe = _PROBES
    for start in range(0, n, 1 << 16):
        index.add(_float(vectors[start : start + (1 << 16)]))
    return index


def _others(found: np.ndarray, first: int, k: int) -> np.ndarray:
    """The neighbours found, without the vector itself; without the last one where the vector is not among them."""
    itself = found == (first + np.arange(len(found)))[:, None]
    itself[:, -1] |= ~itself.any(axis=1)
    return found[~itself].reshape(len(found), k)


def components(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Connected components: for each of n nodes the lowest index in its component. int64, shape [n]."""
    label = np.arange(n)
    while len(i):
        low = np.minimum(label[i], label[j])
        before = label.copy()
        for ends in (i, j):
            np.minimum.at(label, label[ends], low)
            np.minimum.at(label, ends, low)
        label = label[label]
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(before, label):
            break
    return label


def first_of_groups(i: np.ndarray, j: np.ndarray, rank: np.ndarray, join: str) -> np.ndarray:
    """Which nodes are kept when near ones are removed. bool, shape [n].

    Args:
        i, j: pairs of near nodes, shape [pairs].
        rank: the order in which nodes are preferred, a permutation of 0 to n - 1, shape [n].
        join: "components" keeps the first node, by rank, of each connected component. "greedy" keeps, in the order of
            rank, each node that is near no kept node; so each removed node is near a kept one.
    """
    n = len(rank)
    if join == "components":
        labels = components(n, rank[i], rank[j])  # nodes are renumbered by rank, so the label is the best rank
        return labels[rank] == rank
    stays = np.ones(n, dtype=bool)
    ends = np.concatenate([i, j])
    others = np.concatenate([j, i])
    later = rank[others] > rank[ends]
    ends, others = ends[later], others[later]
    order = np.argsort(rank[ends], kind="stable")
    ends, others = ends[order], others[order]
    for low, high in runs(ends):
        if stays[ends[low]]:
            stays[others[low:high]] = False
    return stays


def runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where each run of equal values starts and ends."""
    if len(values):
        yield from pairwise([0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)])

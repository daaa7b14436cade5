"""The nearest of many centroids, with NumPy or FAISS."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from winnow.curation.columns.table import State
from winnow.infra.io.prefetch import cores

# Up to EXACT centroids, and always with a GPU, each vector is compared with all. Above, it is compared with those in
# the nearest lists of an inverted file: as many lists as give a recall of RECALL on TESTED vectors.
EXACT = 20_000
RECALL = 0.99
TESTED = 1000
_BATCH = 16_384
_PRODUCTS = 64 << 20  # bytes of products in memory


def has_gpu() -> bool:
    """Whether FAISS was built for GPUs (`faiss-gpu`) and sees one."""
    import faiss

    return bool(getattr(faiss, "get_num_gpus", lambda: 0)())


def is_exact(clusters: int, search: str) -> bool:
    """Whether a search among that many centroids compares with all."""
    return search == "exact" or (search == "auto" and (clusters <= EXACT or has_gpu()))


@dataclass
class NearestCentroid:
    """Finds the nearest centroid of vectors, by inner product.

    Args:
        centroids: float32, shape [k, d].
        search: "exact", "coarse" (FAISS's inverted file over the centroids) or "auto".
        probes: lists of the inverted file to search; None to set it by `tune`.
    """

    centroids: np.ndarray
    search: str = "auto"
    probes: int | None = None
    recall: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        import faiss

        self.centroids = np.ascontiguousarray(self.centroids, dtype=np.float32)
        k, dim = self.centroids.shape
        self.exact = is_exact(k, self.search)
        flat: Any = faiss.IndexFlatIP(dim)
        self._index: Any = None
        if self.exact and has_gpu():
            flat.add(self.centroids)
            self._index = faiss.index_cpu_to_all_gpus(flat)
        if self.exact:
            return
        lists = max(1, min(k, int(4 * math.sqrt(k))))
        self._flat = flat
        self._index = faiss.IndexIVFFlat(flat, dim, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.spherical, self._index.cp.min_points_per_centroid = True, 1
        self._index.train(self.centroids)
        self._index.add(self.centroids)
        self._index.nprobe = min(self.probes or lists, lists)

    def __call__(self, vectors: np.ndarray, batch: int = _BATCH) -> np.ndarray:
        """The index of the centroid nearest to each vector; the lowest of equally near ones if exact. int64, shape [n].

        Args:
            vectors: float16 or float32, shape [n, d].
            batch: how many are converted at a time.
        """
        result = np.empty(len(vectors), np.int64)
        if self._index is None:
            _exhaustive(vectors, self.centroids, min(batch, len(vectors)), result)
            return result
        for start in range(0, len(vectors), batch):
            block = np.ascontiguousarray(vectors[start : start + batch], dtype=np.float32)
            result[start : start + len(block)] = self._index.search(block, 1)[1][:, 0]
        return result

    def tune(self, vectors: np.ndarray) -> None:
        """Double the number of lists to search until the recall is 99 % on up to 1,000 evenly spread vectors, compared
        with an exhaustive search. Sets `recall`."""
        if self.exact or not len(vectors):
            return
        tested = vectors[np.unique(np.linspace(0, len(vectors) - 1, TESTED).astype(np.int64))]
        truth = NearestCentroid(self.centroids, "exact")(tested)
        probes = 8
        while True:
            self.probes = self._index.nprobe = min(probes, self._index.nlist)
            self.recall = float(np.mean(self(tested) == truth))
            if self.recall >= RECALL or self.probes == self._index.nlist:
                return
            probes *= 2


def _exhaustive(vectors: np.ndarray, centroids: np.ndarray, batch: int, result: np.ndarray) -> None:
    """Matrix products in blocks; threads find the largest of each row while the block is in the cache.

    A quarter faster than FAISS's exhaustive search, because of NumPy's BLAS. Finding the largest takes about 5 % of the
    time.
    """
    rows = max(1, min(batch, _PRODUCTS // (4 * len(centroids))))
    products = np.empty((rows, len(centroids)), np.float32)
    threads = cores()
    with ThreadPoolExecutor(threads) as workers:
        for start in range(0, len(vectors), rows):
            block = np.ascontiguousarray(vectors[start : start + rows], dtype=np.float32)
            part = np.matmul(block, centroids.T, out=products[: len(block)])
            edges = np.linspace(0, len(part), threads + 1).astype(int)
            found = workers.map(lambda low, high, part=part: part[low:high].argmax(axis=1), edges[:-1], edges[1:])
            result[start : start + len(block)] = np.concatenate(list(found))


def assign(vectors: np.ndarray, centroids: np.ndarray, batch: int = _BATCH, search: str = "exact") -> np.ndarray:
    """The nearest centroid of each vector, as `NearestCentroid` finds it; int64, shape [n]."""
    nearest_centroid = NearestCentroid(centroids, search)
    nearest_centroid.tune(vectors)
    return nearest_centroid(vectors, batch)


def hit_report(state: State, min_hits: int = 1) -> dict[str, Any]:
    """What a filter by clusters reports of its `fitted_state`."""
    hits = int((state["hit"] >= min_hits).sum())
    report = {"clusters": len(state["hit"]), "clusters with a target": hits}
    ignored = {"targets without a value": int(state["ignored"])} if "ignored" in state else {}
    return report | ignored | {"recall of the search": float(state["recall"])}


_last: list[tuple[np.ndarray, int, NearestCentroid]] = []


def fitted_state(nearest_centroid: NearestCentroid, hit: np.ndarray, ignored: int = 0) -> State:
    """The state of a filter by clusters: `centroids`, which of them were `hit`, how they are searched, and how many
    targets were `ignored`, because they have no value."""
    found = {"centroids": nearest_centroid.centroids, "hit": hit, "recall": np.array(nearest_centroid.recall)}
    if ignored:
        found["ignored"] = np.array(ignored)
    return found if nearest_centroid.exact else {**found, "probes": np.array(nearest_centroid.probes)}


def nearest_centroid_of(state: State) -> NearestCentroid:
    """The search that `fitted_state` describes. The last one is cached, because a pool is read shard by shard."""
    probes = int(state["probes"]) if "probes" in state else 0
    if not (_last and _last[0][0] is state["centroids"] and _last[0][1] == probes):
        made = NearestCentroid(state["centroids"], "coarse" if probes else "exact", probes or None)
        _last[:] = [(state["centroids"], probes, made)]
    return _last[0][2]

"""Pairs of 64-bit hashes within a Hamming radius, and groups of them."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np

BITS = 64
# Candidate pairs in memory; more are processed in parts.
_PART = 4_000_000


def hamming_pairs(a: np.ndarray, b: np.ndarray | None, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with at most `radius` bits of a[i] and b[j] different; exact.

    The hash is split into blocks. Two hashes that differ in at most `radius` bits agree in all but at most `radius`
    blocks, so they are equal in a table keyed by some choice of the other blocks (Manku, Jain & Das Sarma 2007,
    "Detecting near-duplicates for web crawling", section 3). The number of blocks minimises the expected cost of
    sorting the tables and comparing their candidates.

    Args:
        a: uint64, shape [n].
        b: uint64, shape [m]; None for a with itself, each unordered pair once with i < j.
        radius: 0 to 63.

    Returns:
        i and j, int64, shape [pairs], sorted by i, then j.
    """
    same = b is None
    a = np.ascontiguousarray(a, dtype=np.uint64)
    other = a if b is None else np.ascontiguousarray(b, dtype=np.uint64)
    found: list[np.ndarray] = []
    for mask in _masks(max(len(a), 1), max(len(other), 1), radius):
        for i, j in _equal_pairs(a & mask, other & mask):
            if same:
                ahead = i < j
                i, j = i[ahead], j[ahead]
            near = np.bitwise_count(a[i] ^ other[j]) <= radius
            found.append(i[near] * len(other) + j[near])
    pairs = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    return np.divmod(pairs, max(len(other), 1))


def _masks(n: int, m: int, radius: int) -> list[np.uint64]:
    """The bits that key each table; a single empty mask (compare all pairs) when that is cheapest."""
    best, least = 0, float(n) * m
    for blocks in range(radius + 1, min(2 * radius + 4, BITS) + 1):
        tables = math.comb(blocks, radius)
        if tables > 5000:
            break
        bits = BITS * (blocks - radius) / blocks
        # Sorting costs about ten comparisons per row. The factor 4 is for real hashes, which are less uniform.
        cost = tables * (10.0 * (n + m) + 4 * float(n) * m / 2.0 ** min(bits, 60))
        if cost < least:
            best, least = blocks, cost
    if not best:
        return [np.uint64(0)]
    edges = [round(k * BITS / best) for k in range(best + 1)]
    parts = [((1 << (hi - lo)) - 1) << lo for lo, hi in pairwise(edges)]
    return [np.uint64(sum(choice)) for choice in combinations(parts, best - radius)]


def _equal_pairs(left: np.ndarray, right: np.ndarray):  # type: ignore[no-untyped-def]
    """Pairs (i, j) with left[i] == right[j], in parts of bounded size."""
    order_left, order_right = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    keys = left[order_left]
    sorted_right = right[order_right]
    start = np.searchsorted(sorted_right, keys, "left")
    count = np.searchsorted(sorted_right, keys, "right") - start
    rows = np.nonzero(count)[0]
    ends = np.cumsum(count[rows])
    low = 0
    while low < len(rows):
        before = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _PART, "right")))
        part = rows[low:high]
        repeat = np.repeat(np.arange(len(part)), count[part])
        offset = np.arange(len(repeat)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        yield order_left[part[repeat]], order_right[start[part[repeat]] + offset]
        low = high

"""Exact selection from a stream, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

# Values held at once; a stream up to this length takes one pass.
BLOCK = 1 << 21
_FIRST, _NEXT = 20, 22  # bits counted in the first pass and in each later one
_REST = 64 - _FIRST


class _FirstPass:
    """Counts of the leading bits of a stream, and its values in the bins that are likely to hold the result.

    Args:
        rank: from the stream's length to the rank that is looked for.
        block: how many values to hold.
    """

    def __init__(self, rank: Callable[[int], int], block: int) -> None:
        self.rank, self.block = rank, block
        self.n = 0
        self.counts: np.ndarray | None = None
        self.guess = range(0)
        self.near: list[np.ndarray] = []
        self.held: list[np.ndarray] = []
        self.size = 0

    def add(self, values: np.ndarray) -> None:
        self.n += len(values)
        self.held.append(values)
        self.size += len(values)
        if self.size >= self.block:
            self.count()
            if sum(map(len, self.near)) > self.block:
                self.near, self.guess = [], range(0)

    def count(self) -> None:
        """Count what is held."""
        found, numbers = _bit_counts(self.held)
        if self.counts is None:
            # In a mixed stream the result of the first block is near that of the whole stream.
            self.guess = _around(found, self.rank(self.n))
        self.counts = found if self.counts is None else self.counts + found
        self.near.append(_between(numbers, self.guess.start << _REST, self.guess.stop << _REST))
        self.held, self.size = [], 0


def nth_largest(
    stream: Callable[[], Iterable[np.ndarray]], rank: Callable[[int], int], block: int = BLOCK
) -> tuple[float, int]:
    """The value at a rank of a stream sorted in descending order.

    Radix selection: the leading bits of order-preserving integers are counted. Within the bin that holds the rank,
    either the values are compared or the next bits are counted. This takes one pass where the first block predicts the
    bin, as with a fraction of a mixed stream; otherwise two, and four when nearly all values are equal.

    Args:
        stream: returns the values each time it is called, as float arrays of any lengths.
        rank: from the stream's length (NaN included) to the rank, counted from 0.
        block: how many values to hold.

    Returns:
        the value as float64, and the stream's length. NaN is below all numbers; the value is -inf when the rank falls
        on a NaN or past the end.
    """
    first = _FirstPass(rank, block)
    for values in stream():
        first.add(values)
    wanted, n = rank(first.n), first.n
    if first.counts is None:
        return _at([_numbers(first.held)], wanted), n
    first.count()
    if wanted >= first.counts.sum():
        return -np.inf, n
    number, wanted = _bin(first.counts, wanted)
    if number in first.guess:
        return _at([_between(values, number << _REST, (number + 1) << _REST) for values in first.near], wanted), n
    return _search(stream, number << _REST, wanted, int(first.counts[number]), block), n


def _search(stream: Callable[[], Iterable[np.ndarray]], low: int, rank: int, size: int, block: int) -> float:
    """The value at a rank of the bin that starts at `low` and holds `size` values, by further passes."""
    shift = _REST
    while shift > 0:
        high = low + (1 << shift)
        if size <= block:
            return _at([_between(values, low, high) for values in stream()], rank)
        finer = max(shift - _NEXT, 0)
        counts = np.zeros(1 << (shift - finer), np.int64)
        for values in stream():
            keys = _keys(_between(values, low, high))
            np.add.at(counts, ((keys - np.uint64(low)) >> np.uint64(finer)).astype(np.int64), 1)
        number, rank = _bin(counts, rank)
        low, shift, size = low + (number << finer), finer, int(counts[number])
    return _value(low)


def _bin(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds a rank counted from the top, and the rank within it."""
    above = np.cumsum(counts[::-1])
    from_top = int(np.searchsorted(above, rank, side="right"))
    number = len(counts) - 1 - from_top
    return number, rank - int(above[from_top] - counts[number])


def _around(counts: np.ndarray, rank: int) -> range:
    """The bin that holds a rank, and one on either side."""
    number = _bin(counts, min(rank, int(counts.sum()) - 1))[0] if counts.any() else 0
    return range(max(number - 1, 0), min(number + 2, len(counts)))


def _numbers(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenated as float64, without NaN; -0 becomes 0, which it equals."""
    values = np.concatenate(parts).astype(np.float64, copy=False) if parts else np.empty(0)
    missing = np.isnan(values)
    return (values[~missing] if missing.any() else values) + 0.0


def _at(parts: list[np.ndarray], rank: int) -> float:
    values = np.concatenate(parts) if parts else np.empty(0)
    if rank >= len(values):
        return -np.inf
    at = len(values) - 1 - rank
    return float(np.partition(values, at)[at])


def _keys(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the float64 values."""
    bits = values.view(np.int64)
    return (bits ^ ((bits >> 63) | np.int64(-(1 << 63)))).view(np.uint64)


def _value(key: int) -> float:
    """The inverse of `_keys`; infinities for the keys beyond them, which are those of NaN."""
    bits = key ^ (1 << 63 if key >> 63 else (1 << 64) - 1)
    value = float(np.array([bits], np.uint64).view(np.float64)[0])
    return value if not np.isnan(value) else np.inf if key >> 63 else -np.inf


def _bit_counts(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How many values each bin has, and the values concatenated."""
    values = _numbers(parts)
    return np.bincount((_keys(values) >> np.uint64(_REST)).astype(np.int64), minlength=1 << _FIRST), values


def _between(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """The values whose keys are in [low, high), as float64."""
    if low >= high:
        return np.empty(0)
    # NumPy's floats, so that float32 values are compared exactly.
    inside = (values >= np.float64(_value(low))) & (values <= np.float64(_value(high - 1)))
    return values[inside].astype(np.float64) + 0.0

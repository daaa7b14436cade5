"""Selection from a stream: the value at a place of the falling order, exactly, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

# Values held at once; streams up to this length are sorted out in one pass.
BLOCK = 1 << 21
_FIRST, _NEXT = 20, 22  # bits counted in the first pass and in each later one
_REST = 64 - _FIRST


def nth_largest(
    stream: Callable[[], Iterable[np.ndarray]], rank: Callable[[int], int], block: int = BLOCK
) -> tuple[float, int]:
    """The value at a place of a stream's falling order.

    Radix selection: the leading bits of order-preserving integers are counted, then, within the bin that holds the
    place, either its values are looked at or the next bits are counted. One pass where the first block foretells the
    bin, as with a fraction of a mixed stream; else two, and four when nearly all values are equal.

    Args:
        stream: gives the values anew each time, as float arrays of any lengths.
        place: from the stream's length (NaN counted in) to the place, counted from 0.
        block: how many values to hold.

    Returns:
        the value as float64, and the stream's length. NaN stands below all numbers; -inf when the place falls on one
        or past the end.
    """
    n, counts, held, size = 0, None, [], 0
    near: list[np.ndarray] = []
    guess = range(0)
    for values in stream():
        n += len(values)
        held.append(values)
        size += len(values)
        if size >= block:
            found, numbers = _bit_counts(held)
            if counts is None:
                # A fraction of the first block lies near that of all, if the stream is mixed.
                guess = _around(found, rank(n))
            counts = found if counts is None else counts + found
            near.append(_between(numbers, guess.start << _REST, guess.stop << _REST))
            if sum(map(len, near)) > block:
                near, guess = [], range(0)
            held, size = [], 0
    wanted = rank(n)
    if counts is None:
        return _at([_numbers(held)], wanted), n
    found, numbers = _bit_counts(held)
    near.append(_between(numbers, guess.start << _REST, guess.stop << _REST))
    counts = counts + found
    held.clear()
    if wanted >= counts.sum():
        return -np.inf, n
    shift, low = _REST, 0
    while True:
        number, wanted = _bin(counts, wanted)
        low += number << shift
        if shift == 0:
            return _value(low), n
        high = low + (1 << shift)
        if shift == _REST and number in guess:
            return _at([_between(values, low, high) for values in near], wanted), n
        if counts[number] <= block:
            return _at([_between(values, low, high) for values in stream()], wanted), n
        finer = max(shift - _NEXT, 0)
        counts = np.zeros(1 << (shift - finer), np.int64)
        for values in stream():
            keys = _keys(_between(values, low, high))
            np.add.at(counts, ((keys - np.uint64(low)) >> np.uint64(finer)).astype(np.int64), 1)
        shift = finer


def _bin(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin that holds a place counted from the top, and the place within it."""
    above = np.cumsum(counts[::-1])
    from_top = int(np.searchsorted(above, rank, side="right"))
    number = len(counts) - 1 - from_top
    return number, rank - int(above[from_top] - counts[number])


def _around(counts: np.ndarray, rank: int) -> range:
    """The bin that holds a place, and one on either side."""
    number = _bin(counts, min(rank, int(counts.sum()) - 1))[0] if counts.any() else 0
    return range(max(number - 1, 0), min(number + 2, len(counts)))


def _numbers(parts: list[np.ndarray]) -> np.ndarray:
    """Together as float64 without NaN; -0 as 0, which it equals."""
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
    """The inverse of `_keys`; infinities for the keys beyond theirs, which stand for NaN."""
    bits = key ^ (1 << 63 if key >> 63 else (1 << 64) - 1)
    value = float(np.array([bits], np.uint64).view(np.float64)[0])
    return value if not np.isnan(value) else np.inf if key >> 63 else -np.inf


def _bit_counts(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How many values each bin has, and the values together."""
    values = _numbers(parts)
    return np.bincount((_keys(values) >> np.uint64(_REST)).astype(np.int64), minlength=1 << _FIRST), values


def _between(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Those whose keys lie in [low, high), as float64."""
    if low >= high:
        return np.empty(0)
    # NumPy's floats, so that float32 values are compared exactly.
    inside = (values >= np.float64(_value(low))) & (values <= np.float64(_value(high - 1)))
    return values[inside].astype(np.float64) + 0.0

"""Batches out of an indexed pool, in an order that is a pure function of (seed, epoch, subset).

The endless concatenation of the epochs' permutations is one sequence of positions; step t of a training with global
batch B takes positions [t·B, (t+1)·B), and each process its own contiguous part. So the order, and every random
crop, are the same for any number of processes, and any step can be started from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import pyarrow as pa

from infra.errors import WinnowError
from infra.pictures import PictureError, decode_picture
from infra.pool import Pool, read_members
from infra.uids import load_subset
from pretrain.objectives.base import Sample

_COLUMNS = ("uid", "text", "tar", "image_offset", "image_size")
_CHUNK = 32
_AHEAD = 3

Views = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples in an epoch; int64 [n]."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Order:
    """Which sample stands at each position of the endless sequence. Keeps the permutations of the latest epochs."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 positions [k] to int64 sample numbers [k]."""
        epochs = positions // self.n
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            if epoch not in self._epochs:
                self._epochs[int(epoch)] = epoch_order(self.n, self.seed, int(epoch))
            here = epochs == epoch
            result[here] = self._epochs[int(epoch)][positions[here] - epoch * self.n]
        for old in sorted(self._epochs)[:-2]:
            del self._epochs[old]
        return result


class Samples:
    """The samples of a pool, or of a subset of it, by number.

    A uid that a subset lists k times counts k times, as in DataComp's resharder. Holds the columns needed to read a
    sample (about 50 bytes and its caption), not the pictures.

    Args:
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy, or None for the whole pool.

    Raises:
        WinnowError: nothing is left to train on, or the subset names samples the pool has not.
    """

    def __init__(self, pool: str, subset: str | None) -> None:
        self.pool = Pool.open(pool)
        chosen = None if subset is None else _counted(load_subset(subset))
        self.tables: list[pa.Table] = []
        rows, shards, found = [], [], 0
        for number, (shard, table) in enumerate(self.pool.tables(_COLUMNS)):
            table = table.combine_chunks()
            row = np.arange(table.num_rows)
            if chosen is not None:
                times = _times(shard.uids(), *chosen)
                row = np.repeat(row, times)
                found += int(np.count_nonzero(times))
            self.tables.append(table.drop_columns(["uid"]))
            rows.append(row)
            shards.append(np.full(len(row), number, np.int32))
        self._row = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self._shard = np.concatenate(shards) if shards else np.empty(0, np.int32)
        if chosen is not None and found < len(chosen[0]):
            raise WinnowError(
                f"names {len(chosen[0]) - found} samples that the pool has not", where=subset, do=f"The pool: {pool}."
            )
        if not len(self):
            raise WinnowError("holds no sample to train on", where=subset or pool)

    def __len__(self) -> int:
        return len(self._row)

    def read(self, numbers: np.ndarray) -> list[tuple[bytes, str]]:
        """Encoded picture and caption of each sample, read by range, file by file."""
        out: list[tuple[bytes, str]] = [(b"", "")] * len(numbers)
        shards, rows = self._shard[numbers], self._row[numbers]
        for shard in np.unique(shards):
            at = np.nonzero(shards == shard)[0]
            table = self.tables[shard].take(pa.array(rows[at]))
            pictures = read_members(self.pool.shards[shard].tars, table, "image")
            for i, picture, text in zip(at, pictures, table["text"].to_pylist(), strict=True):
                out[i] = (picture, text or "")
        return out


def _counted(subset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sorted subset's distinct uids, and how often it has each."""
    if not len(subset):
        return subset, np.empty(0, np.int64)
    starts = np.nonzero(np.concatenate([[True], subset[1:] != subset[:-1]]))[0]
    return subset[starts], np.diff(np.append(starts, len(subset)))


def _times(uids: np.ndarray, distinct: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How often each uid is in the subset; int64 [n]."""
    if not len(distinct):
        return np.zeros(len(uids), np.int64)
    at = np.minimum(np.searchsorted(distinct, uids), len(distinct) - 1)
    return np.where(distinct[at] == uids, counts[at], 0)


class Batches:
    """One process's part of each global batch, decoded and augmented ahead of time by threads.

    A picture that cannot be decoded is replaced by the next sample in the order that can.

    Args:
        samples: what to draw from.
        views: an objective's augmentation.
        seed: of the order and of the augmentation.
        batch: global batch size.
        rank, world: this process's place among how many.
        first, last: steps, from and before.
        threads: decoding threads.
    """

    def __init__(
        self,
        samples: Samples,
        views: Views,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        last: int,
        threads: int = 2,
    ) -> None:
        self.samples, self.views, self.seed = samples, views, seed
        self.batch, self.share, self.rank = batch, batch // world, rank
        self.step, self.last = first, last
        self.order = Order(len(samples), seed)
        self.waited = 0.0
        self.replaced = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._queue: deque[list[Future]] = deque()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next step's arrays, [batch / world, …] each. `waited` (seconds) and `replaced` (pictures) run on."""
        while len(self._queue) < _AHEAD and self.step < self.last:
            start = self.step * self.batch + self.rank * self.share
            positions = np.arange(start, start + self.share, dtype=np.int64)
            numbers = self.order(positions)
            cuts = range(0, self.share, _CHUNK)
            self._queue.append(
                [self._pool.submit(self._chunk, positions[i : i + _CHUNK], numbers[i : i + _CHUNK]) for i in cuts]
            )
            self.step += 1
        if not self._queue:
            raise StopIteration
        started = time.perf_counter()
        parts = [future.result() for future in self._queue.popleft()]
        self.waited += time.perf_counter() - started
        self.replaced += sum(replaced for _, replaced in parts)
        return {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}

    def _chunk(self, positions: np.ndarray, numbers: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        seen, replaced = [], 0
        for position, (data, text) in zip(positions, self.samples.read(numbers), strict=True):
            try:
                image = decode_picture(data)
            except PictureError:
                image, text = self._instead(int(position))
                replaced += 1
            seen.append(self.views(Sample(image, text), np.random.default_rng((self.seed, int(position)))))
        return {name: np.stack([views[name] for views in seen]) for name in seen[0]}, replaced

    def _instead(self, position: int) -> tuple:
        order = Order(len(self.samples), self.seed)  # the shared one is not for several threads
        for step in range(1, len(self.samples) + 1):
            ((data, text),) = self.samples.read(order(np.array([position + step])))
            try:
                return decode_picture(data), text
            except PictureError:
                continue
        raise WinnowError("no picture of the pool can be decoded", where=self.samples.pool.url)

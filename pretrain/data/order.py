"""The order of the samples: a pure function of (seed, epoch, subset), the same for any number of processes.

The epochs' permutations, one after the other, are one endless sequence of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples in an epoch; int64 [n]."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Order:
    """The sample at each position of the endless sequence. Keeps the permutations of two epochs.

    A source of weight w contributes each of its samples w times per epoch: all of them floor(w) times, and the
    remaining fraction in turn. So after any number of epochs the counts of a source's samples differ by at most one.

    Args:
        sizes: number of samples of each source; samples are numbered consecutively, source after source.
        seed: of the permutations.
        weights: of the sources; 1 for all where None, so that an epoch has each sample exactly once.
    """

    def __init__(self, sizes: int | Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        self.sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        self.weights = [1.0] * len(self.sizes) if weights is None else list(weights)
        self.seed = seed
        totals = [round(weight * n) for n, weight in zip(self.sizes, self.weights, strict=True)]
        self._whole = [int(weight) for weight in self.weights]
        self._rest = [total - whole * n for n, total, whole in zip(self.sizes, totals, self._whole, strict=True)]
        self.epoch_size = sum(totals)
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 positions [k] to int64 sample numbers [k]."""
        epochs = positions // self.epoch_size
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._epoch(int(epoch))[positions[here] - epoch * self.epoch_size]
        return result

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            order = epoch_order(self.epoch_size, self.seed, epoch)
            if any(weight != 1 for weight in self.weights):
                order = self._mix(epoch)[order]
            self._epochs[epoch] = order
            while len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]

    def _mix(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, not yet permuted."""
        parts, start = [], 0
        for source, (n, whole, rest) in enumerate(zip(self.sizes, self._whole, self._rest, strict=True)):
            turn = np.arange(epoch * rest, (epoch + 1) * rest, dtype=np.int64)
            for part in [np.arange(n)] * whole + [self._turns(source, turn)]:
                parts.append(start + part)
            start += n
        return np.concatenate(parts)

    def _turns(self, source: int, positions: np.ndarray) -> np.ndarray:
        """Numbers within a source at positions of its endless sequence of permutations."""
        n, result = self.sizes[source], np.empty_like(positions)
        rounds = positions // max(n, 1)
        for number in np.unique(rounds):
            here = rounds == number
            permutation = np.random.default_rng((self.seed, int(number), source)).permutation(n)
            result[here] = permutation[positions[here] - number * n]
        return result

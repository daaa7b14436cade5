"""Batches out of indexed pools, in an order that is a pure function of (seed, epoch, subset); see `order`.

Step t of a training with global batch B takes positions [t·B, (t+1)·B), and each process its own contiguous part. So
the order, and every random crop, are the same for any number of processes, and a training can start at any step.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from winnow.infra.errors import WinnowError
from winnow.infra.io.images import ImageError
from winnow.infra.pool.sample import Sample
from winnow.infra.stages import stopping
from winnow.pretrain.data.samples import Samples

_AHEAD = 2  # batches of each decoding process

# The number of workers is the user's, and may be more than this node has cores.
warnings.filterwarnings("ignore", message="This DataLoader will create")

Views = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


class _Steps(Dataset):
    """By step, this process's part of the global batch, [n, …] each, and how many of its images were replaced."""

    def __init__(self, samples: Samples, views: Views, seed: int, batch: int, rank: int, world: int) -> None:
        self.samples, self.views, self.seed = samples, views, seed
        self.batch, self.local, self.rank = batch, batch // world, rank
        self.order = samples.order(seed)

    def __getitem__(self, step: int) -> tuple[dict[str, np.ndarray], int] | tuple[str, str | None, str | None]:
        """The arrays and the number; or what an error says, which DataLoader would wrap in a traceback."""
        try:
            return self._make(step)
        except WinnowError as error:
            return error.what, error.where, error.do

    def _make(self, step: int) -> tuple[dict[str, np.ndarray], int]:
        start = step * self.batch + self.rank * self.local
        positions = np.arange(start, start + self.local, dtype=np.int64)
        arrays: dict[str, np.ndarray] = {}
        replaced = 0
        for row, (position, sample) in enumerate(zip(positions, self.samples.read(self.order(positions)), strict=True)):
            views = self._views(sample, int(position))
            replaced += views is None
            for name, value in (self._instead(int(position)) if views is None else views).items():
                if name not in arrays:
                    arrays[name] = np.empty((self.local, *np.shape(value)), np.asarray(value).dtype)
                arrays[name][row] = value
        return arrays, replaced

    def _views(self, sample: Sample, position: int) -> dict[str, np.ndarray] | None:
        """The sample's views, drawn for a position; None when its image cannot be decoded."""
        try:
            return self.views(sample, np.random.default_rng((self.seed, position)))
        except ImageError:
            return None

    def _instead(self, position: int) -> dict[str, np.ndarray]:
        for step in range(1, self.order.epoch_size + 1):
            (sample,) = self.samples.read(self.order(np.array([position + step])))
            if (views := self._views(sample, position)) is not None:
                return views
        raise WinnowError("no image of the pool can be decoded", where=self.samples.where)


def _outlive_signals(_: int) -> None:
    """What stops the training is sent to all processes, and the step at hand still needs its batch."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """One process's part of each global batch, decoded and augmented ahead of time by worker processes.

    An image that cannot be decoded is replaced by the next sample in the order that can.

    Args:
        samples: what to draw from.
        views: an objective's augmentation.
        seed: of the order and of the augmentation.
        batch: global batch size.
        rank, world: index of this process, and number of processes.
        first, last: steps, from and before.
        num_workers: worker processes; with 0 each batch is made in this process, when it is asked for.
        pin: whether the arrays are in pinned memory, which a GPU reads while the process goes on.

    Attributes:
        waited: seconds spent waiting for batches so far.
        replaced: images replaced so far.
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
        num_workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.waited, self.replaced = 0.0, 0
        # Forked, as torch does it: a worker touches no GPU, and shares the table of samples.
        self._loader: DataLoader = DataLoader(
            _Steps(samples, views, seed, batch, rank, world),
            batch_size=None,
            sampler=range(first, last),
            num_workers=min(num_workers, max(0, last - first)),
            prefetch_factor=_AHEAD if num_workers and last > first else None,
            worker_init_fn=_outlive_signals,
            multiprocessing_context="fork" if num_workers and last > first else None,
            pin_memory=pin,
            generator=torch.Generator(),  # it draws a seed, which is not used
        )
        self._batches: Iterator[Any] | None = None

    def __enter__(self) -> Batches:
        self._batches = iter(self._loader)
        return self

    def __exit__(self, *error: object) -> None:
        self._batches = None  # which ends the processes

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next step's arrays, [batch / world, …] each."""
        assert self._batches is not None
        started = time.perf_counter()
        made = next(self._batches)
        self.waited += time.perf_counter() - started
        if isinstance(made[0], str):
            what, where, do = made
            raise WinnowError(what, where=where, do=do)
        tensors, replaced = made
        self.replaced += replaced
        return {name: tensor.numpy() for name, tensor in tensors.items()}

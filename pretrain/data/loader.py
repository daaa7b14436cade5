"""Batches out of indexed pools, in an order that is a pure function of (seed, epoch, subset); see `order`.

Step t of a training with global batch B takes positions [t·B, (t+1)·B), and each process its own contiguous part. So
the order, and every random crop, are the same for any number of processes, and any step can be started from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.pool.pool import Pool
from winnow.infra.pool.uids import encode_uids, load_subset
from winnow.pretrain.config import SourceConfig
from winnow.pretrain.data.order import Order, epoch_order
from winnow.pretrain.objectives.base import Sample

__all__ = ["Batches", "Order", "Samples", "epoch_order"]

_COLUMNS = ("text", "label", "tar", "image_offset", "image_size")
_AHEAD = 2  # batches of each decoding process

Views = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


class Samples:
    """The samples of a pool, or of a subset of it, and of further sources, by number.

    A uid that a subset lists k times counts k times, as in DataComp's resharder. Holds what is needed to read the
    chosen samples (about 40 bytes and the caption of each), not the images.

    Args:
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy, or None for the whole pool.
        more: further sources.

    Raises:
        WinnowError: nothing is left to train on, or a subset names samples its pool has not.
    """

    def __init__(self, pool: str, subset: str | None = None, more: Sequence[SourceConfig] = ()) -> None:
        self.where = pool
        self.weights = [1.0, *(source.weight for source in more)]
        self.sizes: list[int] = []
        self.files: list[str] = []
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._texts: list[pa.Array] = []
        for url, selected in [(pool, subset), *((source.pool, source.subset) for source in more)]:
            self._add(url, selected)
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        self._file, self._offset, self._size, self._label, self._row = columns
        del self._parts
        self._text = pa.chunked_array(self._texts, pa.large_string()).combine_chunks()
        del self._texts

    def _add(self, url: str, subset: str | None) -> None:
        selected = None if subset is None else _counted(load_subset(subset))
        missing = None if selected is None else np.ones(len(selected[0]), bool)
        first, size = sum(len(part[0]) for part in self._parts), 0
        for shard in Pool.open(url).shards:
            times = None
            if selected is not None and missing is not None:
                at, times = _times(shard.uids(), *selected)
                missing[at[times > 0]] = False
                if not times.any():
                    continue
            table = shard.table(_COLUMNS)
            if times is not None:
                table = table.filter(pa.array(times > 0))
                times = times[times > 0]
            n, label = table.num_rows, table["label"]
            whole = pa.types.is_integer(label.type)
            part = (
                (len(self.files) + table["tar"].to_numpy()).astype(np.int32),
                table["image_offset"].to_numpy(),
                table["image_size"].to_numpy(),
                label.cast(pa.int64()).fill_null(-1).to_numpy() if whole else np.full(n, -1, np.int64),
                first + (np.arange(n) if times is None else np.repeat(np.arange(n), times)),
            )
            self._parts.append(part)
            self._texts += [chunk.cast(pa.large_string()) for chunk in table["text"].chunks]
            self.files += shard.tars
            first, size = first + n, size + len(part[-1])
        if selected is not None and missing is not None and (n := int(np.count_nonzero(missing))):
            batch = ", ".join(encode_uids(selected[0][missing][:3]))
            raise WinnowError(
                f"names {n} samples that the pool has not: {batch}{', …' * (n > 3)}",
                where=subset,
                do=f"The pool: {url}. Was the subset drawn from another one?",
            )
        if not size:
            raise WinnowError("holds no sample to train on", where=subset or url)
        self.sizes.append(size)

    def __len__(self) -> int:
        return len(self._row)

    def order(self, seed: int) -> Order:
        return Order(self.sizes, seed, self.weights)

    def read(self, numbers: np.ndarray) -> list[tuple[bytes, str]]:
        """Encoded image and caption of each sample, read by range, file by file."""
        rows = self._row[numbers]
        files, images = self._file[rows], [b""] * len(rows)
        for file in np.unique(files):
            at = np.nonzero(files == file)[0]
            ranges = self._offset[rows[at]], self._size[rows[at]]
            for i, data in zip(at, storage.read_ranges(self.files[file], *ranges), strict=True):
                images[i] = data
        texts = self._text.take(pa.array(rows)).to_pylist()
        return [(image, text or "") for image, text in zip(images, texts, strict=True)]

    def labels(self, numbers: np.ndarray) -> list[int | None]:
        """The class of each sample where the pool has a column `label` of whole numbers, else None."""
        return [None if label < 0 else int(label) for label in self._label[self._row[numbers]]]


def _counted(subset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sorted subset's distinct uids, and how often it has each."""
    if not len(subset):
        return subset, np.empty(0, np.int64)
    starts = np.nonzero(np.concatenate([[True], subset[1:] != subset[:-1]]))[0]
    return subset[starts], np.diff(np.append(starts, len(subset)))


def _times(uids: np.ndarray, distinct: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each uid would stand in the subset, and how often it is there; int64 [n] each."""
    if not len(distinct):
        return np.zeros(len(uids), np.int64), np.zeros(len(uids), np.int64)
    # By the first half, since NumPy compares pairs slowly; pairs only where two uids share it.
    at = np.minimum(np.searchsorted(np.ascontiguousarray(distinct["f0"]), uids["f0"]), len(distinct) - 1)
    alike = (distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] != uids["f1"])
    at[alike] = np.minimum(np.searchsorted(distinct, uids[alike]), len(distinct) - 1)
    return at, np.where((distinct["f0"][at] == uids["f0"]) & (distinct["f1"][at] == uids["f1"]), counts[at], 0)


class _Steps(Dataset):
    """By step, this process's part of the global batch, [n, …] each, and how many of its images were replaced."""

    def __init__(self, samples: Samples, views: Views, seed: int, batch: int, rank: int, world: int) -> None:
        self.samples, self.views, self.seed = samples, views, seed
        self.batch, self.fraction, self.rank = batch, batch // world, rank
        self.order = samples.order(seed)

    def __getitem__(self, step: int) -> tuple[dict[str, np.ndarray], int] | tuple[str, str | None, str | None]:
        """The arrays and the number; or what an error says, which DataLoader would wrap in a traceback."""
        try:
            return self._make(step)
        except WinnowError as error:
            return error.what, error.where, error.do

    def _make(self, step: int) -> tuple[dict[str, np.ndarray], int]:
        start = step * self.batch + self.rank * self.fraction
        positions = np.arange(start, start + self.fraction, dtype=np.int64)
        numbers = self.order(positions)
        arrays: dict[str, np.ndarray] = {}
        replaced = 0
        read = zip(positions, self.samples.read(numbers), self.samples.labels(numbers), strict=True)
        for row, (position, (data, text), label) in enumerate(read):
            try:
                image = decode_image(data)
            except ImageError:
                image, text, label = self._instead(int(position))
                replaced += 1
            views = self.views(Sample(image, text, label), np.random.default_rng((self.seed, int(position))))
            for name, value in views.items():
                if name not in arrays:
                    value = np.asarray(value)
                    arrays[name] = np.empty((self.fraction, *value.shape), value.dtype)
                arrays[name][row] = value
        return arrays, replaced

    def _instead(self, position: int) -> tuple:
        for step in range(1, self.order.epoch_size + 1):
            number = self.order(np.array([position + step]))
            ((data, text),) = self.samples.read(number)
            try:
                return decode_image(data), text, self.samples.labels(number)[0]
            except ImageError:
                continue
        raise WinnowError("no image of the pool can be decoded", where=self.samples.where)


class Batches:
    """One process's part of each global batch, decoded and augmented ahead of time by processes of its own.

    An image that cannot be decoded is replaced by the next sample in the order that can.

    Args:
        samples: what to draw from.
        views: an objective's augmentation.
        seed: of the order and of the augmentation.
        batch: global batch size.
        rank, world: this process's place among how many.
        first, last: steps, from and before.
        decoders: processes; with 0 each batch is made here, when it is asked for.
        pin: whether the arrays lie in memory that a GPU reads while the process goes on.

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
        decoders: int = 0,
        pin: bool = False,
    ) -> None:
        self.waited, self.replaced = 0.0, 0
        # Forked, as torch does it: a decoder touches no GPU, and shares the table of samples.
        self._loader: DataLoader = DataLoader(
            _Steps(samples, views, seed, batch, rank, world),
            batch_size=None,
            sampler=range(first, last),
            num_workers=min(decoders, max(0, last - first)),
            prefetch_factor=_AHEAD if decoders and last > first else None,
            multiprocessing_context="fork" if decoders and last > first else None,
            pin_memory=pin,
            generator=torch.Generator(),  # it draws a seed, which is not used
        )
        self._batches: Iterator[Any] | None = None

    def __enter__(self) -> Batches:
        self._batches = iter(self._loader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

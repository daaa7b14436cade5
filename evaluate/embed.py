"""Pictures to features: each decoded once for all encoders and embedded once by each, while the next are decoded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluate.data import Sample
from infra.pictures import PictureError, decode_picture

if TYPE_CHECKING:
    from pretrain.encoder import Encoder

BATCHES_AHEAD = 2


@dataclass
class Embedded:
    """The features of a test set.

    Attributes:
        images: for each encoder float32 [n, dim].
        labels: int64 [n], -1 where there is none.
        captions: of each picture.
        set_aside: (key, reason) of the pictures that could not be decoded; they are no part of the n.
    """

    images: list[np.ndarray]
    labels: np.ndarray
    captions: list[tuple[str, ...]]
    set_aside: list[tuple[str, str]] = field(default_factory=list)


def decode_threads() -> int:
    """Threads to decode with: as many as cores this process may use, from 2 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(16, cores))


def embed(
    samples: Iterable[Sample],
    encoders: Sequence[Encoder],
    batch_size: int = 256,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed a test set with every encoder.

    Args:
        samples: read in order, a few batches ahead of the encoders.
        encoders: those with equal `preprocess_key` share the prepared pictures.
        batch_size: pictures an encoder sees at once.
        on_batch: called with the number of pictures done so far.
    """
    import torch

    prepare = {encoder.preprocess_key: encoder.preprocess for encoder in encoders}

    def decode(sample: Sample) -> dict[str, Any] | str:
        try:
            image = decode_picture(sample.image)
        except PictureError as error:
            return error.what
        return {key: function(image) for key, function in prepare.items()}

    parts: list[list[np.ndarray]] = [[] for _ in encoders]
    labels: list[int] = []
    captions: list[tuple[str, ...]] = []
    aside: list[tuple[str, str]] = []
    done = 0
    with ThreadPoolExecutor(decode_threads()) as pool:
        for batch in _ahead(pool, decode, samples, batch_size):
            ready = []
            for sample, result in batch:
                if isinstance(result, str):
                    aside.append((sample.key, result))
                    continue
                ready.append(result)
                labels.append(sample.label)
                captions.append(sample.captions)
            if ready:
                tensors = {key: torch.stack([result[key] for result in ready]) for key in prepare}
                for part, encoder in zip(parts, encoders, strict=True):
                    part.append(encoder.encode_images(tensors[encoder.preprocess_key]))
            done += len(batch)
            if on_batch is not None:
                on_batch(done)
    images = [
        np.concatenate(part) if part else np.empty((0, encoder.dim), np.float32)
        for part, encoder in zip(parts, encoders, strict=True)
    ]
    return Embedded(images, np.array(labels, dtype=np.int64), captions, aside)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Sample], Any], samples: Iterable[Sample], batch_size: int
) -> Iterator[list[tuple[Sample, Any]]]:
    """Batches of (sample, function of it) in order, with the next `BATCHES_AHEAD` in the making."""
    stream = iter(samples)
    waiting: deque[list[tuple[Sample, Future]]] = deque()
    try:
        while True:
            while len(waiting) <= BATCHES_AHEAD:
                batch = [(sample, pool.submit(function, sample)) for sample in islice(stream, batch_size)]
                if not batch:
                    break
                waiting.append(batch)
            if not waiting:
                return
            yield [(sample, future.result()) for sample, future in waiting.popleft()]
    finally:
        for batch in waiting:
            for _, future in batch:
                future.cancel()

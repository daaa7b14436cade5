"""Images to features: each decoded once for all encoders and embedded once by each, while the next are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.io.prefetch import cores

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

BATCHES_AHEAD = 2


@dataclass
class Embedded:
    """The features of some images.

    Attributes:
        images: for each encoder float32 [n, dim], of the images that could be decoded.
        aside: reason for each place of an image that could not.
    """

    images: list[np.ndarray]
    skipped: dict[int, str] = field(default_factory=dict)


def decode_threads(device: str = "auto") -> int:
    """Threads to decode with beside the one that embeds, 0 to 16.

    Where a GPU embeds, this process's share of the cores. Where the CPU does, as many as torch computes with, which is
    what the process was granted (Ray sets it); with one the thread that embeds decodes as well.
    """
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return max(2, min(16, cores() // max(1, torch.cuda.device_count())))
    threads = torch.get_num_threads()
    return min(16, threads) if threads > 1 else 0


def embed(
    encoded: Iterable[bytes],
    encoders: Sequence[Encoder],
    batch_size: int = 256,
    threads: int = 2,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed images with every encoder.

    Args:
        images: encoded; read in order, a few batches ahead of the encoders.
        encoders: those with equal `preprocess_key` share the prepared images.
        batch_size: images an encoder sees at once.
        threads: that decode; 0 to decode in this one.
        on_batch: called with the number of images done so far.
    """
    import torch

    prepare = {encoder.preprocess_key: encoder for encoder in encoders}

    def decode(data: bytes) -> dict[str, Any] | str:
        try:
            # What lies under transparency is seen, as by webdataset's decoder and open_clip's transform.
            image = decode_image(data, flatten=False)
        except ImageError as error:
            return error.what
        return {key: encoder.crop(image) for key, encoder in prepare.items()}

    parts: list[list[np.ndarray]] = [[] for _ in encoders]
    skipped: dict[int, str] = {}
    done = 0
    for batch in _ahead(decode, encoded, batch_size, threads):
        ready = [result for result in batch if not isinstance(result, str)]
        skipped |= {done + i: result for i, result in enumerate(batch) if isinstance(result, str)}
        if ready:
            tensors = {
                key: encoder.normalise(torch.stack([result[key] for result in ready]))
                for key, encoder in prepare.items()
            }
            for part, encoder in zip(parts, encoders, strict=True):
                part.append(encoder.encode_images(tensors[encoder.preprocess_key]))
        done += len(batch)
        if on_batch is not None:
            on_batch(done)
    images = [
        np.concatenate(part) if part else np.empty((0, encoder.dim), np.float32)
        for part, encoder in zip(parts, encoders, strict=True)
    ]
    return Embedded(images, skipped)


def _ahead(
    function: Callable[[bytes], Any], encoded: Iterable[bytes], batch_size: int, threads: int
) -> Iterator[list[Any]]:
    """The function's results in order, in batches; with threads the next `BATCHES_AHEAD` are in the making."""
    stream = iter(encoded)
    if not threads:
        while batch := [function(data) for data in islice(stream, batch_size)]:
            yield batch
        return
    waiting: deque[list[Future]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(waiting) <= BATCHES_AHEAD:
                    futures = [pool.submit(function, data) for data in islice(stream, batch_size)]
                    if not futures:
                        break
                    waiting.append(futures)
                if not waiting:
                    return
                yield [future.result() for future in waiting.popleft()]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()

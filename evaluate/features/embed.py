"""Images to features: each is decoded once for all encoders and embedded once by each, while the next are decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.io.prefetch import cores, prefetch

if TYPE_CHECKING:
    from winnow.pretrain.encoder import Encoder

BATCHES_AHEAD = 2


@dataclass
class Embedded:
    """The features of some images."""

    images: list[np.ndarray]  # for each encoder float32 [n, dim], of the images that could be decoded
    skipped: dict[int, str] = field(default_factory=dict)  # by index of an image that could not be, the reason


def decode_threads(device: str = "auto") -> int:
    """Number of decoding threads, 0 to 16, besides the thread that embeds.

    On a GPU: the cores divided by the number of GPUs. On the CPU: as many as torch computes with, which is what the
    process was granted (Ray sets it); 0 where that is one, so that the thread that embeds decodes as well.
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
    flatten: bool = False,
) -> Embedded:
    """Embed images with every encoder.

    Args:
        encoded: the images' bytes; read in order, a few batches ahead of the encoders.
        encoders: those with equal `preprocess_key` share the preprocessed images.
        threads: that decode; 0 to decode in the calling thread.
        on_batch: called with the number of images done so far.
        flatten: whether transparent parts become white; otherwise the alpha channel is dropped, as by webdataset's
            decoder and open_clip's transform.
    """
    import torch

    prepare = {encoder.preprocess_key: encoder for encoder in encoders}

    def decode(data: bytes) -> dict[str, Any] | str:
        try:
            image = decode_image(data, flatten)
        except ImageError as error:
            return error.what
        return {key: encoder.crop(image) for key, encoder in prepare.items()}

    parts = [[np.empty((0, encoder.dim), np.float32)] for encoder in encoders]
    skipped: dict[int, str] = {}
    done = 0
    decoded = prefetch(decode, encoded, threads, (BATCHES_AHEAD + 1) * batch_size)
    while batch := list(islice(decoded, batch_size)):
        ready = [result for result in batch if not isinstance(result, str)]
        skipped |= {done + i: result for i, result in enumerate(batch) if isinstance(result, str)}
        if ready:
            stacked = {key: torch.stack([result[key] for result in ready]) for key in prepare}
            tensors = {key: encoder.normalise(stacked[key]) for key, encoder in prepare.items()}
            for part, encoder in zip(parts, encoders, strict=True):
                part.append(encoder.encode_images(tensors[encoder.preprocess_key]))
        done += len(batch)
        if on_batch is not None:
            on_batch(done)
    return Embedded([np.concatenate(part) for part in parts], skipped)

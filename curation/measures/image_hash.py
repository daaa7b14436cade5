"""A perceptual hash of the image (pHash)."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.params import params

_SIDE, _LOW = 32, 8


@params
class ImageHash(Measure):
    """`image_hash.phash`: 64-bit pHash, uint64; the hashes of similar images differ in few bits.

    The DCT hash of Zauner 2010 ("Implementation and Benchmarking of Perceptual Image Hash Functions") as the Python
    package ImageHash computes it: luma (ITU-R 601), resized to 32 x 32 by Lanczos, DCT-II along both axes, of which the
    8 x 8 lowest frequencies including the constant are used; a bit is 1 where the coefficient is above their median.
    Bits are in row order, the first is the highest, so the number in hexadecimal is ImageHash's string.
    """

    name: ClassVar[str] = "image_hash"
    version: ClassVar[int] = 1
    pixels: ClassVar[bool] = True
    summary: ClassVar[str] = "64-bit perceptual hash (pHash) of the image"

    def schema(self) -> pa.Schema:
        return pa.schema([("phash", pa.uint64())])

    def compute(self, samples: Samples) -> pa.Table:
        seen = np.array([image is not None for image in samples.images], dtype=bool)
        luma = [_luma(image) for image in samples.images if image is not None]
        values = np.zeros(len(samples), np.uint64)
        if luma:
            values[seen] = phash(np.stack(luma))
        return pa.table([pa.array(values, pa.uint64(), mask=~seen)], schema=self.schema())


def _luma(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)


def phash(luma: np.ndarray) -> np.ndarray:
    """pHash of images of 32 x 32 luma, shape [n, 32, 32]; uint64, shape [n]."""
    basis = _cosines()
    low = (basis @ luma @ basis.T).reshape(len(luma), _LOW * _LOW)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(-1)


@functools.cache
def _cosines() -> np.ndarray:
    """Rows of the DCT-II, without the scale, which does not change the comparison with the median."""
    k, n = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * _SIDE))

"""Sharpness and entropy of an image."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from winnow.curation.measures.base import Measure, Samples
from winnow.infra.params import params


@params
class Quality(Measure):
    """`quality.sharpness`: variance of the luma's Laplacian; `quality.entropy`: of its histogram, in bits. float32.

    Luma is ITU-R 601, 0 to 255, at the size of the image, on which sharpness depends. The Laplacian is the kernel
    [[0, 1, 0], [1, -4, 1], [0, 1, 0]] over all pixels with four neighbours (Pech-Pacheco et al. 2000; OpenCV also
    includes the border, mirrored). The sharpness of an image narrower than 3 pixels is null. The entropy is
    -sum p log2 p over 256 bins of one grey level each, 0 to 8.
    """

    name: ClassVar[str] = "quality"
    version: ClassVar[int] = 1
    pixels: ClassVar[bool] = True
    summary: ClassVar[str] = "sharpness (variance of the Laplacian) and entropy (of the luma histogram)"

    def schema(self) -> pa.Schema:
        return pa.schema([("sharpness", pa.float32()), ("entropy", pa.float32())])

    def compute(self, samples: Samples) -> pa.Table:
        values = [(None, None) if image is None else quality(image) for image in samples.images]
        columns = [pa.array(column, pa.float32()) for column in zip(*values, strict=True)]
        return pa.table(columns or [[], []], schema=self.schema())


def quality(image: Image.Image) -> tuple[float | None, float]:
    """(sharpness, entropy) of an image."""
    grey = image.convert("L")
    counts = np.asarray(grey.histogram(), dtype=np.float64)
    p = counts[counts > 0] / counts.sum()
    luma = np.asarray(grey, dtype=np.int16)
    if min(luma.shape) < 3:
        return None, float(-(p * np.log2(p)).sum())
    inner = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]
    return float(inner.astype(np.float64).var()), float(-(p * np.log2(p)).sum())

"""The Fréchet distance between images drawn and real ones, over the features of any encoder.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", equation 6.
Their FID takes an Inception network's features; here the encoder is stated beside each figure, and figures over
different encoders, or over different numbers of images, do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image

from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.pool.members import read_members
from winnow.infra.pool.pool import Pool
from winnow.pretrain.encoder import load_encoder

_BATCH = 256


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), squared as FID is; μ [d], Σ [d, d].

    The trace of the root is that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric, so that no complex numbers arise.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov1, np.float64))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ np.asarray(cov2, np.float64) @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d], float64, of features [n, d]."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def features_of(images: Iterable[Image.Image], encoder: str, device: str = "auto") -> np.ndarray:
    """L2-normalised features of RGB images, float32 [n, d]; `encoder` as `load_encoder` takes it."""
    loaded = load_encoder(encoder, device)
    parts = []
    for batch in _batches(images):
        crops = torch.stack([loaded.crop(image) for image in batch])
        parts.append(loaded.encode_images(loaded.normalise(crops)))
    return np.concatenate(parts)


def samples_and_pool(samples: np.ndarray, pool: str, encoder: str, device: str = "auto") -> tuple[float, int]:
    """The distance of images, uint8 [n, 3, H, W], from a pool's (all that can be decoded), and how many those are."""
    drawn = features_of((Image.fromarray(image.transpose(1, 2, 0)) for image in samples), encoder, device)
    real = features_of(_images(pool), encoder, device)
    return frechet_distance(*moments(drawn), *moments(real)), len(real)


def _images(pool: str) -> Iterator[Image.Image]:
    opened = Pool.open(pool)
    for shard, table in opened.tables(("tar", "image_offset", "image_size")):
        for i in range(0, table.num_rows, _BATCH):
            for data in read_members(shard.tars, table.slice(i, _BATCH), "image"):
                try:
                    yield decode_image(data)
                except ImageError:
                    continue


def _batches(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

"""The Fréchet distance between images drawn from a checkpoint and real ones, over the features of any encoder.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", equation 6.
Their FID takes an Inception network's features. Distances over different encoders, or over different numbers of
images, do not compare; smaller is better. The registered protocol takes 8×8 pixels, which needs no published weights.
For another encoder make another protocol: `FID = frechet("ViT-B-32:openai", "fid_clip")`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from PIL import Image

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import EvalSet, Features, Kind, Protocol, Row, Target
from winnow.evaluate.tasks.task import NotApplicable
from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io.images import ImageError, decode_image
from winnow.infra.pool.pool import Pool, read_members
from winnow.infra.pool.sample import Sample

METRIC = "frechet_distance"
ENCODER = "pixels:8"
SAMPLES = 1000
STEPS = 50
RESAMPLES = 16
BATCH = 256


class Images(Kind):
    """Images without labels or captions."""

    metric = METRIC

    def read(self, sample: Sample) -> Target:
        return Target()


def frechet(encoder: str, name: str, samples: int = SAMPLES, steps: int = STEPS) -> Protocol:
    """The Fréchet distance over an encoder's features as a protocol for checkpoints that draw images.

    As many images are drawn as the set has, but at most `samples`, in `steps` steps of the sampler.
    """
    return Protocol(
        name,
        kinds=frozenset({"images", "zeroshot_classification", "multilabel", "retrieval"}),
        run=functools.partial(distance_to_set, encoder=encoder, samples=samples, steps=steps),
        needs=frozenset({"pixels", "sampler"}),
        metric=METRIC,
    )


def distance_to_set(features: Features, test_set: EvalSet, *, encoder: str, samples: int, steps: int) -> list[Row]:
    """The distance between images drawn from the evaluated checkpoint and those of a test set."""
    from winnow.pretrain.encoder import load_sampler

    assert features.encoder is not None
    split, n = features.splits["test"], len(features.images)
    try:
        draw = load_sampler(features.encoder().spec)
        drawn = draw(min(samples, n), steps=steps, seed=features.seed, device=features.device)
    except UsageError:
        raise NotApplicable("the checkpoint draws no images") from None
    blocks = (split.samples(range(low, min(low + BATCH, n))) for low in range(0, n, BATCH))
    real = embedded((sample.image() for block in blocks for sample in block), encoder, features.device)
    fake = embedded(_images(drawn), encoder, features.device)
    return [Row(METRIC, metrics.frechet(fake, real), n, _stderr(fake, real, features.seed))]


def distance_to_pool(drawn: np.ndarray, pool: str, encoder: str, device: str = "auto") -> tuple[float, int]:
    """The distance between images, uint8 [n, 3, H, W], and those of a pool that can be decoded, and their number."""
    fake, real = embedded(_images(drawn), encoder, device), embedded(_pool_images(pool), encoder, device)
    return metrics.frechet(fake, real), len(real)


def embedded(images: Iterable[Image.Image], encoder: str, device: str = "auto") -> np.ndarray:
    """L2-normalised features of RGB images, float32 [n, d]."""
    import torch

    from winnow.pretrain.encoder import load_encoder, not_finite

    loaded = load_encoder(encoder, device)
    parts, stream = [], iter(images)
    while batch := [loaded.crop(image) for image in islice(stream, BATCH)]:
        parts.append(loaded.encode_images(loaded.normalise(torch.stack(batch))))
    features = np.concatenate(parts)
    if fault := not_finite(images=features):
        raise WinnowError(fault, where=encoder)
    return features


def _images(drawn: np.ndarray) -> Iterator[Image.Image]:
    return (Image.fromarray(image.transpose(1, 2, 0)) for image in drawn)


def _pool_images(pool: str) -> Iterator[Image.Image]:
    for shard, table in Pool.open(pool).tables(("tar", "image_offset", "image_size")):
        for low in range(0, table.num_rows, BATCH):
            for data in read_members(shard.tars, table.slice(low, BATCH), "image"):
                with contextlib.suppress(ImageError):
                    yield decode_image(data)


def _stderr(fake: np.ndarray, real: np.ndarray, seed: int) -> float:
    """Bootstrap standard error, drawing from both sets of images."""
    rng = np.random.default_rng(seed)
    values = [
        metrics.frechet(fake[rng.integers(len(fake), size=len(fake))], real[rng.integers(len(real), size=len(real))])
        for _ in range(RESAMPLES)
    ]
    return float(np.std(values, ddof=1))


FRECHET = frechet(ENCODER, "frechet")

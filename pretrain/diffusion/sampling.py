"""Draws images from a diffusion checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps

from winnow.infra.errors import UsageError
from winnow.infra.registry import unknown
from winnow.pretrain.checkpoint.load import load_checkpoint

if TYPE_CHECKING:
    from winnow.pretrain.diffusion.model import Diffusion

_BATCH = 64


def sample(
    checkpoint: str,
    n: int,
    *,
    steps: int = 50,
    guidance: float = 0.0,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    sampler: Literal["ddim", "ancestral"] = "ddim",
    eta: float = 0.0,
    device: str = "auto",
) -> np.ndarray:
    """Draw images from a diffusion checkpoint; the i-th depends on (seed, i) and its condition alone.

    Args:
        checkpoint: URL of its folder.
        n: how many.
        steps: timesteps that the sampler visits.
        guidance: w of Ho & Salimans 2022; 0 is the condition without guidance.
        classes: names, for a class-conditional model; taken in turn, all of them if none are given.
        captions: for a caption-conditional model; taken in turn, the empty one if none are given.
        sampler, eta: DDIM with eta (Song et al. 2021), or ancestral sampling (Ho et al. 2020).
        device: auto (CUDA where there is), cpu, cuda.

    Returns:
        uint8 [n, 3, H, W].

    Raises:
        UsageError: the checkpoint is of another objective, or has no such class or no such condition.
        WinnowError: its weights cannot be loaded.
    """
    import torch

    from winnow.pretrain.diffusion.model import SAMPLERS, Diffusion

    model = load_checkpoint(checkpoint)
    if not isinstance(model, Diffusion):
        raise UsageError("is not a checkpoint of a diffusion training", where=checkpoint)
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    timesteps = len(model.alpha_bar)
    if seed < 0:
        raise UsageError(f"seed {seed} is negative")
    if n < 1 or not 1 <= steps <= timesteps:
        raise UsageError(f"n must be at least 1, and steps from 1 to the model's {timesteps}", where=checkpoint)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.eval().to(device)
    labels = _labels(model, n, classes, captions)
    seeds = image_seeds(seed, n)
    parts = []
    for i in range(0, n, _BATCH):
        selected = None if labels is None else labels[i : i + _BATCH]
        images = model.sample(seeds[i : i + _BATCH], selected, steps=steps, guidance=guidance, sampler=sampler, eta=eta)
        parts.append(images.numpy())
    return np.concatenate(parts)


def _labels(model: Diffusion, n: int, classes: Sequence[str] | None, captions: Sequence[str] | None) -> Any:
    """Labels or tokens of n images on the model's device; None for a model without a condition."""
    if classes and model.classes is None:
        raise UsageError("the model is not class-conditional, so it has no classes to choose from")
    if captions and model.text is None:
        raise UsageError("the model is not caption-conditional")
    if captions:
        tokens = model.tokenizer([captions[i % len(captions)] for i in range(n)])
        return tokens.to(model.signal.device)
    if classes:
        import torch

        assert model.classes is not None
        for name in classes:
            if name not in model.classes:
                raise unknown("class", name, model.classes)
        selected = [model.classes.index(classes[i % len(classes)]) for i in range(n)]
        return torch.tensor(selected, device=model.signal.device)
    return default_labels(model, n)


def default_labels(model: Diffusion, n: int) -> Any:
    """All classes in turn, the recipe's captions in turn, or None."""
    if model.classes is not None:
        return _labels(model, n, model.classes, None)
    captions = model.config["diffusion"]["captions"]
    return _labels(model, n, None, captions) if captions else model.nothing(n)


def image_seeds(seed: int, n: int) -> list[tuple[int, int]]:
    """Seeds of the noise of n images."""
    return [(seed, i) for i in range(n)]


def square(image: Image.Image, size: int) -> np.ndarray:
    """The central square, resized; uint8 [3, size, size]."""
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images, uint8 [n, 3, H, W], row by row in one nearly square image, uint8 [H', W', 3], with white gaps."""
    n, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 2
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        out[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return out

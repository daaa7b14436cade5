"""open_clip's preprocessing of images for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from winnow.infra.errors import UsageError
from winnow.infra.registry import unknown

_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def check_preprocess(config: Any, where: str | None = None) -> dict[str, Any]:
    """An open_clip preprocess_cfg, {} for None. Raises UsageError for a key that open_clip would silently ignore."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError("preprocess_cfg should be an object", where=where)
    for key, value in config.items():
        if key not in _KEYS:
            raise unknown("key of preprocess_cfg", key, _KEYS, where)
        if key in ("mean", "std") and not (isinstance(value, list | tuple) and len(value) == 3):
            raise UsageError(f"preprocess_cfg: {key} should be three numbers, one per channel", where=where)
    return config


def preprocess_config(model: torch.nn.Module) -> dict[str, Any]:
    """open_clip's preprocess_cfg of a model: size, mean, std, interpolation, resize_mode, fill_color, mode."""
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def image_size(model: torch.nn.Module) -> int:
    """Side of the square images a model takes. Raises UsageError when they are not square."""
    size = preprocess_config(model)["size"]
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UsageError(f"images must be square, the model takes {size}", where="model")
    return int(size[0])


def val_transform(preprocess: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's own preprocessing for evaluation: RGB image to float32 [3, H, W]."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Image.Image], torch.Tensor] = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return transform


def val_steps(
    preprocess: dict[str, Any],
) -> tuple[Callable[[Image.Image], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """`val_transform` in two steps that give the same bits: what is done with each image, and with a batch at once.

    The first gives uint8 [3, H, W], the second makes of uint8 [n, 3, H, W] float32 on the same device. One by one, that
    takes as long as decoding a thumbnail.
    """
    from torchvision.transforms import Compose, Normalize, ToTensor

    whole: Any = val_transform(preprocess)
    *first, to_tensor, normalize = whole.transforms
    if not isinstance(to_tensor, ToTensor) or not isinstance(normalize, Normalize):
        return whole, lambda batch: batch
    resized = Compose(first)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (normalize.mean, normalize.std))

    def crop(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(resized(image))).permute(2, 0, 1)

    def normalise(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().div_(255).sub_(mean.to(batch.device)).div_(std.to(batch.device))

    return crop, normalise

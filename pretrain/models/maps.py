"""Feature maps of networks that have them."""

from __future__ import annotations

from typing import Any

import torch

from winnow.infra.errors import UsageError


def feature_maps(model: Any, images: torch.Tensor, where: str) -> torch.Tensor:
    """Features before they are pooled, [n, c, h, w].

    A network may have the method `feature_maps` itself. Of timm's networks these are those of `forward_features`, of
    open_clip's ViTs `forward_intermediates` of the last block.

    Args:
        model: with `encode_image`.
        images: preprocessed, [n, 3, H, W].
        where: names the model in messages.

    Raises:
        UsageError: the network has no feature maps.
    """
    if hasattr(model, "feature_maps"):
        maps: torch.Tensor = model.feature_maps(images)
        return maps
    tower = next((getattr(model, name) for name in ("visual", "trunk") if hasattr(model, name)), None)
    for _ in range(2):  # open_clip wraps timm's networks as `visual.trunk`
        if hasattr(tower, "forward_intermediates"):
            return _intermediates(tower, images)
        tower = getattr(tower, "trunk", None)
    raise UsageError("its network has no feature maps", where=where)


def _intermediates(tower: Any, images: torch.Tensor) -> torch.Tensor:
    found = tower.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
    if isinstance(found, dict):  # open_clip's
        found = found["image_intermediates"]
    last: torch.Tensor = found[-1]
    return last

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
    maps: torch.Tensor
    if hasattr(model, "feature_maps"):
        maps = model.feature_maps(images)
        return maps
    tower: Any = next((getattr(model, name) for name in ("visual", "trunk") if hasattr(model, name)), None)
    for _ in range(2):  # open_clip wraps timm's networks as `visual.trunk`
        if hasattr(tower, "forward_intermediates"):
            found = tower.forward_intermediates(images, indices=1, output_fmt="NCHW", intermediates_only=True)
            maps = (found["image_intermediates"] if isinstance(found, dict) else found)[-1]  # a dict of open_clip's
            return maps
        tower = getattr(tower, "trunk", None)
    raise UsageError("its network has no feature maps", where=where)

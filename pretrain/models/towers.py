"""Encoders of images alone: timm's networks and open_clip's image towers."""

from __future__ import annotations

from typing import Any

import torch

from winnow.infra.errors import UsageError
from winnow.pretrain.models.open_clip import build_model
from winnow.pretrain.models.preprocessing import preprocess_config
from winnow.pretrain.models.timm import build_trunk


class ImageTower(torch.nn.Module):
    """An encoder of images alone.

    Args:
        trunk: float [n, 3, H, W] to features [n, dim].
        preprocess: open_clip's preprocess_cfg.

    Attributes:
        dim: of the features.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, trunk: torch.nn.Module, dim: int, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.trunk, self.dim, self.preprocess_cfg = trunk, dim, preprocess
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, W] to features, [n, dim]."""
        return self.encode_image((pixels.float() / 255 - self.mean) / self.std)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images, float [n, 3, H, W], to features, [n, dim]."""
        # Convolutions are up to half as fast again with channels last; the output inherits it.
        features: torch.Tensor = self.trunk(images.contiguous(memory_format=torch.channels_last))
        return features


def build_image_tower(model: dict[str, Any], preprocess: dict[str, Any] | None = None) -> ImageTower:
    """A randomly initialised image encoder (float32, CPU), drawn from torch's global generator.

    Of timm the pooled features before the classifier, with timm's mean, standard deviation and interpolation; of
    open_clip the image tower up to and with its projection.

    Args:
        model: as `ModelConfig.resolved` returns it.
        preprocess: open_clip's preprocess_cfg; the network's own where None.

    Raises:
        UsageError: the library refuses the config.
    """
    if "timm" in model:
        trunk, settings = build_trunk(model)
        return ImageTower(trunk, trunk.head_hidden_size, preprocess or settings)
    if "multimodal_cfg" in model:
        raise UsageError("the image tower of a model with a text decoder (CoCa) cannot be used alone", where="model")
    whole = build_model(model, preprocess)
    return ImageTower(whole.visual, model["embed_dim"], preprocess_config(whole))  # type: ignore[arg-type]


class Pixels(torch.nn.Module):
    """No network: the features are the pixels of images of side `size`, a baseline."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.preprocess_cfg = {"size": (size, size), "mean": (0.0,) * 3, "std": (1.0,) * 3}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] to [n, 3·H·W]."""
        return images.flatten(1)


class ImageEncoder(torch.nn.Module):
    """A model's `encode_image` as its `forward`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.encode_image(images)
        return features

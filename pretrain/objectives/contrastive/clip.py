"""CLIP: contrastive language–image pretraining.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3 and sections
2.3 to 2.5. The networks are open_clip's. As there, and unlike the paper, the logit scale is kept above 1 as well.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from winnow.infra.errors import UsageError
from winnow.infra.params import params
from winnow.pretrain.data.augment import random_resized_crop
from winnow.pretrain.distributed import gather, local_rows
from winnow.pretrain.models.open_clip import build_model
from winnow.pretrain.models.preprocessing import image_size, preprocess_config
from winnow.pretrain.models.tokenizer import build_tokenizer, caching_tokens
from winnow.pretrain.objectives.base import Losses, Objective, Sample

CROPS = (0.9, 1.0)  # fraction of the area, from and to; open_clip's


@params
class Config:
    """Args: logit_scale_max: the largest scale of the logits (section 2.5)."""

    logit_scale_max: Annotated[float, Field(gt=1)] = 100.0


class CLIP(Objective):
    """Symmetric cross-entropy over the similarities of all images and captions of the global batch."""

    couples_batch = True
    cacheable = True
    needs_text = True
    adjusts: ClassVar[tuple[str, ...]] = ("net.logit_scale",)
    net: Any
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        if "multimodal_cfg" in model:
            raise UsageError("clip trains two towers, this model has a text decoder too (CoCa)", where="model")
        self.log_max, self.augment = math.log(config.logit_scale_max), augment or CROPS
        # DeepSpeed cannot broadcast a scalar, so in training the logit scale has the other shape open_clip knows, [1].
        self.net = build_model(model | {"nonscalar_logit_scale": True})
        self.scalar_scale = not model.get("nonscalar_logit_scale", False)
        self.size = image_size(self.net)
        self.tokens = caching_tokens(build_tokenizer(model))
        preprocess = preprocess_config(self.net)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(1, 3, 1, 1), persistent=False)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """image: uint8 [3, H, W]; text: int32 [context]."""
        image = random_resized_crop(sample.image(), self.size, self.augment, rng)
        return {"image": image, "text": self.tokens(sample.text)}

    def features(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """L2-normalised image and text features, float32 [n, d] each, and the logit scale, [1]."""
        image = (batch["image"].float() / 255 - self.mean) / self.std
        # open_clip normalises the features, and takes the scale out of its logarithm.
        image_features, text_features, scale = self.net(image, batch["text"])[:3]
        return image_features.float(), text_features.float(), scale.float()

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        return self._loss(*self.features(batch))

    def initialise(self, weights: dict[str, torch.Tensor]) -> None:
        """A scale of shape [] becomes [1], see `__init__`."""
        own = self.net.state_dict()
        super().initialise({name: value.reshape(own[name].shape) for name, value in weights.items()})

    def embed(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """L2-normalised image and text features, float32 [n, d] each."""
        return self.features(batch)[:2]

    def loss(self, rows: tuple[torch.Tensor, ...]) -> Losses:
        image, text = rows
        return self._loss(image, text, self.net.logit_scale.exp().float())

    def _loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> Losses:
        with torch.autocast(image.device.type, enabled=False):
            loss, accuracy = clip_loss(image, text, scale)
        return Losses(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def after_step(self, step: int) -> None:
        self.net.logit_scale.clamp_(0, self.log_max)

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"logit_scale": self.net.logit_scale.exp()}

    def encoder(self) -> nn.Module:
        return self.net

    def weights(self) -> dict[str, torch.Tensor]:
        weights = super().weights()
        if self.scalar_scale:
            weights["logit_scale"] = weights["logit_scale"].reshape(())
        return weights

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        return build_model(model, preprocess)


def clip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of the loss against the columns of all, and the fraction of images nearest to their caption.

    Each process computes n of the n·world rows; averaged over the processes, value and gradients are those of one
    process with the whole batch.

    Args:
        image, text: L2-normalised features, [n, d].
        scale: scalar that multiplies the cosines.
    """
    everyone = gather(torch.stack([image, text], dim=1))
    local = local_rows(image)
    per_image = scale * image @ everyone[:, 1].T
    per_text = scale * text @ everyone[:, 0].T
    loss = (F.cross_entropy(per_image, local) + F.cross_entropy(per_text, local)) / 2
    return loss, (per_image.detach().argmax(dim=1) == local).float().mean()

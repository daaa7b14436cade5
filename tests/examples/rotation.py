"""Rotation prediction: Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations"."""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from winnow.infra.params import params
from winnow.pretrain.data.augment import random_resized_crop
from winnow.pretrain.models.preprocessing import image_size
from winnow.pretrain.models.towers import build_image_tower
from winnow.pretrain.objectives.base import Losses, Objective


@params
class Config:
    """Args: rotations: number of rotations, of 0, 90, 180 and 270 degrees."""

    rotations: Annotated[int, Field(ge=2, le=4)] = 4


class Rotation(Objective):
    """By how much has each copy of an image been rotated? (equations 2 and 3)"""

    def __init__(self, config, model, augment):
        super().__init__(config, model, augment)
        self.rotations, self.area = config.rotations, augment or (0.5, 1.0)
        self.net = build_image_tower(model)
        self.head = nn.Linear(self.net.dim, config.rotations)
        self.size = image_size(self.net)

    def views(self, sample, rng):
        """views: uint8 [rotations, 3, H, W]."""
        image = random_resized_crop(sample.image(), self.size, self.area, rng)
        return {"views": np.stack([np.rot90(image, turns, axes=(1, 2)) for turns in range(self.rotations)])}

    def forward(self, batch):
        logits = self.head(self.net(batch["views"].flatten(0, 1))).float()
        target = torch.arange(len(logits), device=logits.device) % self.rotations
        loss = F.cross_entropy(logits, target)
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        return Losses(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def encoder(self):
        return self.net

    @classmethod
    def build_encoder(cls, model, preprocess):
        return build_image_tower(model, preprocess)

"""A small adversarial objective: Goodfellow et al. 2014, "Generative Adversarial Nets", algorithm 1, k = 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from winnow.infra.params import params
from winnow.pretrain.models.towers import ImageTower, build_image_tower
from winnow.pretrain.objectives.base import Losses, Objective, Player, Sample
from winnow.pretrain.sections import OptimizerConfig

NOISE = 8


@params
class Config:
    """Args: generator_lr: the generator's learning rate; generator_every: steps between its turns."""

    generator_lr: float = 1e-3
    generator_every: int = 1


class Gan(Objective):
    """The critic tells images from drawn ones; the generator draws, with the non-saturating loss of section 3."""

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.settings = config
        self.net = build_image_tower(model)
        self.head = nn.Linear(self.net.dim, 1)
        self.generator = nn.Sequential(nn.Linear(NOISE, 16), nn.ReLU(), nn.Linear(16, 3 * 32 * 32), nn.Sigmoid())

    def players(self) -> tuple[Player, ...]:
        slow = OptimizerConfig(beta1=0.5, beta2=0.999, weight_decay=0.0)
        generator = Player("generator", ("generator",), lr=self.settings.generator_lr, schedule="const", optimizer=slow)
        return (Player("critic", ("net", "head")), generator)

    def turns(self, step: int) -> tuple[str, ...]:
        return ("critic", "generator") if (step + 1) % self.settings.generator_every == 0 else ("critic",)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = np.asarray(sample.image().resize((32, 32)), np.float32).transpose(2, 0, 1) / 255
        return {"image": image, "noise": rng.standard_normal(NOISE, np.float32)}

    def forward(self, batch: dict[str, torch.Tensor], player: str = "critic") -> Losses:
        drawn = self.generator(batch["noise"]).view(-1, 3, 32, 32)
        if player == "generator":
            loss = F.softplus(-self.logits(drawn)).mean()
        else:
            loss = F.softplus(-self.logits(batch["image"])).mean() + F.softplus(self.logits(drawn.detach())).mean()
        return Losses(loss, {player: loss.detach()})

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The critic's of images from 0 to 1, float32 [n, 3, 32, 32]; [n, 1]."""
        logits: torch.Tensor = self.head(self.net.encode_image(images)).float()
        return logits

    def encoder(self) -> ImageTower:
        return self.net

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> ImageTower:
        return build_image_tower(model, preprocess)


class Incomplete(Gan):
    """The generator is nobody's."""

    def players(self) -> tuple[Player, ...]:
        return (Player("critic", ("net", "head")),)

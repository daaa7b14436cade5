"""An autoencoder for latent diffusion.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G:
absolute error of the reconstruction and a small KL of the latents to a standard normal. Left out are the perceptual
loss, which needs a published network's weights, and the adversarial one; so reconstructions are softer than the
paper's. The network is diffusers' AutoencoderKL. Noise comes with the views, as in `diffusion`.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from winnow.infra.params import params
from winnow.pretrain.data.augment import random_resized_crop
from winnow.pretrain.diffusion import model as nets
from winnow.pretrain.diffusion.sampling import square
from winnow.pretrain.distributed import add_up
from winnow.pretrain.objectives.base import Losses, Objective, Sample


@params
class Config:
    """Args:
    kl_weight: of the KL, as in the paper where both are sums over an image.
    flip: whether half of the images are mirrored.
    momentum: of the running standard deviation of the latents, which diffusion divides by.
    """

    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    flip: bool = True
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Autoencoder(Objective):
    """Mean absolute error of the reconstruction, and the KL by its weight over the number of values of an image."""

    network = "autoencoder"
    measured: torch.Tensor

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.settings, self.augment = config, augment
        self.net = nets.Autoencoder(model)
        self.register_buffer("measured", torch.zeros(1))

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """image: uint8 [3, H, W]; noise (on the latents): float32 [c, h, w]."""
        if self.augment is None:
            image = square(sample.image(), self.net.size)
        else:
            image = random_resized_crop(sample.image(), self.net.size, self.augment, rng)
        mirror = self.settings.flip and rng.random() < 0.5
        noise = rng.standard_normal(self.net.shape, np.float32)
        return {"image": image[:, :, ::-1] if mirror else image, "noise": noise}

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        image = batch["image"].float() / 127.5 - 1
        posterior = self.net.net.encode(image).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        self._measure(mean)
        decoded = self.net.net.decode(mean + (logvar / 2).exp() * batch["noise"]).sample.float()
        error = (decoded - image).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        loss = error + self.settings.kl_weight * kl / image[0].numel()
        return Losses(loss, {"loss": loss.detach(), "absolute_error": error.detach(), "kl": kl.detach()})

    @torch.no_grad()
    def _measure(self, mean: torch.Tensor) -> None:
        """Move the running standard deviation towards that of the whole batch's latents; the first batch sets it."""
        if not self.training:
            return
        sums = torch.stack([mean.new_tensor(mean.numel()), mean.sum(), mean.square().sum()]).double()
        add_up(sums)
        std = (sums[2] / sums[0] - (sums[1] / sums[0]) ** 2).clamp(min=1e-12).sqrt().float()
        self.net.latent_std.lerp_(std.expand(1), torch.where(self.measured > 0, 1 - self.settings.momentum, 1.0))
        self.measured.fill_(1)

    def encoder(self) -> nn.Module:
        return self.net

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        return nets.Autoencoder(model)

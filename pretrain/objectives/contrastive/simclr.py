"""SimCLR: a simple framework for contrastive learning of visual representations.

Chen et al. 2020, algorithm 1, section 2 and appendix A. Batch normalisation sees both views of the whole global batch
(section 2.2, "global BN"), so the loss is the same for any number of processes. For images of 32 pixels the paper's
appendix B.9 has: no blur, colour strength 0.5, temperature 0.5.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from winnow.infra.params import params
from winnow.pretrain.data.augment import Augmentation, simclr_jitter
from winnow.pretrain.distributed import gather, local_rows
from winnow.pretrain.models.preprocessing import image_size
from winnow.pretrain.models.towers import build_image_tower
from winnow.pretrain.objectives.base import Losses, Objective, Sample

CROPS = (0.08, 1.0)  # fraction of the area, from and to (appendix A)


@params
class Config:
    """Args:
    temperature: τ, what cosines are divided by.
    dim: of the projections.
    hidden: width of the projection head; None for that of the features (2048 in the paper's ResNet-50).
    head_norm: whether the head has batch normalisation after each layer; the authors' code has, the paper has not.
    strength: of the colour distortion, s in appendix A; with 2.5 the hue takes any value.
    blur: whether half of the views are blurred.
    """

    temperature: Annotated[float, Field(gt=0)] = 0.1
    dim: Annotated[int, Field(ge=1)] = 128
    hidden: Annotated[int, Field(ge=1)] | None = None
    head_norm: bool = False
    strength: Annotated[float, Field(ge=0, le=2.5)] = 1.0
    blur: bool = True


class SimCLR(Objective):
    """Of two views of each image of the global batch, find the other among all views."""

    couples_batch = True
    cacheable = True  # where the network has no batch normalisation

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        super().__init__(config, model, augment)
        self.temperature = config.temperature
        net = build_image_tower(model)
        jitter, blur_p = simclr_jitter(config.strength), 0.5 if config.blur else 0.0
        self.augmentation = Augmentation(image_size(net), augment or CROPS, jitter, blur_p=blur_p)
        self.net = net
        self.head = projection_head(net.dim, config)

    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """views: uint8 [2, 3, H, W]."""
        return {"views": np.stack([self.augmentation(sample.image(), rng) for _ in range(2)])}

    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        return self.loss(self.embed(batch))

    def embed(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """L2-normalised projections of the two views, float32 [n, d] each."""
        # Both views in one batch, so that batch normalisation sees both.
        z = self.head(self.net(batch["views"].transpose(0, 1).flatten(0, 1)))
        return F.normalize(z.float(), dim=1).chunk(2)

    def loss(self, rows: tuple[torch.Tensor, ...]) -> Losses:
        a, b = rows
        with torch.autocast(a.device.type, enabled=False):
            loss, accuracy = nt_xent(a, b, self.temperature)
        return Losses(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def encoder(self) -> nn.Module:
        """Without the projection head, whose input makes better features than its output (section 4.2)."""
        return self.net

    @classmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        return build_image_tower(model, preprocess)


def projection_head(dim: int, config: Config) -> nn.Sequential:
    """g(h) = W2 ReLU(W1 h), from `dim` features to `config.dim`."""
    hidden = config.hidden or dim
    layers: list[nn.Module] = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, config.dim)]
    if config.head_norm:
        layers.insert(1, nn.BatchNorm1d(hidden))
        layers.append(nn.BatchNorm1d(config.dim))
    return nn.Sequential(*layers)


def nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised temperature-scaled cross-entropy of this process's views against those of all (equation 1 and
    algorithm 1), and the fraction of views whose nearest is their other one.

    Averaged over the processes, value and gradients are those of one process with the whole batch.

    Args:
        a, b: L2-normalised projections of the two views, [n, d].
        temperature: τ.
    """
    everyone = gather(torch.stack([a, b], dim=1))
    local, total = local_rows(a), len(everyone)
    itself, other = torch.cat([local, local + total]), torch.cat([local + total, local])
    logits = torch.cat([a, b]) @ everyone.transpose(0, 1).flatten(0, 1).T / temperature
    logits = logits.scatter(1, itself[:, None], -torch.inf)
    return F.cross_entropy(logits, other), (logits.detach().argmax(dim=1) == other).float().mean()

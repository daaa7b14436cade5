"""SigLIP: CLIP's two towers with a loss of each pair by itself.

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1 and algorithm 1. The networks are
open_clip's, with its `logit_bias`. The paper passes captions from device to device in chunks; here each process gathers
all of them and computes its rows, which is the same sum.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from winnow.infra.params import params
from winnow.pretrain.distributed import gather, local_rows
from winnow.pretrain.objectives.base import Losses
from winnow.pretrain.objectives.contrastive import clip
from winnow.pretrain.objectives.contrastive.clip import CLIP


@params
class Config:
    """Args:
    init_scale: t at the start, whose logarithm t' is learned (section 3.2: t' = log 10).
    init_bias: b at the start; it offsets the many negatives (section 3.2: -10).
    """

    init_scale: Annotated[float, Field(gt=0)] = 10.0
    init_bias: float = -10.0


class SigLIP(CLIP):
    """Whether image and caption belong together, for each pair of the global batch."""

    cacheable = True
    adjusts: ClassVar[tuple[str, ...]] = ()  # unlike CLIP's, the scale has no bounds

    def __init__(self, config: Config, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        start = {"init_logit_scale": math.log(config.init_scale), "init_logit_bias": config.init_bias}
        super().__init__(clip.Config(), model | start, augment)

    def _loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> Losses:
        with torch.autocast(image.device.type, enabled=False):
            loss, accuracy = siglip_loss(image, text, scale, self.net.logit_bias.float())
        return Losses(loss, {"loss": loss.detach(), "accuracy": accuracy})

    def after_step(self, step: int) -> None:
        return

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"logit_scale": self.net.logit_scale.exp(), "logit_bias": self.net.logit_bias}

    def weights(self) -> dict[str, torch.Tensor]:
        weights = super().weights()
        if self.scalar_scale:
            weights["logit_bias"] = weights["logit_bias"].reshape(())
        return weights


def siglip_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of the loss against the columns of all, and the fraction of images nearest to their caption.

    Averaged over the processes, value and gradients are those of one process with the whole batch.

    Args:
        image, text: L2-normalised features, [n, d].
        scale: scalar t that multiplies the cosines.
        bias: scalar b that is added to them.
    """
    local = local_rows(image)
    logits = scale * image @ gather(text).T + bias
    signs = 2 * F.one_hot(local, logits.shape[1]) - 1
    loss = -F.logsigmoid(signs * logits).sum(dim=1).mean()
    return loss, (logits.detach().argmax(dim=1) == local).float().mean()

"""The contract of an objective."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from pretrain.nets import preprocess_config


@dataclass(frozen=True)
class Sample:
    """A picture (RGB) and its caption."""

    image: Image.Image
    text: str


class Losses(NamedTuple):
    """`total` is minimised; `parts` are scalars for the log. A tuple, so that ZeRO-3 finds the tensors in it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Objective(nn.Module, abc.ABC):
    """A network with the loss it learns by.

    Subclasses lie in one file beside a dataclass `Config`, whose fields are what the recipe may set. What must
    outlive an interruption (queues, momentum encoders) is held in parameters and buffers. Trained parameters have at
    least one dimension, for DeepSpeed broadcasts no scalars.

    Class attributes:
        couples_batch: whether the loss of a sample depends on the others of its batch; such a batch is never split.
        adjusts: names of the parameters that `after_step` changes.
    """

    couples_batch: ClassVar[bool] = False
    adjusts: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def __init__(self, config: Any, model: dict[str, Any], augment: tuple[float, float]) -> None:
        """Args: the class's own `Config`, open_clip's model config, and the share of the area random crops take."""
        super().__init__()

    @abc.abstractmethod
    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What the loss sees of one sample; arrays of fixed shapes, stacked over the batch.

        Called by several threads at once. Deterministic in `rng`, which depends on the seed and the place in the order
        alone.
        """

    @abc.abstractmethod
    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        """The loss of this process's part of the batch, [n, …] each.

        Gradients are averaged over processes; the average must be the gradient of the loss of the whole batch.
        """

    def after_step(self, step: int) -> None:
        """What follows the optimiser's step number `step` (from 1), under `torch.no_grad`."""
        return

    def figures(self) -> dict[str, torch.Tensor]:
        """Further scalars for the log."""
        return {}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies: open_clip's rule spares gains, biases and the logit scale."""
        return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    @abc.abstractmethod
    def encoder(self) -> nn.Module:
        """What is exported and evaluated: has `encode_image`, and where it reads text `encode_text`."""

    def weights(self) -> dict[str, torch.Tensor]:
        """What is exported, by the names and shapes `build_encoder` has."""
        return self.encoder().state_dict()

    def preprocess(self) -> dict[str, Any]:
        """open_clip's preprocess_cfg of the pictures the encoder takes: size, mean, std, interpolation, …."""
        return preprocess_config(self.encoder())

    @classmethod
    @abc.abstractmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        """`encoder()` newly made, for weights to be loaded into."""

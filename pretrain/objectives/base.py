"""The contract of an objective."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from winnow.infra.errors import UsageError
from winnow.pretrain.models.nets import preprocess_config


@dataclass(frozen=True)
class Sample:
    """An image (RGB), its caption, and its class where the pool has a column `label`."""

    image: Image.Image
    text: str
    label: int | None = None


class Losses(NamedTuple):
    """`total` is minimised; `parts` are scalars for the log. A tuple, so that ZeRO-3 finds the tensors in it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Objective(nn.Module, abc.ABC):
    """A network with the loss it learns by.

    Subclasses lie in one file beside a dataclass `Config`, whose fields are what the recipe may set. What must
    outlive an interruption (queues, momentum encoders) is held in parameters and persistent buffers, the same in all
    processes, for only the first one's are saved (running statistics of batch normalisation, which training does not
    read, may differ). Trained parameters have at least one dimension, for DeepSpeed broadcasts no scalars.

    Class attributes (but for `adjusts` they are also read from the source, to check a recipe before torch is imported:
    give them as literals in the class itself):
        couples_batch: whether the loss of a sample depends on the others of its batch; such a batch is never split.
        cacheable: whether `embed` and `loss` are there, so that a batch can be cut by GradCache.
        adjusts: names of the trained parameters that `after_step` changes.
        needs_text: whether it trains a text tower, so that the model must have one.
        teacher: whether `after_step` reads all trained parameters (a momentum encoder), which ZeRO-3 cannot give.
        network: what it trains: encoder (of open_clip or timm), unet or autoencoder (of diffusers).
        checkpoints: fields of `Config` that name a checkpoint, trained before.
        divisible: (a, b, why): a must be a multiple of b, each `batch_size` (global), `workers` or a field of `Config`.

    Attributes:
        model: config `build_encoder` makes the encoder from; the given one unless a subclass changes it.
    """

    couples_batch: ClassVar[bool] = False
    cacheable: ClassVar[bool] = False
    adjusts: ClassVar[tuple[str, ...]] = ()
    needs_text: ClassVar[bool] = False
    teacher: ClassVar[bool] = False
    network: ClassVar[str] = "encoder"
    checkpoints: ClassVar[tuple[str, ...]] = ()
    divisible: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    @abc.abstractmethod
    def __init__(self, config: Any, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        """Args: the class's own `Config`, `ModelConfig.resolved()`, and the share of the area random crops take (None
        for the objective's own)."""
        super().__init__()
        self.model = model

    @abc.abstractmethod
    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What the loss sees of one sample; arrays of fixed shapes, stacked over the batch.

        Called in the decoding processes. Deterministic in `rng`, which depends on the seed and the place in the order
        alone.
        """

    @abc.abstractmethod
    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        """The loss of this process's part of the batch, [n, …] each.

        Gradients are averaged over processes; the average must be the gradient of the loss of the whole batch.
        """

    def embed(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What `loss` needs of the samples: tensors [n, …] whose row i depends on sample i alone."""
        raise TypeError(f"{type(self).__name__} is not cacheable")

    def loss(self, rows: tuple[torch.Tensor, ...]) -> Losses:
        """`forward` from what `embed` gave for this process's part of the batch; it may use parameters of its own."""
        raise TypeError(f"{type(self).__name__} is not cacheable")

    def checkpoint_activations(self) -> None:
        """Make the trained networks compute their activations again in the backward pass instead of keeping them."""
        found = False
        for module in self.modules():  # open_clip's and timm's method, and diffusers'
            for name in ("set_grad_checkpointing", "enable_gradient_checkpointing"):
                if hasattr(module, name) and any(parameter.requires_grad for parameter in module.parameters()):
                    # A wrapper may have the method, and the network in it not.
                    with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
                        getattr(module, name)()
                        found = True
        if not found:
            raise UsageError(
                f"the networks of {type(self).__name__} cannot compute activations again",
                where="activation_checkpointing",
            )

    def after_step(self, step: int) -> None:
        """What follows the optimiser's step number `step` (from 1), under `torch.no_grad`."""
        return

    def metrics(self) -> dict[str, torch.Tensor]:
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
        """open_clip's preprocess_cfg of the images the encoder takes: size, mean, std, interpolation, …."""
        return preprocess_config(self.encoder())

    @classmethod
    @abc.abstractmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        """`encoder()` newly made, for weights to be loaded into."""

    @classmethod
    def images(cls, encoder: Callable[[], Any]) -> dict[str, np.ndarray]:
        """Images to lie beside the checkpoint as NAME.png, uint8 [H, W, 3].

        `encoder()` is what `build_encoder` makes, with the exported weights, on the training's device.
        """
        return {}

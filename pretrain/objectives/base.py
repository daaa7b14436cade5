"""The contract of an objective."""

from __future__ import annotations

import abc
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from winnow.infra.errors import UsageError
from winnow.infra.pool.sample import Sample
from winnow.pretrain.models.preprocessing import preprocess_config
from winnow.pretrain.sections import OptimizerConfig

__all__ = ["Losses", "Objective", "Player", "Sample"]

_METHODS = ("__init__", "views", "forward", "encoder", "build_encoder")


class Losses(NamedTuple):
    """`total` is minimised; `parts` are scalars for the log. A tuple, so that ZeRO-3 finds the tensors in it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Player:
    """One of several opponents of an adversarial objective. Each has a DeepSpeed engine, an optimizer, a learning rate
    schedule and, with fp16, a loss scale.

    Attributes:
        name: in `turns`, `forward` and the log.
        modules: names of the attributes of the objective that hold its trained parameters. () is all of the objective.
        lr, warmup_steps, schedule, optimizer: None takes the config's.
    """

    name: str
    modules: tuple[str, ...] = ()
    lr: float | None = None
    warmup_steps: int | None = None
    schedule: Literal["cosine", "const"] | None = None
    optimizer: OptimizerConfig | None = None


class Objective(nn.Module, abc.ABC):
    """A network with the loss it learns by.

    A subclass is one file: a `Config` decorated with `winnow.infra.params.params`, whose fields are what a recipe may
    set, and the class. State that must survive an interruption (queues, momentum encoders) is held in parameters and
    persistent buffers. It must be the same in all processes, because only the first one's is saved (running statistics
    of batch normalisation, which training does not read, may differ). Trained parameters have at least one dimension,
    because DeepSpeed does not broadcast scalars.

    Class attributes:
        Config: class of the parameters; by default `Config` of the subclass's module, else the inherited one.
        network: what it trains: encoder (of open_clip or timm), unet or autoencoder (of diffusers).
        needs_text: whether it reads captions with a text tower, so that the model must have one.
        couples_batch: whether the loss of a sample depends on the others of its batch; such a batch is never split.
        cacheable: whether `embed` and `loss` are there, so that GradCache can split a batch. It holds for the class
            itself: a subclass, which may have another loss, says it again.
        sync_batchnorm: whether batch normalisation sees the batches of all processes, so that a step does not depend on
            the number of processes.
        teacher: whether `after_step` reads all trained parameters (a momentum encoder), which ZeRO-3 cannot give.
        adjusts: names of the trained parameters that `after_step` changes.
        checkpoints: fields of `Config` that name a checkpoint folder.
        columns: columns of the pool or measured ones that `views` reads from `sample.columns`.
        divisible: (a, b, why): a must be a multiple of b, each `batch_size` (global), `num_processes` or a field of
            `Config`.

    Attributes:
        model: config `build_encoder` makes the encoder from; the given one unless a subclass changes it.
    """

    Config: ClassVar[type]
    network: ClassVar[str] = "encoder"
    needs_text: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    cacheable: ClassVar[bool] = False
    sync_batchnorm: ClassVar[bool] = True
    teacher: ClassVar[bool] = False
    adjusts: ClassVar[tuple[str, ...]] = ()
    checkpoints: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    divisible: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises UsageError for a class that lacks a method or its `Config`."""
        super().__init_subclass__(**kwargs)
        default = getattr(sys.modules.get(cls.__module__), "Config", None)
        if "Config" not in vars(cls) and default is not None:
            cls.Config = default
        lacking = [name for name in _METHODS if getattr(getattr(cls, name), "__isabstractmethod__", False)]
        if not hasattr(cls, "Config"):
            lacking.append("Config")
        name, do = cls.__qualname__, "See pretrain/README.md."
        if lacking:
            raise UsageError(f"the objective {name} has no {' and no '.join(lacking)}", do=do)
        if not hasattr(cls.Config, "__pydantic_fields__"):
            do = "Decorate it with winnow.infra.params.params."
            raise UsageError(f"the Config of the objective {name} is not a params class", do=do)

    @abc.abstractmethod
    def __init__(self, config: Any, model: dict[str, Any], augment: tuple[float, float] | None) -> None:
        """Args:
        config: the class's `Config`.
        model: as `ModelConfig.resolved` returns it.
        augment: fraction of the image's area that random crops take, from and to; None for the objective's own.
        """
        super().__init__()
        self.model = model

    @classmethod
    def splits_by_features(cls) -> bool:
        """Whether GradCache can split its batch."""
        return bool(vars(cls).get("cacheable", False))

    @abc.abstractmethod
    def views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What the loss sees of one sample: arrays of fixed shapes, stacked over the batch.

        Called in the decoding processes. Deterministic in `rng`, which depends on the seed and the position in the
        order alone. An `ImageError` of `sample.image()` makes the loader take the next sample instead.
        """

    @abc.abstractmethod
    def forward(self, batch: dict[str, torch.Tensor]) -> Losses:
        """The loss of this process's part of the batch, [n, …] each.

        Gradients are averaged over processes; the average must be the gradient of the loss of the whole batch. An
        objective with several players is called as `forward(batch, player)`, with the name of the one whose turn it is;
        the parameters of the others are frozen meanwhile.
        """

    def players(self) -> tuple[Player, ...]:
        """Who trains which parameters. One player trains all of them."""
        return (Player(""),)

    def turns(self, step: int) -> tuple[str, ...]:
        """Names of the players that step in step number `step` (from 0), in order, all with the same batch."""
        return tuple(player.name for player in self.players())

    def initialise(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from the weights of another encoder, by the names and shapes of `encoder()`; others keep their own."""
        self.encoder().load_state_dict(weights, strict=False)

    def embed(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What `loss` needs of the samples: tensors [n, …] whose row i depends on sample i alone."""
        raise TypeError(f"{type(self).__name__} is not cacheable")

    def loss(self, rows: tuple[torch.Tensor, ...]) -> Losses:
        """`forward` from what `embed` returned for this process's part of the batch; it may use further parameters."""
        raise TypeError(f"{type(self).__name__} is not cacheable")

    def checkpoint_activations(self) -> None:
        """Make the trained networks recompute their activations in the backward pass instead of keeping them."""
        found = False
        for module in self.modules():  # open_clip's and timm's method, and diffusers'
            for name in ("set_grad_checkpointing", "enable_gradient_checkpointing"):
                if hasattr(module, name) and any(parameter.requires_grad for parameter in module.parameters()):
                    # A wrapper may have the method, and the network in it not.
                    with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
                        getattr(module, name)()
                        found = True
        if not found:
            what = f"the networks of {type(self).__name__} cannot recompute activations"
            raise UsageError(what, where="parallel.activation_checkpointing")

    def after_step(self, step: int) -> None:
        """What follows the optimizer's step number `step` (from 1), under `torch.no_grad`."""
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
        """What is exported, by the names and shapes of `build_encoder`."""
        return self.encoder().state_dict()

    def preprocess(self) -> dict[str, Any]:
        """open_clip's preprocess_cfg of the images the encoder takes: size, mean, std, interpolation, …."""
        return preprocess_config(self.encoder())

    @classmethod
    @abc.abstractmethod
    def build_encoder(cls, model: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
        """A new `encoder()`, for weights to be loaded into."""

    @classmethod
    def images(cls, encoder: Callable[[], Any]) -> dict[str, np.ndarray]:
        """Images to save next to the checkpoint as NAME.png, uint8 [H, W, 3].

        `encoder()` is what `build_encoder` makes, with the exported weights, on the training's device.
        """
        return {}

"""The optimizer of a training, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from winnow.pretrain.objectives.base import Objective
from winnow.pretrain.sections import OptimizerConfig


def learning_rate(
    step: int, *, steps: int, lr: float, warmup_steps: int, schedule: Literal["cosine", "const"] = "cosine"
) -> float:
    """The rate of step number `step` (from 0) of `steps`: linear warm-up, then a cosine to 0 (open_clip's) or flat."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "const":
        return lr
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) * lr


def make_optimizer(
    objective: Objective,
    config: OptimizerConfig,
    lr: float,
    trained: Iterable[tuple[str, nn.Parameter]],
    fused: bool = True,
) -> torch.optim.Optimizer:
    """torch's AdamW or SGD, or timm's LARS; parameters without weight decay are a group of their own.

    LARS is algorithm 1 of You et al. 2017, "Large Batch Training of Convolutional Networks", with η = 0.001 and, as
    SimCLR trains, for the parameters with weight decay alone; the others take the step of SGD. timm's, like torch's
    SGD and unlike the paper, keeps the learning rate out of the momentum.

    Args:
        objective: whose `decays` says which parameters decay.
        trained: names and parameters.
        fused: whether to use torch's fused kernels.

    Raises:
        TypeError: a parameter is a scalar.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in trained:
        if parameter.ndim == 0:
            raise TypeError(f"{name} is a scalar, which DeepSpeed cannot broadcast; give it the shape [1]")
        (decayed if objective.decays(name, parameter) else spared).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": spared, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=fused)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=fused)
    from timm.optim import Lars

    for group in groups:
        group["always_adapt"] = group["params"] is decayed
    return Lars(groups, lr=lr, momentum=config.momentum, trust_coeff=0.001)

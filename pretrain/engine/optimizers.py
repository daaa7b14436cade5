"""The optimiser of a training, and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.objectives.base import Objective


def learning_rate(step: int, *, steps: int, lr: float, warmup: int, schedule: str = "cosine") -> float:
    """The rate of step number `step` (from 0) of `steps`: linear warm-up, then a cosine to 0 (open_clip's) or flat."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "const":
        return lr
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr


def make_optimizer(objective: Objective, config: PretrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD, or timm's LARS, over the trained parameters, those without weight decay apart.

    LARS is algorithm 1 of You et al. 2017, "Large Batch Training of Convolutional Networks", with η = 0.001 and, as
    SimCLR trains, for the parameters with weight decay alone; the others take the step of SGD. timm's, like torch's
    SGD and unlike the paper, keeps the learning rate out of the momentum.
    """
    decayed: list[torch.nn.Parameter] = []
    spared: list[torch.nn.Parameter] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim == 0:
                raise TypeError(f"{name} is a scalar, which DeepSpeed cannot broadcast; give it the shape [1]")
            (decayed if objective.decays(name, parameter) else spared).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": spared, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    fused = config.zero_stage == 0
    if config.optimizer == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    from timm.optim import Lars

    for group in groups:
        group["always_adapt"] = group["params"] is decayed
    return Lars(groups, lr=config.lr, momentum=config.momentum, trust_coeff=0.001)

"""One player's DeepSpeed engine: its optimizer, learning rate and loss scale."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from winnow.infra.errors import UsageError
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.distributed import world_size
from winnow.pretrain.engine import zero
from winnow.pretrain.engine.gradcache import CachedGradients, surrogate
from winnow.pretrain.engine.optimizers import learning_rate, make_optimizer
from winnow.pretrain.engine.settings import deepspeed_config, half_type
from winnow.pretrain.objectives.base import Losses, Objective, Player

_FIRST_SCALE = 2.0**16  # of the loss in fp16, torch's


class _Whole(nn.Module):
    """What DeepSpeed wraps where there is one player: the objective, or the part of its gradient GradCache wants."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, part: dict[str, torch.Tensor], cached: tuple[list, list] | None = None) -> Any:
        return self.objective(part) if cached is None else surrogate(self.objective, part, cached)


class _Turn(nn.Module):
    """What DeepSpeed wraps where there are several players: the modules of one."""

    def __init__(self, objective: Objective, player: Player) -> None:
        super().__init__()
        self.trained = nn.ModuleDict({name: getattr(objective, name) for name in player.modules})
        self._call = lambda part: objective(part, player.name)

    def forward(self, part: dict[str, torch.Tensor]) -> Any:
        return self._call(part)


class PlayerEngine:
    """A DeepSpeed engine that trains the parameters of one player of an objective, which is on `device`."""

    def __init__(self, objective: Objective, player: Player, config: PretrainConfig, device: torch.device) -> None:
        self.deepspeed = zero.load_deepspeed(device)
        self.objective, self.player, self.config, self.device = objective, player, config, device
        self.half = half_type(config, device)
        self.trained = {
            name: value
            for name, value in objective.named_parameters()
            if value.requires_grad and (not player.modules or name.partition(".")[0] in player.modules)
        }
        settings = player.optimizer or config.optimizer
        self.lr = player.lr or config.lr
        fused = config.parallel.zero_stage == 0
        self.optimizer = make_optimizer(objective, settings, self.lr, self.trained.items(), fused)
        try:
            self.engine = self.deepspeed.initialize(
                model=_Turn(objective, player) if player.modules else _Whole(objective),
                optimizer=self.optimizer,
                config=deepspeed_config(config, settings, world_size(), device),
                dist_init_required=False,
            )[0]
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            if not config.parallel.deepspeed:
                raise
            raise UsageError(f"DeepSpeed refuses its config ({error})", where="parallel.deepspeed") from error
        self.scaler = zero.loss_scaler(self.engine, _FIRST_SCALE) if self.half is torch.float16 else None

    def rate(self, step: int) -> float:
        """The learning rate of step number `step` (from 0)."""
        config, player = self.config, self.player
        warmup_steps = config.warmup_steps if player.warmup_steps is None else player.warmup_steps
        schedule = player.schedule or config.schedule
        return learning_rate(step, steps=config.steps, lr=self.lr, warmup_steps=warmup_steps, schedule=schedule)

    def step(
        self, parts: list[dict[str, torch.Tensor]], step: int, want_norm: bool
    ) -> tuple[dict[str, torch.Tensor], float]:
        """One optimizer step over the parts of this process's batch.

        Returns:
            (loss parts averaged over `parts`; global gradient norm before clipping, NaN if not wanted, infinite in a
            step that fp16 skips).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        sums: dict[str, torch.Tensor] = {}
        norm, zero_stage = math.nan, self.config.parallel.zero_stage
        cached = None
        if self.config.parallel.grad_cache > 1:
            cached = CachedGradients(self.objective, list(self.trained.values()), parts, self.device, self._autocast)
        for number, part in enumerate(parts):
            if cached is None:
                losses: Losses = self.engine(part)
                total = losses.total
                for name, value in losses.parts.items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(parts)
            else:
                sums = cached.losses
                total = self.engine(part, cached.of(number)) * len(parts)  # DeepSpeed divides by the number of parts
            self.engine.backward(total)
            if number == len(parts) - 1 and want_norm and not zero_stage:
                norm = self._gradient_norm()
            self.engine.step()
        if want_norm and zero_stage:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        return sums, norm

    def _gradient_norm(self) -> float:
        grads = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        return norm / self.scaler.scale if self.scaler is not None else norm

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

"""The engine of a training: a DeepSpeed engine per player, what follows each step, and the state to resume from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from winnow.infra.errors import UsageError
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.distributed import rank
from winnow.pretrain.engine import zero
from winnow.pretrain.engine.player import PlayerEngine
from winnow.pretrain.models.batchnorm import norm_names
from winnow.pretrain.objectives.base import Objective, Player


class Engine:
    """Trains an objective, which is given on the CPU, equal in all processes, and moved to `device`."""

    def __init__(self, objective: Objective, config: PretrainConfig, device: torch.device) -> None:
        self.objective, self.config, self.device = objective, config, device
        self.zero_stage = config.parallel.zero_stage
        _check_norms(objective, config)
        if config.parallel.activation_checkpointing:
            objective.checkpoint_activations()
        objective.to(device)
        self.trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        players = _check_players(objective, config, set(self.trained))
        self.players = {player.name: PlayerEngine(objective, player, config, device) for player in players}
        self.mean: dict[str, torch.Tensor] = {}
        if config.optimizer.ema is not None:
            self.mean = {name: value.detach().clone() for name, value in self.trained.items()}
            self._average = get_ema_multi_avg_fn(config.optimizer.ema)

    def step(
        self, parts: list[dict[str, torch.Tensor]], step: int, want_norm: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The turns of step number `step` (from 0) over the parts of this process's batch.

        Returns:
            (loss parts averaged over `parts`; `lr` and `grad_norm` of each player whose turn it was, with
            `/NAME` behind where there are several).
        """
        losses: dict[str, torch.Tensor] = {}
        facts: dict[str, float] = {}
        for name in self.objective.turns(step):
            player = self.players[name]
            with self._others_frozen(player):
                found, norm = player.step(parts, step, want_norm)
            losses |= found
            facts |= {_label("lr", name): player.rate(step), _label("grad_norm", name): norm}
        self._after_step(step + 1)
        return losses, facts

    @contextlib.contextmanager
    def _others_frozen(self, player: PlayerEngine) -> Iterator[None]:
        others = [value for name, value in self.trained.items() if name not in player.trained]
        for value in others:
            value.requires_grad_(False)
        try:
            yield
        finally:
            for value in others:
                value.requires_grad_(True)

    @torch.no_grad()
    def _after_step(self, step: int) -> None:
        if not self.zero_stage:
            self.objective.after_step(step)
        else:
            # ZeRO steps its own float32 copies of the parameters; what is changed here must reach them.
            adjusted = [self.objective.get_parameter(name) for name in self.objective.adjusts]
            with self.whole(adjusted, change=True):
                self.objective.after_step(step)
                values = [parameter.detach().clone() for parameter in adjusted]
            zero.adjust(adjusted, values)
        if self.mean:
            self._average(list(self.mean.values()), list(self.trained.values()), step)

    def whole(self, parameters: list[nn.Parameter], change: bool = False) -> contextlib.AbstractContextManager:
        """Within it the parameters are whole on every process (ZeRO-3 keeps them in parts). With `change`, what the
        first process changes in them is kept."""
        if self.zero_stage < 3 or not parameters:
            return contextlib.nullcontext()
        deepspeed = next(iter(self.players.values())).deepspeed
        manager: contextlib.AbstractContextManager = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if change else None
        )
        return manager

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the objective has the running mean of its weights, where the config asks for one."""
        kept = {name: self.trained[name].detach().clone() for name in self.mean}
        try:
            self._write(self.mean)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)

    def metrics(self) -> dict[str, float]:
        with torch.no_grad(), self.whole([self.objective.get_parameter(name) for name in self.objective.adjusts]):
            metrics = {name: float(value) for name, value in self.objective.metrics().items()}
        scales = {name: player.scaler.scale for name, player in self.players.items() if player.scaler is not None}
        return metrics | {_label("loss_scale", name): scale for name, scale in scales.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a training resumes from, whatever the ZeRO stage and the number of processes. All processes call it.

        Returns:
            (copies on the CPU, in the first process: the objective's state as `model/NAME`, the optimizers' as
            `optimizer/KEY/NAME`, the running mean as `mean/NAME`; the loss scaler's state, JSON values, by player
            where there are several).
        """
        first = rank() == 0
        tensors = {}
        for name, value in self.objective.state_dict(keep_vars=True).items():
            with self.whole([value] if isinstance(value, nn.Parameter) else []):
                if first:
                    tensors[f"model/{name}"] = _copy(value)
        for player in self.players.values():
            for name, states in zero.optimizer_state(player.engine, player.optimizer, player.trained):
                if first:
                    tensors |= {f"optimizer/{key}/{name}": _copy(value) for key, value in states.items()}
        if first:
            tensors |= {f"mean/{name}": _copy(value) for name, value in self.mean.items()}
        scalers = {name: player.scaler.state() for name, player in self.players.items() if player.scaler is not None}
        return tensors, scalers.get("", scalers)

    def restore(self, tensors: dict[str, torch.Tensor], scaler: dict[str, Any]) -> None:
        """Take the optimizers', the mean's and the scalers' state, as `state` returned them; all processes call it.

        The objective's own state must have been loaded before the engine was made.
        """
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                key, _, parameter = rest.partition("/")
                states.setdefault(parameter, {})[key] = value
            elif kind == "mean" and rest in self.mean:
                self.mean[rest].copy_(value)
        for name, player in self.players.items():
            mine = {key: value for key, value in states.items() if key in player.trained}
            zero.restore_optimizer(player.engine, player.optimizer, player.trained, mine)
            kept = scaler if name == "" else scaler.get(name)
            if player.scaler is not None and kept:
                player.scaler.restore(kept)

    def close(self) -> None:
        for player in self.players.values():
            player.engine.destroy()


def _check_norms(objective: Objective, config: PretrainConfig) -> None:
    """A batch whose samples are coupled by batch normalisation is not split."""
    for key in ("grad_cache", "accumulation_steps"):
        if getattr(config.parallel, key) > 1 and (norms := norm_names(objective)):
            what = f"the model has batch normalisation ({norms[0]}), which would see each part of the batch separately"
            raise UsageError(what, where=f"parallel.{key}", do="Take a network without it, or more processes.")


def _check_players(objective: Objective, config: PretrainConfig, trained: set[str]) -> tuple[Player, ...]:
    """The players; each trained parameter is of one of them."""
    players, title = objective.players(), type(objective).__name__
    if len(players) == 1 and not players[0].modules:
        return players
    if config.parallel.zero_stage == 3 or config.parallel.grad_cache > 1:
        key = "zero_stage" if config.parallel.zero_stage == 3 else "grad_cache"
        what = f"{title} has several players, each with an engine, and {key} needs one that sees all of the objective"
        raise UsageError(what, where=f"parallel.{key}", do="Take zero_stage 2 or lower, and grad_cache 1.")
    owners = [module for player in players for module in player.modules]
    if "" in (names := [player.name for player in players]) or len(set(names)) < len(names):
        raise UsageError(f"the players of {title} need different names, and these are {names}")
    twice = sorted({module for module in owners if owners.count(module) > 1})
    nobodys = sorted(name for name in trained if name.partition(".")[0] not in owners)
    if twice or nobodys or any(not player.modules for player in players):
        wrong = f"{twice[0]} is of two players" if twice else f"{(nobodys or ['everything'])[0]} is of no single player"
        raise UsageError(f"each trained parameter of {title} must be of one player: {wrong}")
    return players


def _label(name: str, player: str) -> str:
    return f"{name}/{player}" if player else name


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()

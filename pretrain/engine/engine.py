"""DeepSpeed around an objective: its config, a step, what follows each step, and the state to resume from."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from winnow.infra.errors import UsageError
from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.engine import zero
from winnow.pretrain.engine.optimizers import learning_rate, make_optimizer
from winnow.pretrain.objectives.base import Losses, Objective

__all__ = ["Engine", "deepspeed_config", "learning_rate", "load_deepspeed"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE = 2.0**16  # of the loss in fp16, torch's


def deepspeed_config(config: PretrainConfig, world: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's config dict; `config.deepspeed` is merged over it."""
    parts = config.accumulate * config.grad_cache
    ours: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": config.grad_clip or 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if (dtype := half_type(config, device)) is not None:
        # Autocast over float32 weights, as open_clip trains; without "safe modules" gradients are reduced in float32.
        name = str(dtype).removeprefix("torch.")
        ours["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    return _merge(ours, config.deepspeed)


def half_type(config: PretrainConfig, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None without autocast."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return _DTYPES.get(config.precision)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, quietly."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # DeepSpeed remembers it from an earlier training here
    if get_accelerator().device_name() != device.type:  # an earlier training in this process ran on another device
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CPU_Accelerator() if device.type == "cpu" else CUDA_Accelerator())
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory all-reduce for half a minute, for inference only: training
        # goes through gloo. This is DeepSpeed's own table of extensions that may be built.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


class _Step(nn.Module):
    """What DeepSpeed wraps: the objective, or the part of its gradient that GradCache wants of it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, part: dict[str, torch.Tensor], cached: tuple[list, list] | None = None) -> Any:
        if cached is None:
            return self.objective(part)
        # A scalar whose gradient is that of the loss, by the chain rule through the rows.
        rows, local = cached
        pairs = [*zip(self.objective.embed(part), rows, strict=True), *local]
        return sum((value.float() * grad).sum() for value, grad in pairs)


class Engine:
    """A DeepSpeed engine that trains an objective.

    Args:
        objective: on the CPU, equal in all processes.
        config: the training's.
        device: where to train.
    """

    def __init__(self, objective: Objective, config: PretrainConfig, device: torch.device) -> None:
        self.deepspeed = load_deepspeed(device)
        self.objective, self.config, self.device = objective, config, device
        self.half = half_type(config, device)
        batch_norm = nn.modules.batchnorm._BatchNorm
        norms = [name for name, module in objective.named_modules() if isinstance(module, batch_norm)]
        if config.grad_cache > 1 and norms:
            raise UsageError(
                f"the model has batch normalisation ({norms[0]}), which would see each part of the batch by itself",
                where="grad_cache",
                do="Take a network without it, or more workers.",
            )
        if config.activation_checkpointing:
            objective.checkpoint_activations()
        objective.to(device)
        self.trained = {name: value for name, value in objective.named_parameters() if value.requires_grad}
        self.optimizer = make_optimizer(objective, config)
        try:
            self.engine = self.deepspeed.initialize(
                model=_Step(objective),
                optimizer=self.optimizer,
                config=deepspeed_config(config, dist.get_world_size(), device),
                dist_init_required=False,
            )[0]
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            if not config.deepspeed:
                raise
            raise UsageError(f"DeepSpeed refuses its config ({error})", where="deepspeed") from error
        self.scaler = zero.loss_scaler(self.engine, _FIRST_SCALE) if self.half is torch.float16 else None
        self.mean: dict[str, torch.Tensor] = {}
        if config.ema is not None:
            self.mean = {name: value.detach().clone() for name, value in self.trained.items()}
            self._average = get_ema_multi_avg_fn(config.ema)

    def step(self, parts: list[dict[str, torch.Tensor]], step: int, lr: float, want_norm: bool) -> tuple[dict, float]:
        """One optimiser step over the parts of this process's batch.

        Returns:
            (loss parts averaged over `parts`; global gradient norm before clipping, NaN if not wanted, infinite in a
            step that fp16 leaves out).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, torch.Tensor] = {}
        norm = math.nan
        cached = self._cached(parts) if self.config.grad_cache > 1 else None
        for number, part in enumerate(parts):
            if cached is None:
                losses: Losses = self.engine(part)
                total = losses.total
                for name, value in losses.parts.items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(parts)
            else:
                sums = cached.parts
                total = self.engine(part, cached.of(number)) * len(parts)  # DeepSpeed divides by the number of parts
            self.engine.backward(total)
            if number == len(parts) - 1 and want_norm and not self.config.zero_stage:
                norm = self._gradient_norm()
            self.engine.step()
        if want_norm and self.config.zero_stage:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        self._after_step(step + 1)
        return sums, norm

    def _gradient_norm(self) -> float:
        grads = [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        return norm / self.scaler.scale if self.scaler is not None else norm

    def _cached(self, parts: list[dict[str, torch.Tensor]]) -> _Cached:
        """The loss of the whole batch and its gradient by features and by the parameters the loss itself has."""
        embedded, states = [], []
        with torch.no_grad(), self._autocast():
            for part in parts:
                states.append(_random_state(self.device))
                embedded.append(self.objective.embed(part))
        rows = [torch.cat(column).detach().requires_grad_() for column in zip(*embedded, strict=True)]
        local = list(self.trained.values())
        with self._autocast():
            losses = self.objective.loss(tuple(rows))
        grads = torch.autograd.grad(losses.total, [*rows, *local], allow_unused=True, materialize_grads=False)
        by_rows = [
            (torch.zeros_like(row) if grad is None else grad).chunk(len(parts))
            for row, grad in zip(rows, grads, strict=False)
        ]
        by_own = [(value, grad) for value, grad in zip(local, grads[len(rows) :], strict=True) if grad is not None]
        return _Cached({name: value.detach() for name, value in losses.parts.items()}, by_rows, by_own, states)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    @torch.no_grad()
    def _after_step(self, step: int) -> None:
        if not self.config.zero_stage:
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
        """Within it the parameters are whole on every process (ZeRO-3 keeps them in parts); what the first process
        changes in them is kept if `change` says so."""
        if self.config.zero_stage < 3 or not parameters:
            return contextlib.nullcontext()
        manager: contextlib.AbstractContextManager = self.deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if change else None
        )
        return manager

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the objective has the running mean of its weights, where the config asks for one."""
        kept = {name: self.trained[name].detach().clone() for name in self.mean}
        with torch.no_grad():
            for name, value in self.mean.items():
                self.trained[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.trained[name].copy_(value)

    def metrics(self) -> dict[str, float]:
        with torch.no_grad(), self.whole([self.objective.get_parameter(name) for name in self.objective.adjusts]):
            metrics = {name: float(value) for name, value in self.objective.metrics().items()}
        return metrics if self.scaler is None else metrics | {"loss_scale": self.scaler.scale}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a training resumes from, whatever the ZeRO stage and the number of processes. All processes call it.

        Returns:
            (copies on the CPU, in the first process: the objective's state as `model/NAME`, the optimiser's as
            `optimizer/KEY/NAME`, the running mean as `mean/NAME`; the loss scaler's state, JSON values).
        """
        first = dist.get_rank() == 0
        tensors = {}
        for name, value in self.objective.state_dict(keep_vars=True).items():
            with self.whole([value] if isinstance(value, nn.Parameter) else []):
                if first:
                    tensors[f"model/{name}"] = _copy(value)
        for name, states in zero.optimizer_state(self.engine, self.optimizer, self.trained):
            if first:
                tensors |= {f"optimizer/{key}/{name}": _copy(value) for key, value in states.items()}
        if first:
            tensors |= {f"mean/{name}": _copy(value) for name, value in self.mean.items()}
        return tensors, {} if self.scaler is None else self.scaler.state()

    def restore(self, tensors: dict[str, torch.Tensor], scaler: dict[str, Any]) -> None:
        """Take the optimiser's, the mean's and the scaler's state, as `state` gave them; all processes call it.

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
        zero.restore_optimizer(self.engine, self.optimizer, self.trained, states)
        if self.scaler is not None and scaler:
            self.scaler.restore(scaler)

    def close(self) -> None:
        self.engine.destroy()


class _Cached:
    """Gradients of a batch's loss by its rows, cut into parts, and by the parameters that the loss itself uses."""

    def __init__(self, parts: dict[str, torch.Tensor], rows: list, local: list, states: list) -> None:
        self.parts, self.rows, self.local, self.states = parts, rows, local, states

    def of(self, number: int) -> tuple[list, list]:
        """For `_Step`; puts the generators where they were when the part's features were computed."""
        _set_random_state(self.states[number])
        return [column[number] for column in self.rows], self.local if number == 0 else []


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()

"""DeepSpeed around an objective: its config, the optimiser, the learning rate, and what follows each step."""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import PretrainConfig
from pretrain.objectives.base import Objective


def learning_rate(step: int, *, steps: int, lr: float, warmup: int, schedule: str = "cosine") -> float:
    """The rate of step number `step` (from 0) of `steps`: linear warm-up, then a cosine to 0 (open_clip's) or flat."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "const":
        return lr
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr


def deepspeed_config(config: PretrainConfig, world: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's config dict; `config.deepspeed` is merged over it."""
    ours: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world // config.accumulate,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.grad_clip or 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Ignore"},
        "steps_per_print": None,
    }
    if use_bf16(config, device):
        # Autocast over float32 weights, as open_clip trains; without "safe modules" gradients are reduced in float32.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merge(ours, config.deepspeed)


def use_bf16(config: PretrainConfig, device: torch.device) -> bool:
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


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
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if get_accelerator().device_name() != device.type:  # an earlier training in this process ran on another device
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        set_accelerator(CPU_Accelerator() if device.type == "cpu" else CUDA_Accelerator())
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles its shared-memory all-reduce for half a minute, for inference only: training
        # goes through gloo. This is DeepSpeed's own table of extensions that may be built.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


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
        objective.to(device)
        decayed: list[torch.nn.Parameter] = []
        spared: list[torch.nn.Parameter] = []
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                if parameter.ndim == 0:
                    raise TypeError(f"{name} is a scalar, which DeepSpeed cannot broadcast; give it the shape [1]")
                (decayed if objective.decays(name, parameter) else spared).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": spared, "weight_decay": 0.0},
                {"params": decayed, "weight_decay": config.weight_decay},
            ],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=config.zero_stage == 0,
        )
        self.engine = self.deepspeed.initialize(
            model=objective,
            optimizer=self.optimizer,
            config=deepspeed_config(config, dist.get_world_size(), device),
            dist_init_required=False,
        )[0]
        self.engine.checkpoint_engine = _data_only(self.engine.checkpoint_engine)

    def step(self, parts: list[dict[str, torch.Tensor]], step: int, lr: float, want_norm: bool) -> tuple[dict, float]:
        """One optimiser step over the parts of this process's batch.

        Returns:
            (loss parts averaged over `parts`, global gradient norm before clipping or NaN if not wanted).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, torch.Tensor] = {}
        for part in parts:
            losses = self.engine(part)
            self.engine.backward(losses.total)
            for name, value in losses.parts.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(parts)
            if part is parts[-1]:
                norm = self._gradient_norm() if want_norm and not self.config.zero_stage else math.nan
            self.engine.step()
        if want_norm and self.config.zero_stage:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        self._after_step(step + 1)
        return sums, norm

    def _gradient_norm(self) -> float:
        grads = [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    @torch.no_grad()
    def _after_step(self, step: int) -> None:
        if not self.config.zero_stage:
            self.objective.after_step(step)
            return
        # ZeRO steps its own float32 copies of the parameters; what is changed here must reach them.
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        adjusted = [self.objective.get_parameter(name) for name in self.objective.adjusts]
        with self.whole(adjusted):
            self.objective.after_step(step)
            values = [parameter.detach().clone() for parameter in adjusted]
        for parameter, value in zip(adjusted, values, strict=True):
            if not torch.equal(safe_get_full_fp32_param(parameter), value):
                safe_set_full_fp32_param(parameter, value)

    def whole(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
        """Within it the parameters are whole on every process (ZeRO-3 keeps them in parts)."""
        if self.config.zero_stage < 3:
            return contextlib.nullcontext()
        manager: contextlib.AbstractContextManager = self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
        return manager

    def figures(self) -> dict[str, float]:
        with torch.no_grad(), self.whole([self.objective.get_parameter(name) for name in self.objective.adjusts]):
            return {name: float(value) for name, value in self.objective.figures().items()}

    def save(self, folder: str, tag: str, state: dict[str, Any]) -> None:
        """Write DeepSpeed's checkpoint to `folder/tag`; all processes call it."""
        self.engine.save_checkpoint(folder, tag=tag, client_state=state, save_latest=False)

    def load(self, folder: str, tag: str) -> dict[str, Any]:
        """Read one back; returns what `save` was given beside it."""
        path, state = self.engine.load_checkpoint(folder, tag=tag)
        if path is None:
            raise RuntimeError(f"{folder}/{tag}: DeepSpeed found no checkpoint")
        return dict(state)

    def close(self) -> None:
        self.engine.destroy()


def _data_only(checkpoint_engine: Any) -> Any:
    """DeepSpeed's checkpoint engine with `torch.load(weights_only=True)`: a checkpoint is data and executes nothing.

    Enumerations are saved as their numbers, which they equal: Python 3.11 before 3.11.4 pickles them as calls of
    `getattr`, which no reader of mere data allows.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    if type(checkpoint_engine) is not TorchCheckpointEngine:
        return checkpoint_engine

    write = checkpoint_engine.save

    def save(state_dict: Any, path: str) -> Any:
        return write(_plain(state_dict), path)

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    checkpoint_engine.save, checkpoint_engine.load = save, load
    return checkpoint_engine


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _plain(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value.value if isinstance(value, enum.Enum) else value

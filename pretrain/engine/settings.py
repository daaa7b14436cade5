"""DeepSpeed's config, derived from a training's."""

from __future__ import annotations

from typing import Any

import torch

from winnow.pretrain.config import PretrainConfig
from winnow.pretrain.sections import OptimizerConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed_config(
    config: PretrainConfig, optimizer: OptimizerConfig, world: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's config dict for one player's optimizer; `config.parallel.deepspeed` is merged over it."""
    parallel = config.parallel
    ours: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world // parallel.parts,
        "gradient_accumulation_steps": parallel.parts,
        "gradient_clipping": optimizer.grad_clip or 0.0,
        "zero_optimization": {"stage": parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if parallel.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if (dtype := half_type(config, device)) is not None:
        # Autocast over float32 weights, as open_clip trains; without "safe modules" gradients are reduced in float32.
        name = str(dtype).removeprefix("torch.")
        ours["torch_autocast"] = {"enabled": True, "dtype": name, "lower_precision_safe_modules": []}
    return _merge(ours, parallel.deepspeed)


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

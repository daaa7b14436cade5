"""Settings of a training that cannot work together, refused with the reason before torch is imported."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.pretrain.config import PretrainConfig

# What DeepSpeed's config has of its own for settings that have a name here.
_OURS = {
    "optimizer": "optimizer",
    "scheduler": "schedule, lr and warmup",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "activation_checkpointing": "activation_checkpointing",
}


def check_engine(config: PretrainConfig) -> None:
    """Raises ValueError: the combination, and why it cannot work."""
    _batch(config)
    stage = config.zero_stage
    if stage == 3 and config.ema is not None:
        raise ValueError(
            "ema is a mean of whole weights, and zero_stage 3 leaves each process only a part of them; take zero_stage "
            "2 or lower"
        )
    if stage == 3 and config.grad_cache > 1:
        raise ValueError(
            "grad_cache computes features and loss apart, and zero_stage 3 has the weights whole only within one "
            "forward pass; take zero_stage 2 or lower"
        )
    if stage and config.optimizer == "lars":
        raise ValueError(
            "lars scales the step of each layer by its norm, and ZeRO cuts the layers into flat partitions; take "
            "zero_stage 0, or adamw or sgd"
        )
    if config.offload and not stage:
        raise ValueError("offload moves ZeRO's optimiser partitions to the CPU; take zero_stage 1, 2 or 3")
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is not installed; pip install wandb, or leave the key out")
    _deepspeed(config)


def _batch(config: PretrainConfig) -> None:
    if config.accumulate > 1 and config.grad_cache > 1:
        raise ValueError(
            "accumulate and grad_cache both cut the batch: grad_cache is for losses that couple samples, accumulate "
            "for the others; take one"
        )
    parts = config.accumulate * config.grad_cache
    if config.batch_size % (config.workers * parts):
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared evenly by {config.workers} workers"
            + (f" in {parts} parts" if parts > 1 else "")
        )


def _deepspeed(config: PretrainConfig) -> None:
    """What `deepspeed:` says must agree with what the other keys say."""
    for key, ours in _OURS.items():
        if key in config.deepspeed:
            raise ValueError(f"deepspeed: {key} is set by {ours} of this config")
    parts = config.accumulate * config.grad_cache
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError("deepspeed: zero_optimization must be a mapping")
    derived: dict[str, tuple[Any, Any, str]] = {
        "train_batch_size": (config.deepspeed.get("train_batch_size"), config.batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (
            config.deepspeed.get("train_micro_batch_size_per_gpu"),
            config.batch_size // config.workers // parts,
            "batch_size / workers / accumulate",
        ),
        "gradient_accumulation_steps": (
            config.deepspeed.get("gradient_accumulation_steps"),
            parts,
            "accumulate, or grad_cache",
        ),
        "zero_optimization.stage": (zero.get("stage"), config.zero_stage, "zero_stage"),
    }
    for key, (given, value, ours) in derived.items():
        if given is not None and given != value:
            raise ValueError(f"deepspeed: {key} {given} contradicts {ours}, which is {value}; change that instead")
    if "offload_optimizer" in zero and not config.offload:
        raise ValueError("deepspeed: zero_optimization.offload_optimizer needs `offload: true` of this config")

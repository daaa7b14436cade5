"""Settings that cannot work together, each refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from winnow.infra.params import InvalidValue
from winnow.pretrain.sections import ModelConfig, OptimizerConfig, ParallelConfig

# Keys of DeepSpeed's config that this configuration sets itself.
_OURS = {
    "optimizer": "optimizer",
    "scheduler": "schedule, lr and warmup_steps",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "activation_checkpointing": "parallel.activation_checkpointing",
}
_TWO_SPLITS = (
    "accumulation_steps and grad_cache both split the batch: grad_cache is for losses that couple samples, "
    "accumulation_steps for the others; take one"
)
_EMA = (
    "ema is a mean of whole weights, and zero_stage 3 leaves each process only a part of them; take zero_stage 2 or "
    "lower"
)
_CACHE = (
    "grad_cache computes features and loss apart, and zero_stage 3 has the weights whole only within one forward pass; "
    "take zero_stage 2 or lower"
)
_LARS = (
    "lars scales the step of each layer by its norm, and ZeRO cuts the layers into flat partitions; take zero_stage 0, "
    "or adamw or sgd"
)
_OFFLOAD = "offload moves ZeRO's optimizer partitions to the CPU; take zero_stage 1, 2 or 3"
_NETWORKS = {"encoder": "an encoder of open_clip or timm", "unet": "a unet", "autoencoder": "an autoencoder"}


_Rule = tuple[bool, str, tuple[str, ...]]  # whether it is broken, why it is one, and the path to the key


def _refuse(rules: Iterable[_Rule]) -> None:
    for broken, why, path in rules:
        if broken:
            raise InvalidValue(why, *path)


def check_engine(parallel: ParallelConfig, optimizer: OptimizerConfig, batch_size: int) -> None:
    """Check the settings of the engine. Imports no torch.

    Raises:
        InvalidValue: the combination, and why it cannot work; with the path to the key.
    """
    stage, parts = parallel.zero_stage, parallel.parts
    both = parallel.accumulation_steps > 1 and parallel.grad_cache > 1
    uneven = f"batch_size {batch_size} cannot be divided evenly among {parallel.num_processes} processes"
    rules: tuple[_Rule, ...] = (
        (both, _TWO_SPLITS, ("parallel", "accumulation_steps")),
        (
            batch_size % (parallel.num_processes * parts) > 0,
            uneven + (f" in {parts} parts" if parts > 1 else ""),
            ("batch_size",),
        ),
        (stage == 3 and optimizer.ema is not None, _EMA, ("optimizer", "ema")),
        (stage == 3 and parallel.grad_cache > 1, _CACHE, ("parallel", "grad_cache")),
        (stage > 0 and optimizer.name == "lars", _LARS, ("optimizer", "name")),
        (parallel.offload and not stage, _OFFLOAD, ("parallel", "offload")),
    )
    _refuse(rules)
    _check_deepspeed(parallel, batch_size)


def _check_deepspeed(parallel: ParallelConfig, batch_size: int) -> None:
    """`deepspeed` must agree with the other keys."""
    given, here = parallel.deepspeed, ("parallel", "deepspeed")
    for key, ours in _OURS.items():
        if key in given:
            raise InvalidValue(f"deepspeed: {key} is set by {ours} of this config", *here, key)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InvalidValue("deepspeed: zero_optimization must be a mapping", *here, "zero_optimization")
    per_process = batch_size // parallel.num_processes // parallel.parts
    derived = {
        "train_batch_size": (batch_size, "batch_size"),
        "train_micro_batch_size_per_gpu": (per_process, "batch_size / num_processes / accumulation_steps"),
        "gradient_accumulation_steps": (parallel.parts, "accumulation_steps, or grad_cache"),
        "zero_optimization.stage": (parallel.zero_stage, "zero_stage"),
    }
    for key, (expected, ours) in derived.items():
        section, _, field = key.rpartition(".")
        value = (zero if section else given).get(field)
        if value is not None and value != expected:
            why = f"deepspeed: {key} {value} contradicts {ours}, which is {expected}; change that instead"
            raise InvalidValue(why, *here, *key.split("."))
    if "offload_optimizer" in zero and not parallel.offload:
        why = "deepspeed: zero_optimization.offload_optimizer needs `offload: true` of this config"
        raise InvalidValue(why, *here, "zero_optimization")


def check_objective(
    name: str, cls: Any, params: Any, model: ModelConfig, parallel: ParallelConfig, batch_size: int
) -> None:
    """Check what an objective can be combined with, from the attributes of its class.

    Args:
        name: of the objective, for messages.
        cls: the class, a subclass of `objectives.base.Objective`.
        params: its `Config`.
        model, parallel, batch_size: of the training.

    Raises:
        InvalidValue: the combination, and why it cannot work; with the path to the key.
    """
    if cls.network != model.network:
        raise InvalidValue(
            f"{name} trains {_NETWORKS[cls.network]}, and the model is {_NETWORKS[model.network]}", "model"
        )
    if cls.needs_text and model.timm is not None:
        raise InvalidValue(
            f"{name} reads captions, and {model.timm} of timm reads images only; give an open_clip model", "model"
        )
    if cls.teacher and parallel.zero_stage == 3:
        raise InvalidValue(
            f"{name} keeps a momentum encoder, the mean of the weights after each step, and zero_stage 3 leaves each "
            "process only a part of the weights; take zero_stage 2 or lower",
            "parallel",
            "zero_stage",
        )
    _check_coupling(name, cls, parallel, batch_size)
    values = {"batch_size": batch_size, "num_processes": parallel.num_processes, **vars(params)}
    for whole, part, why in cls.divisible:
        if values[whole] % values[part]:
            path = ("batch_size",) if whole == "batch_size" else ("objective", name, whole)
            raise InvalidValue(
                f"{name}: {whole} {values[whole]} is not a multiple of {part} {values[part]}; {why}", *path
            )


def _check_coupling(name: str, cls: Any, parallel: ParallelConfig, batch_size: int) -> None:
    if batch_size < 2 and cls.couples_batch:
        raise InvalidValue(
            f"the loss of {name} compares the samples of a batch with each other; batch_size 1 has no others",
            "batch_size",
        )
    cacheable = cls.splits_by_features()
    if parallel.accumulation_steps > 1 and cls.couples_batch:
        raise InvalidValue(
            f"the loss of {name} couples the samples of a batch, so accumulation_steps cannot split it; take "
            + ("grad_cache, which gives the whole batch's gradient" if cacheable else "more processes"),
            "parallel",
            "accumulation_steps",
        )
    if parallel.grad_cache > 1 and not cacheable:
        raise InvalidValue(
            f"{name} has no features apart from its loss, so grad_cache cannot split the batch"
            + ("" if cls.couples_batch else "; accumulation_steps can"),
            "parallel",
            "grad_cache",
        )

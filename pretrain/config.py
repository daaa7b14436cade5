"""How a training goes, as the recipe says it. Checked before torch is imported."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.errors import UsageError
from infra.registry import config_fields, unknown
from pretrain.models import check_config, model_config
from pretrain.objectives import OBJECTIVES

# DataComp's scale_configs.py (Gadre et al. 2023); beta2 where it is not open_clip's own.
SCALES: dict[str, dict[str, Any]] = {
    "small": {"model": "ViT-B-32", "batch_size": 4096, "lr": 5e-4, "warmup": 500, "samples_seen": 12_800_000},
    "medium": {"model": "ViT-B-32", "batch_size": 4096, "lr": 5e-4, "warmup": 500, "samples_seen": 128_000_000},
    "large": {"model": "ViT-B-16", "batch_size": 8192, "lr": 5e-4, "warmup": 500, "samples_seen": 1_280_000_000},
    "xlarge": {
        "model": "ViT-L-14",
        "batch_size": 90112,
        "lr": 1e-3,
        "warmup": 10_000,
        "samples_seen": 12_800_000_000,
        "beta2": 0.95,
    },
}
# Settings that change where and how fast a training runs, not what it computes.
_RUNNING = {
    "scale", "workers", "runs_per_start", "threads", "decoders", "device", "zero_stage", "accumulate", "save_every",
    "keep_checkpoints", "max_failures", "log_every",
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(_Strict):
    """The networks: an open_clip model by `name`, or open_clip's own `config` dict (embed_dim, vision_cfg, text_cfg).

    A plain string stands for the name.
    """

    name: str | None = None
    config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "embed_dim" in value:
            return {"config": value}
        return value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either the name of an open_clip model or a config")
        try:
            self.open_clip_config()
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def open_clip_config(self) -> dict[str, Any]:
        """open_clip's model config dict."""
        return model_config(self.name) if self.name is not None else check_config(self.config)


class PretrainConfig(_Strict):
    """One training.

    Attributes:
        objective: name, or {name: {parameters}}; "module:Class" for one of your own.
        model: the networks.
        scale: DataComp's scale, whose values stand where none is given here.
        samples_seen: how many samples are drawn, fixed whatever the size of the subset (DataComp's rule).
        batch_size: global, over all workers.
        lr, warmup, schedule: peak learning rate, steps of linear warm-up, and what follows.
        weight_decay, beta1, beta2, eps: AdamW; open_clip's values for ViT.
        grad_clip: largest gradient norm.
        precision: bf16 is autocast over float32 weights; auto takes it on a CUDA device that has it.
        augment: share of the picture's area that the random crop takes, from and to; open_clip's.
        zero_stage: DeepSpeed's ZeRO stage.
        accumulate: parts a batch is cut into, for objectives whose loss does not couple the batch.
        workers: processes; GPUs, where there are.
        runs_per_start: trainings that one start of the processes does, one after the other. Starting takes some 20
            seconds, so small trainings on one machine go faster with more; on a cluster 1 lets them run side by side.
        threads: CPU threads a worker computes with.
        decoders: CPU threads a worker decodes pictures with.
        save_every: steps between checkpoints to resume from; None for the last only.
        keep_checkpoints: how many of those are kept.
        max_failures: how often Ray Train starts failed workers again.
        log_every: steps between lines in the log.
        deepspeed: settings of DeepSpeed's own config, merged over ours.
    """

    objective: str | dict[str, dict[str, Any]] = "clip"
    model: ModelConfig
    scale: Literal["small", "medium", "large", "xlarge"] | None = None
    samples_seen: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(default=5e-4, gt=0)
    warmup: int = Field(default=500, ge=0)
    schedule: Literal["cosine", "const"] = "cosine"
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    grad_clip: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    augment: tuple[float, float] = (0.9, 1.0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    accumulate: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=1)
    runs_per_start: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    decoders: int = Field(default=2, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_failures: int = Field(default=1, ge=0)
    log_every: int = Field(default=10, ge=1)
    deepspeed: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("scale") in SCALES:
            return SCALES[value["scale"]] | value
        return value

    @field_validator("objective")
    @classmethod
    def _objective(cls, value: str | dict[str, dict[str, Any]]) -> str | dict[str, dict[str, Any]]:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError("name one objective: {name: {parameters}}")
        name, params = (value, {}) if isinstance(value, str) else next(iter(value.items()))
        try:
            fields = config_fields(OBJECTIVES.path(name))
            for key in params:
                if key not in fields:
                    raise unknown(f"parameter of {name}", key, fields)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if missing := [key for key, has_default in fields.items() if not has_default and key not in params]:
            raise ValueError(f"{name} needs {', '.join(missing)}")
        return value

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared evenly by {self.workers} workers"
                + (f" in {self.accumulate} parts" if self.accumulate > 1 else "")
            )
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup is {self.warmup} steps, the training has {self.steps} "
                f"(samples_seen {self.samples_seen} / batch_size {self.batch_size})"
            )
        low, high = self.augment
        if not 0 < low <= high <= 1:
            raise ValueError(
                "augment is the share of the picture's area a crop takes, from and to: 0 < from <= to <= 1"
            )
        return self

    @property
    def steps(self) -> int:
        return math.ceil(self.samples_seen / self.batch_size)

    @property
    def objective_name(self) -> str:
        return self.objective if isinstance(self.objective, str) else next(iter(self.objective))

    @property
    def objective_params(self) -> dict[str, Any]:
        return {} if isinstance(self.objective, str) else next(iter(self.objective.values()))

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as JSON values: not where the training runs, and by which scale it was named."""
        values = self.model_dump(mode="json", exclude=_RUNNING)
        return values | {
            "objective": {self.objective_name: self.objective_params},
            "model": self.model.open_clip_config(),
        }


def build_params(cls: type, params: dict[str, Any]) -> Any:
    """An objective's `Config` from its parameters. Raises UsageError on a value it refuses."""
    assert dataclasses.is_dataclass(cls)
    try:
        return cls(**params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{cls.__module__}: {error}", where="objective") from error

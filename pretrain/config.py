"""How a training goes, as the recipe says it. Checked before torch is imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.registry import class_constants, config_fields, unknown
from winnow.pretrain.combinations import check_engine
from winnow.pretrain.models.catalog import check_config, check_timm, model_config
from winnow.pretrain.models.diffusers import check_networks
from winnow.pretrain.models.spec import encoder_digest, is_winnow
from winnow.pretrain.objectives import OBJECTIVES

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
    "scale", "sources", "workers", "runs_per_start", "threads", "decoders", "device", "zero_stage", "offload",
    "activation_checkpointing", "accumulate", "grad_cache", "save_every", "keep_checkpoints", "max_failures",
    "log_every", "wandb",
}  # fmt: skip
# Class attributes of an objective that say what it cannot be combined with.
TRAITS = ("couples_batch", "cacheable", "network", "needs_text", "teacher", "divisible")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(_Strict):
    """The networks: an open_clip model by `name`, open_clip's own `config` dict (embed_dim, vision_cfg, text_cfg), a
    timm network that reads images only, or one of diffusers' for the objectives that draw images.

    A plain string stands for the name.

    Attributes:
        timm: name of a ResNet or ViT of timm.
        size: side of the images that the timm network takes, pixels.
        stem: of a timm ResNet; cifar, for small images, is a 3x3 convolution of stride 1 and no max-pool.
        kwargs: arguments of timm's class.
        unet: arguments of diffusers' UNet2DModel, or with `text` UNet2DConditionModel; sample_size must be among them.
        text: arguments of open_clip's TextTransformer, which makes captions the U-Net's condition.
        autoencoder: arguments of diffusers' AutoencoderKL; sample_size must be among them.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    timm: str | None = None
    size: int = Field(default=224, ge=1)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    kwargs: dict[str, Any] = {}
    unet: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    autoencoder: dict[str, Any] | None = None

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
        kinds = (self.name, self.config, self.timm, self.unet, self.autoencoder)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give one of the name of an open_clip model, a config, timm, unet and autoencoder")
        if self.text is not None and self.unet is None:
            raise ValueError("text goes with a unet, whose condition it makes")
        fields = type(self).model_fields
        given = {key for key in ("size", "stem", "kwargs") if getattr(self, key) != fields[key].default}
        if self.timm is None and (extra := given):
            raise ValueError(f"{', '.join(sorted(extra))} can be set for a timm network only")
        try:
            self.resolved()
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    def resolved(self) -> dict[str, Any]:
        """open_clip's model config dict, or that of another network as `check_timm` or `check_networks` gives it."""
        if self.network != "encoder":
            given = {"unet": self.unet, "text": self.text, "autoencoder": self.autoencoder}
            return check_networks({key: value for key, value in given.items() if value is not None})
        if self.timm is not None:
            return check_timm(self.timm, self.size, self.stem, self.kwargs)
        return model_config(self.name) if self.name is not None else check_config(self.config)

    @property
    def network(self) -> str:
        """encoder, unet or autoencoder."""
        return "unet" if self.unet is not None else "autoencoder" if self.autoencoder is not None else "encoder"


class SourceConfig(_Strict):
    """Samples to draw beside those a training is started on.

    Attributes:
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy; None for the whole pool.
        weight: how often each of its samples is drawn an epoch, against once for the training's own samples. With 0.5
            an epoch has half of them, the next epoch the others.
    """

    pool: str
    subset: str | None = None
    weight: float = Field(default=1.0, gt=0)


class PretrainConfig(_Strict):
    """One training.

    Attributes:
        objective: name, or {name: {parameters}}; "module:Class" for one of your own.
        model: the networks.
        scale: DataComp's scale, whose values stand where none is given here.
        samples_seen: how many samples are drawn, fixed whatever the size of the subset (DataComp's rule).
        batch_size: global, over all workers.
        lr, warmup, schedule: peak learning rate, steps of linear warm-up, and what follows.
        sources: further pools to draw from.
        optimizer: adamw, sgd, or lars (You et al. 2017, as SimCLR trains with).
        weight_decay, beta1, beta2, eps: AdamW; open_clip's values for ViT.
        momentum: of sgd and lars.
        grad_clip: largest gradient norm.
        ema: decay of a running mean of the trained weights, taken after each step; it is what is exported.
        precision: bf16 and fp16 are autocast over float32 weights, fp16 with dynamic loss scaling; auto takes bf16 on a
            CUDA device that has it, else fp32.
        augment: share of the image's area that the random crop takes, from and to; None for the objective's own.
        zero_stage: DeepSpeed's ZeRO stage.
        offload: the optimiser's state and step on the CPU (ZeRO-Offload).
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        accumulate: parts a batch is cut into, for objectives whose loss does not couple the batch.
        grad_cache: parts a batch is cut into, for objectives whose loss does (Gao et al. 2021, "Scaling Deep
            Contrastive Learning Batch Size under Memory Limited Setup"): features of all parts, the loss, and the
            features again part by part for the gradient, which is that of the whole batch.
        workers: processes; GPUs, where there are.
        runs_per_start: trainings that one start of the processes does, one after the other. Starting takes some 20
            seconds, so small trainings on one machine go faster with more; on a cluster 1 lets them run side by side.
        threads: CPU threads a worker computes with.
        decoders: processes a worker decodes images with, through shared memory; 0 for none but its own.
        save_every: steps between checkpoints to resume from; None for the last only.
        keep_checkpoints: how many of those are kept.
        max_failures: how often Ray Train starts failed workers again.
        log_every: steps between lines in the log.
        wandb: project of Weights & Biases to report to as well.
        deepspeed: settings of DeepSpeed's own config, merged over those derived from this.
    """

    objective: str | dict[str, dict[str, Any]] = "clip"
    model: ModelConfig
    scale: Literal["small", "medium", "large", "xlarge"] | None = None
    sources: tuple[SourceConfig, ...] = ()
    samples_seen: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(default=5e-4, gt=0)
    warmup: int = Field(default=500, ge=0)
    schedule: Literal["cosine", "const"] = "cosine"
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    grad_clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    augment: tuple[float, float] | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    activation_checkpointing: bool = False
    accumulate: int = Field(default=1, ge=1)
    grad_cache: int = Field(default=1, ge=1)
    workers: int = Field(default=1, ge=1)
    runs_per_start: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    decoders: int = Field(default=2, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    max_failures: int = Field(default=1, ge=0)
    log_every: int = Field(default=10, ge=1)
    wandb: str | None = None
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
        for key in set(params) & set(class_constants(OBJECTIVES.path(name)).get("checkpoints", ())):
            if params[key] is not None:
                if not isinstance(params[key], str) or not is_winnow(params[key]):
                    raise ValueError(f"{name}: {key} {params[key]} is no folder of a checkpoint")
                params = params | {key: storage.absolute(params[key])}
        return {name: params} if params else value

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        check_engine(self)
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup is {self.warmup} steps, the training has {self.steps} "
                f"(samples_seen {self.samples_seen} / batch_size {self.batch_size})"
            )
        if self.augment is not None and not 0 < self.augment[0] <= self.augment[1] <= 1:
            raise ValueError("augment is the share of the image's area a crop takes, from and to: 0 < from <= to <= 1")
        module = OBJECTIVES.path(self.objective_name).partition(":")[0]
        traits = class_constants(OBJECTIVES.path(self.objective_name))
        check_traits(self, traits, class_constants(f"{module}:Config") | self.objective_params)
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

    @property
    def reads_text(self) -> bool:
        """Whether captions are looked at. What an objective of one's own inherits is not known, and taken for yes."""
        traits = class_constants(OBJECTIVES.path(self.objective_name))
        if self.model.network != "encoder":
            return self.model.text is not None
        return bool(traits.get("needs_text", self.objective_name not in OBJECTIVES.table and self.model.timm is None))

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as JSON values: not where the training runs, and by which scale it was named."""
        values = self.model_dump(mode="json", exclude=_RUNNING)
        params = dict(self.objective_params)
        for key in set(params) & set(class_constants(OBJECTIVES.path(self.objective_name)).get("checkpoints", ())):
            params[key] = params[key] and encoder_digest(params[key])
        return values | {
            "objective": {self.objective_name: params},
            "model": self.model.resolved(),
        }


def check_traits(config: PretrainConfig, traits: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Refuse what an objective cannot do.

    Args:
        config: the training's.
        traits: the objective's class attributes by name, see `objectives.base.Objective`.
        params: values of its `Config`.

    Raises:
        ValueError: the combination, and why it cannot work.
    """
    name = config.objective_name
    # What a class of one's own inherits is known only once it is imported.
    wanted = traits.get("network", "encoder" if name in OBJECTIVES.table else config.model.network)
    if wanted != config.model.network:
        network = {"encoder": "an encoder of open_clip or timm", "unet": "a unet", "autoencoder": "an autoencoder"}
        raise ValueError(f"{name} trains {network[wanted]}, and the model is {network[config.model.network]}")
    if traits.get("needs_text") and config.model.timm is not None:
        raise ValueError(
            f"{name} reads captions, and {config.model.timm} of timm reads images only; give an open_clip model"
        )
    if traits.get("teacher") and config.zero_stage == 3:
        raise ValueError(
            f"{name} keeps a momentum encoder, the mean of the weights after each step, and zero_stage 3 leaves each "
            "process only a part of the weights; take zero_stage 2 or lower"
        )
    if config.batch_size < 2 and traits.get("couples_batch"):
        raise ValueError(
            f"the loss of {name} sets the samples of a batch against each other; batch_size 1 has no others"
        )
    if config.accumulate > 1 and traits.get("couples_batch"):
        raise ValueError(
            f"the loss of {name} couples the samples of a batch, so accumulate cannot cut it in parts; take "
            + ("grad_cache, which gives the whole batch's gradient" if traits.get("cacheable") else "more workers")
        )
    if config.grad_cache > 1 and traits.get("cacheable", name not in OBJECTIVES.table) is False:
        raise ValueError(
            f"{name} has no features apart from its loss, so grad_cache cannot cut the batch"
            + ("" if traits.get("couples_batch") else "; accumulate can")
        )
    values = {"batch_size": config.batch_size, "workers": config.workers, **params}
    for whole, part, why in traits.get("divisible", ()):
        # What is no number at all is for the `Config` to refuse.
        numbers = all(isinstance(values[key], int) and values[key] > 0 for key in (whole, part))
        if numbers and values[whole] % values[part]:
            raise ValueError(f"{name}: {whole} {values[whole]} is not a multiple of {part} {values[part]}; {why}")


def build_params(cls: type, params: dict[str, Any]) -> Any:
    """An objective's `Config` from its parameters. Raises UsageError on a value it refuses."""
    assert dataclasses.is_dataclass(cls)
    try:
        return cls(**params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{cls.__module__}: {error}", where="objective") from error

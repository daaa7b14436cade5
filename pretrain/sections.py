"""The sections of a training's configuration. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from winnow.infra.errors import UsageError
from winnow.infra.params import ParameterError, Section, lists

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """The networks: an open_clip model by `name`, open_clip's own `config` dict (embed_dim, vision_cfg, text_cfg), a
    timm network that reads images only, or one of diffusers' networks for generative objectives.

    A plain string is taken as the name.

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
    size: Positive = 224
    stem: Literal["imagenet", "cifar"] = "imagenet"
    kwargs: dict[str, Any] = Field(default={})
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
            raise ValueError("text needs a unet, whose condition it makes")
        fields = type(self).model_fields
        timm_only = [key for key in ("size", "stem", "kwargs") if getattr(self, key) != fields[key].default]
        if self.timm is None and timm_only:
            raise ValueError(f"{', '.join(sorted(timm_only))} can be set for a timm network only")
        return self

    def resolved(self) -> dict[str, Any]:
        """The networks as JSON values: open_clip's model config dict, or what `check_timm` or `check_networks` returns.

        Imports the library of the network.

        Raises:
            ParameterError: the library has no such model or argument; with the path to the key.
        """
        from winnow.pretrain.models import diffusers, open_clip, timm

        try:
            if self.network != "encoder":
                given = {"unet": self.unet, "text": self.text, "autoencoder": self.autoencoder}
                result = diffusers.check_networks({key: value for key, value in given.items() if value is not None})
            elif self.timm is not None:
                result = timm.check_timm(self.timm, self.size, self.stem, self.kwargs)
            else:
                result = open_clip.model_config(self.name) if self.name else open_clip.check_config(self.config)
        except UsageError as error:
            raise ParameterError(error.what, do=error.do) from None
        values: dict[str, Any] = lists(result)
        return values

    @property
    def network(self) -> str:
        """encoder, unet or autoencoder."""
        return "unet" if self.unet is not None else "autoencoder" if self.autoencoder is not None else "encoder"


class SourceConfig(Section):
    """Samples to draw in addition to those a training is started on.

    Attributes:
        pool: URL of an indexed pool.
        subset: URL of a subset's .npy; None for the whole pool.
        weight: how often each of its samples is drawn per epoch; the training's own samples are drawn once. With 0.5 an
            epoch has one half of them, and the next epoch the other half.
    """

    pool: str
    subset: str | None = None
    weight: float = Field(default=1.0, gt=0)


class OptimizerConfig(Section):
    """The optimizer. The defaults are open_clip's for ViT.

    Attributes:
        name: adamw, sgd, or lars (You et al. 2017, with which SimCLR trains).
        weight_decay, beta1, beta2, eps: of AdamW; SGD and LARS take `weight_decay` as well.
        momentum: of SGD and LARS.
        grad_clip: largest gradient norm; None does not clip.
        ema: decay of an exponential moving average of the trained weights, updated after each step. The average is what
            is exported.
    """

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: float = Field(default=1e-6, gt=0)
    momentum: Fraction = 0.9
    grad_clip: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)


class ParallelConfig(Section):
    """Where a training runs, and how its memory and work are split. Nothing here but `deepspeed` changes the result.

    Attributes:
        num_processes: training processes; one per GPU.
        num_workers: processes per training process that decode images, through shared memory; with 0 the training
            process decodes.
        threads: CPU threads a training process computes with.
        device: auto takes CUDA where there is a GPU for each process.
        zero_stage: DeepSpeed's ZeRO stage.
        offload: keep the optimizer's state on the CPU and step there (ZeRO-Offload).
        activation_checkpointing: recompute activations in the backward pass instead of keeping them.
        accumulation_steps: parts a batch is split into, for objectives whose loss does not couple the batch.
        grad_cache: parts a batch is split into, for objectives whose loss does (Gao et al. 2021, "Scaling Deep
            Contrastive Learning Batch Size under Memory Limited Setup"): the features of all parts, the loss, and the
            features again part by part for the gradient, which is that of the whole batch.
        runs_per_launch: trainings that run in the same processes, one after the other. Starting the processes takes
            some 20 seconds, so small trainings on one machine go faster with more; on a cluster 1 lets trainings run
            side by side.
        max_failures: how often Ray Train restarts failed processes.
        deepspeed: settings of DeepSpeed's own config, merged over those derived from this one.
    """

    num_processes: Positive = 1
    num_workers: int = Field(default=2, ge=0)
    threads: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    activation_checkpointing: bool = False
    accumulation_steps: Positive = 1
    grad_cache: Positive = 1
    runs_per_launch: Positive = 1
    max_failures: int = Field(default=1, ge=0)
    deepspeed: dict[str, Any] = Field(default={})

    @property
    def parts(self) -> int:
        """Parts that a process splits its share of the batch into."""
        return self.accumulation_steps * self.grad_cache


class CheckpointConfig(Section):
    """Checkpoints to resume from. When they are written changes nothing in the result.

    Attributes:
        save_every: steps between them; None for none by the number of steps.
        save_minutes: minutes of wall time after which one is written, if none has been; None for none by the clock.
        keep: how many are kept.
    """

    save_every: Positive | None = None
    save_minutes: float | None = Field(default=5.0, gt=0)
    keep: Positive = 2


class LoggingConfig(Section):
    """Attributes:
    every: steps between lines in the log.
    wandb: project of Weights & Biases to report to as well.
    """

    every: Positive = 10
    wandb: str | None = None


# DataComp's scale_configs.py (Gadre et al. 2023); beta2 where it is not open_clip's own.
SCALES: dict[str, dict[str, Any]] = {
    name: dict(zip(("model", "batch_size", "lr", "warmup_steps", "samples_seen"), values, strict=True))
    for name, values in {
        "small": ("ViT-B-32", 4096, 5e-4, 500, 12_800_000),
        "medium": ("ViT-B-32", 4096, 5e-4, 500, 128_000_000),
        "large": ("ViT-B-16", 8192, 5e-4, 500, 1_280_000_000),
        "xlarge": ("ViT-L-14", 90112, 1e-3, 10_000, 12_800_000_000),
    }.items()
}
SCALES["xlarge"]["optimizer"] = {"beta2": 0.95}
# Keys of before the sections, each with its new name.
RENAMED: Mapping[str, str] = {
    "warmup": "warmup_steps",
    "workers": "parallel.num_processes",
    "decoders": "parallel.num_workers",
    "accumulate": "parallel.accumulation_steps",
    "runs_per_start": "parallel.runs_per_launch",
    "save_every": "checkpoint.save_every",
    "keep_checkpoints": "checkpoint.keep",
    "log_every": "logging.every",
    "wandb": "logging.wandb",
} | {
    name: f"{section}.{name}"
    for section, kind in (("optimizer", OptimizerConfig), ("parallel", ParallelConfig))
    for name in kind.model_fields
    if name not in ("name", "num_processes", "num_workers", "accumulation_steps", "runs_per_launch")
}

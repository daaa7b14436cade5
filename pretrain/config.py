"""How a training runs, as a recipe says it.

`PretrainConfig` itself is checked without importing torch. `PretrainConfig.check` imports the objective and the
library of its network, and checks their parameters and names.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.params import InvalidValue, ParameterError, Section, build, lists, tuples
from winnow.pretrain.combinations import check_engine, check_objective
from winnow.pretrain.models.spec import absolute, encoder_digest, is_winnow, parse_spec
from winnow.pretrain.objectives import OBJECTIVES
from winnow.pretrain.sections import (
    RENAMED,
    SCALES,
    CheckpointConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    SourceConfig,
)


class PretrainConfig(Section):
    """One training, or with several seeds as many.

    Attributes:
        objective: name, or {name: {parameters}}; "module:Class" for a custom one.
        model: the networks.
        scale: DataComp's scale, which provides defaults.
        samples_seen: how many samples are drawn, whatever the size of the subset (DataComp's rule).
        batch_size: global, over all processes.
        lr, warmup_steps, schedule: peak learning rate, steps of linear warm-up, and what follows.
        precision: bf16 and fp16 are autocast over float32 weights, fp16 with dynamic loss scaling; auto takes bf16 on a
            CUDA device that has it, else fp32.
        seeds: of initialisation, order and augmentation; one training each.
        init: what the networks start from: a checkpoint folder, or any other encoder spec; None for random weights.
        sources: further pools to draw from.
        augment: fraction of the image's area that the random crop takes, from and to; None for the objective's own.
    """

    renamed: ClassVar[Mapping[str, str]] = RENAMED

    objective: str | dict[str, dict[str, Any]] = "clip"
    model: ModelConfig
    scale: Literal["small", "medium", "large", "xlarge"] | None = None
    samples_seen: Positive
    batch_size: Positive
    lr: float = Field(default=5e-4, gt=0)
    warmup_steps: int = Field(default=500, ge=0)
    schedule: Literal["cosine", "const"] = "cosine"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    init: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    augment: tuple[float, float] | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_scale(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = tuples(value)
        defaults = SCALES.get(str(value.get("scale")), {})
        over = {**defaults, **value}
        if isinstance(value.get("optimizer"), Mapping) and "optimizer" in defaults:
            over["optimizer"] = {**defaults["optimizer"], **value["optimizer"]}
        return over

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_is_a_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"`optimizer: {value}` is now `optimizer: {{name: {value}}}`")
        return value

    @field_validator("objective")
    @classmethod
    def _one_objective(cls, value: str | dict[str, dict[str, Any]]) -> str | dict[str, dict[str, Any]]:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError("name one objective: {name: {parameters}}")
        name, params = (value, {}) if isinstance(value, str) else next(iter(value.items()))
        try:
            OBJECTIVES.path(name)
        except UsageError as error:
            raise InvalidValue(error.what, do=error.do) from None
        return {name: params} if params else name

    @model_validator(mode="after")
    def _combinations(self) -> PretrainConfig:
        check_engine(self.parallel, self.optimizer, self.batch_size)
        if self.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise InvalidValue("wandb is not installed; pip install wandb, or leave the key out", "logging", "wandb")
        if self.warmup_steps >= self.steps:
            why = (
                f"the training has {self.steps} steps (samples_seen {self.samples_seen} / batch_size {self.batch_size})"
            )
            raise InvalidValue(f"warmup_steps is {self.warmup_steps}, {why}", "warmup_steps")
        if self.augment is not None and not 0 < self.augment[0] <= self.augment[1] <= 1:
            why = "augment is the fraction of the image's area that a crop takes, from and to: 0 < from <= to <= 1"
            raise InvalidValue(why, "augment")
        return self

    def check(self) -> PretrainConfig:
        """Check what only the objective's class and the network's library know; imports them, and so torch.

        Returns:
            The config itself.

        Raises:
            ParameterError: with the path to the wrong value.
        """
        self.params  # noqa: B018 (built and kept)
        try:
            self.model.resolved()
        except ParameterError as error:
            raise error.below("model") from None
        try:
            check_objective(
                self.objective_name, self.objective_class, self.params, self.model, self.parallel, self.batch_size
            )
            for key in self.objective_class.checkpoints:
                if (url := getattr(self.params, key)) is not None and not is_winnow(url):
                    name = self.objective_name
                    raise InvalidValue(f"{name}: {key} {url} is not a checkpoint folder", "objective", name, key)
            if self.init is not None:
                parse_spec(self.init)
        except InvalidValue as error:
            refused = ParameterError(error.what, do=error.do)
            raise refused.below(*error.path) from None
        except UsageError as error:
            raise ParameterError(f"init: {error.what}", do=error.do).below("init") from None
        return self

    @cached_property
    def objective_class(self) -> Any:
        """The class of the objective; imports it. Raises ParameterError when it cannot be imported."""
        try:
            return OBJECTIVES.load(self.objective_name)
        except UsageError as error:
            raise ParameterError(error.what, do=error.do).below("objective") from None

    @cached_property
    def params(self) -> Any:
        """The objective's `Config`. Raises ParameterError with the path to a wrong parameter."""
        try:
            return build(self.objective_class.Config, self.objective_params, self.objective_name)
        except ParameterError as error:
            inside = self.objective_name in self.objective if isinstance(self.objective, dict) else False
            raise error.below("objective", *([self.objective_name] if inside else [])) from None

    def __getstate__(self) -> dict[Any, Any]:
        """Without the objective, which another process imports itself."""
        state = super().__getstate__()
        fields = type(self).model_fields
        return state | {"__dict__": {name: value for name, value in state["__dict__"].items() if name in fields}}

    @property
    def steps(self) -> int:
        return math.ceil(self.samples_seen / self.batch_size)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after step number `step` (from 1); the last step's is written anyway."""
        every = self.checkpoint.save_every
        return every is not None and step % every == 0 and step < self.steps

    @property
    def objective_name(self) -> str:
        return self.objective if isinstance(self.objective, str) else next(iter(self.objective))

    @property
    def objective_params(self) -> dict[str, Any]:
        return {} if isinstance(self.objective, str) else next(iter(self.objective.values()))

    @property
    def reads_text(self) -> bool:
        """Whether captions are read. Imports the objective."""
        if self.model.network != "encoder":
            return self.model.text is not None
        return bool(self.objective_class.needs_text)

    @property
    def measures(self) -> list[str]:
        """Names of the measures whose columns the objective reads. Imports the objective."""
        return sorted({name.partition(".")[0] for name in self.objective_class.columns if "." in name})

    def absolute(self) -> PretrainConfig:
        """The config with absolute paths, for processes that run in another directory."""
        params = dict(self.objective_params)
        for key in set(params) & set(self.objective_class.checkpoints):
            params[key] = params[key] and storage.absolute(params[key])
        sources = tuple(
            source.model_copy(
                update={
                    "pool": storage.absolute(source.pool),
                    "subset": source.subset and storage.absolute(source.subset),
                }
            )
            for source in self.sources
        )
        changes = {
            "objective": {self.objective_name: params} if params else self.objective,
            "sources": sources,
            "init": self.init and absolute(self.init),
        }
        copy = self.model_copy(update=changes)
        if params:
            copy.__dict__.pop("params", None)  # with the relative paths
        return copy

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as JSON values: not where the training runs, nor the scale's name, nor the seeds.

        The keys are those of version 1 of the pretrain stage, so that its content keys stay valid.
        """
        params = dict(self.objective_params)
        for key in set(params) & set(self.objective_class.checkpoints):
            params[key] = params[key] and encoder_digest(params[key])
        optimizer = self.optimizer.model_dump()
        values = {
            "objective": {self.objective_name: params},
            "model": self.model.resolved(),
            **{name: getattr(self, name) for name in ("samples_seen", "batch_size", "lr", "schedule", "precision")},
            "warmup": self.warmup_steps,
            "augment": self.augment,
            "optimizer": optimizer.pop("name"),
            **optimizer,
            "deepspeed": self.parallel.deepspeed,
        }
        if self.init is not None:
            values["init"] = encoder_digest(self.init)
        result: dict[str, Any] = lists(values)
        return result

"""The sections of a recipe as types. What a section alone can be wrong in is refused here; the rest in `check`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from winnow.curation.algebra.nodes import All, Node
from winnow.curation.columns.table import measure_of
from winnow.curation.filters.base import Filter
from winnow.curation.measures.base import MeasureSpec, with_upstream
from winnow.curation.noise.inject import InjectConfig
from winnow.evaluate.protocols import PROTOCOLS
from winnow.infra.errors import UsageError
from winnow.infra.params import InvalidValue, Section
from winnow.pipeline.demo.stage import DemoConfig
from winnow.pretrain.config import PretrainConfig

DEMO = "demo:"


def several(value: Any) -> Any:
    """The words of a key that takes one or several."""
    return (value,) if isinstance(value, str) else value


def is_task_file(word: str) -> bool:
    """Whether an entry of `evaluate.tasks` names a file rather than a task."""
    return word.endswith((".yaml", ".yml"))


def _measures_of(columns: Iterable[str]) -> list[str]:
    return [name for column in columns if (name := measure_of(column))]


class Trusted(Section):
    """Pairs known to be good, to train the scorer on: shards held out of the pool, or another pool."""

    shards: tuple[str, ...] = ()
    pool: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Trusted:
        if bool(self.shards) == bool(self.pool):
            raise ValueError("trusted takes either shards (of the pool, held out of it) or a pool")
        return self


class Scorer(Section):
    """What gives `clip.score` and the embeddings: a pretrained open_clip model, a checkpoint, or one trained here.

    `{model: ViT-B-32, pretrained: openai}`; `{checkpoint: PATH}` or just the path; `{trusted: …, train: …}` trains a
    filtering network first (Fang et al. 2023, "Data Filtering Networks").
    """

    model: str | None = None
    pretrained: str | None = None
    checkpoint: str | None = None
    trusted: Trusted | None = None
    train: PretrainConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Scorer:
        ways = [self.model is not None, self.checkpoint is not None, self.train is not None]
        if sum(ways) != 1:
            raise ValueError("scorer takes one of: model with pretrained; checkpoint; trusted with train")
        if (self.pretrained is None) == (self.model is not None):
            raise ValueError("scorer: model and pretrained go together")
        if (self.trusted is None) == (self.train is not None):
            raise ValueError("scorer: trusted and train go together")
        return self

    @property
    def spec(self) -> str:
        """For `load_encoder`; only for a scorer that is not trained here."""
        return self.checkpoint if self.checkpoint is not None else f"{self.model}:{self.pretrained}"


class EvaluateSection(Section):
    """What the checkpoints are scored on."""

    data: str
    tasks: str | tuple[str, ...] = "all"
    protocols: tuple[str, ...] = Field(("zeroshot",), min_length=1)
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("protocols")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for i, name in enumerate(value):
            try:
                PROTOCOLS.path(name)
            except UsageError as error:
                raise InvalidValue(error.what, i, do=error.do) from None
        return value


class ReshardSection(Section):
    """Shards of the subsets."""

    samples_per_shard: Annotated[int, Field(ge=1)] = 10_000


class Recipe(Section):
    """An experiment. A recipe file gives at least `pool` and `subsets`; a single command needs only its own sections.

    The trees of `subsets` are parsed already, as is everything else: nothing behind this class reads YAML.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    renamed = {"max_set_aside": "max_skipped"}  # noqa: RUF012

    pool: Annotated[tuple[str, ...], BeforeValidator(several)] = ()
    demo: DemoConfig | None = None
    inject: InjectConfig | None = None
    scorer: Scorer | None = None
    measures: dict[str, MeasureSpec] = Field(default_factory=dict)
    subsets: dict[str, Node] = Field(default_factory=dict)
    baseline: str | None = None
    reshard: ReshardSection | None = ReshardSection()
    pretrain: PretrainConfig | None = None
    evaluate: EvaluateSection | None = None
    captions: bool | None = None
    max_skipped: float = Field(0.05, ge=0)

    _text: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def text(self) -> dict[str, Any]:
        """The recipe as YAML holds it, with overrides and `${…}` filled in."""
        return self._text

    def filters(self) -> list[Filter]:
        """The filters of all subsets, in order."""
        return [item for node in self.subsets.values() for item in node.filters()]

    def targets(self) -> list[str]:
        """The target sets that filters name, each once, in order."""
        return list(dict.fromkeys(target for item in self.filters() for target in item.targets()))

    def pool_measures(self) -> dict[str, MeasureSpec]:
        """The measures of the pool by name: those asked for, those that filters read, and what these read in turn."""
        columns = [column for item in self.filters() for column in item.columns()]
        return with_upstream([*self.measures, *_measures_of(columns)], self.measures)

    def target_measures(self, target: str) -> dict[str, MeasureSpec]:
        """The measures of a target set, with the parameters they have on the pool."""
        columns = [column for item in self.filters() if target in item.targets() for column in item.target_columns()]
        return with_upstream(_measures_of(columns), self.measures)

    @property
    def reference(self) -> str:
        """The subset the others are compared with: `baseline`, else the one without a filter, else the first."""
        if self.baseline is not None:
            return self.baseline
        return next((name for name, node in self.subsets.items() if node == All()), next(iter(self.subsets)))

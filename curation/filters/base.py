"""The Filter contract."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from winnow.curation.algebra.nodes import Node
from winnow.curation.columns.table import State, View, numbers
from winnow.curation.columns.threshold import Threshold
from winnow.infra.params import lists
from winnow.infra.pool.uids import decode_uids, is_member, sort_uids

__all__ = ["Filter", "Fraction", "Model", "Names", "Positive", "Scope", "Search", "SelectionFilter", "State", "View"]
__all__ += ["ThresholdFilter", "as_state", "each", "numbers"]

# Types of parameters that several filters have.
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Scope = Literal["pool", "survivors"]
Search = Literal["auto", "exact", "coarse"]
Model = Annotated[str, Field(pattern=r"^[\w-]+$")]
Names = Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]


class Filter(Node, abc.ABC):
    """A decision over columns. Subclasses are decorated with `winnow.infra.params.params`; their fields are parameters.

    Class attributes:
        name: as registered; any word for a custom filter.
        version: raise it when the decision changes for the same parameters.
        paper: the source, for `winnow ls filters`.
        example: parameters that make a valid filter, for `winnow ls filters` and tests.
        files: parameters that name files; their content enters the content key instead of their path.
        added: parameters that are newer than the filter. At their defaults they are left out of the content key, so
            that earlier subsets stay valid.
    """

    tree_key: ClassVar[str] = "filter"

    name: ClassVar[str]
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    example: ClassVar[Mapping[str, Any]] = {}
    files: ClassVar[tuple[str, ...]] = ()
    added: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """What `mask` and `fit` read: pool columns (`text`) and measured ones (`clip.score`)."""

    def numeric(self) -> tuple[str, ...]:
        """The columns without which a sample cannot pass; by default all but the uid. Samples without a finite value
        are dropped, by `not` of the filter too, and counted."""
        return tuple(column for column in self.columns() if column != "uid")

    def targets(self) -> tuple[str, ...]:
        """The target sets it compares with: folders of shards, indexed and measured before `fit`."""
        return ()

    def target_columns(self) -> tuple[str, ...]:
        """The columns that it reads of the target sets."""
        return ()

    def fit(self, view: View) -> State:
        """What must be known about the whole pool before a sample can be decided on. NumPy arrays by name."""
        return {}

    @abc.abstractmethod
    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        """Which samples of a batch pass. The caller also drops those without a finite value in a `numeric` column.

        Args:
            batch: the columns asked for, shape [n].
            state: what `fit` returned.

        Returns:
            bool, shape [n].
        """

    def check(self, view: View) -> None:
        """Refuse a pool that the filter cannot work on: embeddings of another dimension, too few samples.

        Called before the measures run, when the view has neither their columns (`View.knows`) nor all targets, and
        again after them.

        Raises:
            WinnowError: with what to do.
        """
        return

    def report(self, state: State) -> dict[str, Any]:
        """What the funnel and the manifest report besides the counts; JSON values.

        By default the single numbers of the state, with None for infinities and NaN.
        """
        scalars = {name: array.item() for name, array in state.items() if array.ndim == 0}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in scalars.items()
            if isinstance(value, (bool, int, float, str))
        }

    def explain(self, batch: pa.Table, state: State) -> dict[str, Any]:
        """The values of one sample (a batch of one row) and what they are compared with, for `winnow curate --why`."""
        seen = {column: _brief(batch[column]) for column in self.columns() if column != "uid"}
        return seen | self.report(state)

    @property
    def scope(self) -> str:
        """What it is fitted to: the "pool", or the "survivors" of the filters before it."""
        return str(getattr(self, "of", "pool"))

    def filters(self) -> Iterator[Filter]:
        yield self

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults."""
        fields: dict[str, Any] = type(self).__pydantic_fields__  # type: ignore[attr-defined]
        defaults = {name: info.get_default(call_default_factory=True) for name, info in fields.items()}
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    def yaml(self) -> dict[str, Any]:
        """`given` as YAML holds it."""
        return dict(lists(self.given()))

    def identity(self) -> dict[str, Any]:
        """All parameters as they enter the content key."""
        node: Any = self  # a dataclass, as every filter is
        params = {name: value for name, value in asdict(node).items() if name not in self.added or name in self.given()}
        if "keep" in params:
            params["budget"] = params.pop("keep")  # its name in the keys of the first subsets
        return params

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.given().items())})"


class ThresholdFilter(Filter):
    """A filter by a score. Its parameters `fraction`, `threshold`, `keep` and `of`, as far as a subclass declares them,
    are those of `winnow.curation.columns.threshold.Threshold`; exactly one of the first three must be given."""

    fraction: float | None = None
    threshold: float | None = None
    keep: int | None = None
    of: Scope = "pool"

    def __post_init__(self) -> None:
        self.cutoff.check(self.name)

    @property
    def cutoff(self) -> Threshold:
        return Threshold(self.fraction, self.threshold, self.keep, self.of)


class SelectionFilter(Filter):
    """A filter whose `fit` returns the uids it keeps, sorted, as `kept`. Samples that were not fitted are dropped."""

    @abc.abstractmethod
    def numeric(self) -> tuple[str, ...]:
        """The columns that `fit` needs."""

    def columns(self) -> tuple[str, ...]:
        return ("uid", *self.numeric())

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        return is_member(decode_uids(batch["uid"]), state["kept"])


def as_state(uids: np.ndarray, mask: np.ndarray, **more: np.ndarray) -> State:
    """The state of a `SelectionFilter` that keeps the uids of a mask, bool [n], and further arrays, for `report`."""
    return {"kept": sort_uids(uids[mask]), **more}


def each(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """The words of a parameter that takes one or several."""
    return (value,) if isinstance(value, str) else value


def _brief(column: pa.ChunkedArray) -> Any:
    """A single value for a message; for an embedding, its type."""
    value = column[0]
    if pa.types.is_nested(column.type):
        return str(column.type) if value.is_valid else None
    return value.as_py()

"""The Filter contract, and the nodes that join filters into a tree."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from winnow.curation.columns.table import View

# What `fit` learns of the pool: arrays by name, so that it can be kept in a file.
State = dict[str, np.ndarray]


class Node:
    """A tree of filters: a filter, or `All`, `Any`, `Not` over trees. Joined in Python by `&`, `|`, `~`.

    `str` gives Python that makes an equal tree (`winnow.curation.algebra.tree.from_python`): operators where possible,
    else the classes by name, as in `All((a,))` or `Not(~a)`.
    """

    def __and__(self, other: Node) -> All:
        return All((*_parts(self, All), *_parts(other, All)))

    def __or__(self, other: Node) -> Any_:
        return Any_((*_parts(self, Any_), *_parts(other, Any_)))

    def __invert__(self) -> Node:
        return self.child if isinstance(self, Not) else Not(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return ()

    def filters(self) -> Iterator[Filter]:
        """The filters at the leaves, in order."""
        for child in self.children:
            yield from child.filters()


def _parts(node: Node, kind: type) -> tuple[Node, ...]:
    return node.children if isinstance(node, kind) else (node,)


def _by_operator(node: Node) -> bool:
    """Whether `&` or `|` over the children would make this node: they flatten their own kind."""
    return len(node.children) > 1 and not any(type(child) is type(node) for child in node.children)


def _joined(node: Node, sign: str) -> str:
    if _by_operator(node):
        return f" {sign} ".join(_wrapped(child) for child in node.children)
    inner = ", ".join(map(str, node.children)) + ("," if len(node.children) == 1 else "")
    return f"{type(node).__name__}({f'({inner})' if inner else ''})"


def _wrapped(node: Node) -> str:
    return f"({node})" if isinstance(node, (All, Any_)) and _by_operator(node) else str(node)


@dataclass(frozen=True)
class All(Node):
    """Keeps what every child keeps; no children keep everything (no filter)."""

    nodes: tuple[Node, ...] = ()

    @property
    def children(self) -> tuple[Node, ...]:
        return self.nodes

    def __str__(self) -> str:
        return _joined(self, "&")


@dataclass(frozen=True)
class Any_(Node):
    """Keeps what at least one child keeps."""

    nodes: tuple[Node, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.nodes

    def __str__(self) -> str:
        return _joined(self, "|")


@dataclass(frozen=True)
class Not(Node):
    """Keeps what its child drops."""

    child: Node

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)

    def __str__(self) -> str:
        return f"Not({self.child})" if isinstance(self.child, Not) else f"~{_wrapped(self.child)}"


@dataclass(frozen=True)
class Filter(Node, abc.ABC):
    """A decision over columns. Subclasses are frozen dataclasses in a file of their own; fields are parameters.

    Class attributes:
        name: as registered; for a filter of your own, any word.
        version: raise it when the decision changes for the same parameters.
        paper: the source, for `winnow ls filters`.
        example: parameters that one can be made with, for `winnow ls filters` and tests.
        files: parameters that name files; their content, not their path, decides.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    example: ClassVar[Mapping[str, Any]] = {}
    files: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def columns(self) -> tuple[str, ...]:
        """What `keep` and `fit` read: pool columns (`text`) and measured ones (`clip.score`)."""

    def numeric(self) -> tuple[str, ...]:
        """Those of the columns without whose value a sample cannot pass; null and NaN in them are counted."""
        return ()

    def targets(self) -> tuple[str, ...]:
        """Target sets it compares with: folders of shards, made ready before `fit`."""
        return ()

    def target_columns(self) -> tuple[str, ...]:
        """What it reads of the target sets."""
        return ()

    def fit(self, view: View) -> State:
        """What must be known of the whole pool before any sample can be judged."""
        return {}

    @abc.abstractmethod
    def keep(self, batch: pa.Table, state: State) -> np.ndarray:
        """Judge a batch, vectorised. Never keeps a sample whose numeric columns are null or NaN.

        Args:
            batch: the columns asked for, shape [n].
            state: what `fit` returned.

        Returns:
            bool, shape [n].
        """

    def check(self, view: View) -> None:
        """Refuse, before any work, what cannot come out: embeddings of another dimension, too few samples.

        Called before the measures run, when the view does not know their columns (`View.knows`) nor all targets, and
        once more after them.

        Raises:
            WinnowError: saying what to do.
        """
        return

    def report(self, state: State) -> dict[str, Any]:
        """What the funnel and the manifest should say of it beside its counts; JSON values.

        By default the single numbers in the state, infinities and NaN as None.
        """
        scalars = {name: array.item() for name, array in state.items() if array.ndim == 0}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in scalars.items()
            if isinstance(value, (bool, int, float, str))
        }

    def explain(self, batch: pa.Table, state: State) -> dict[str, Any]:
        """What it saw of one sample (a batch of one row) and what it held against it, for `winnow curate --why`."""
        seen = {column: _brief(batch[column]) for column in self.columns() if column != "uid"}
        return seen | self.report(state)

    @property
    def scope(self) -> str:
        """What it is fitted to: "pool", or "survivors" of the filters before it."""
        return str(getattr(self, "of", "pool"))

    def filters(self) -> Iterator[Filter]:
        yield self

    @classmethod
    def read(cls, params: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments out of the YAML form's parameters."""
        return dict(params)

    def arguments(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, as Python takes them."""
        result = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if value != default:
                result[parameter_name(item)] = value
        return result

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, as YAML holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.arguments().items()}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments().items())})"


def parameter_name(item: Field) -> str:
    """What a field is called as a parameter: its name, unless that is taken (`keep`) and its metadata say otherwise."""
    return str(item.metadata.get("parameter", item.name))


def _brief(column: pa.ChunkedArray) -> Any:
    """A single value as a person can read it: embeddings by their type alone."""
    value = column[0]
    if pa.types.is_nested(column.type):
        return str(column.type) if value.is_valid else None
    return value.as_py()


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric column as float64 with null as NaN, shape [n]."""
    return column.to_numpy().astype(np.float64)

"""The Filter contract, and the nodes that join filters into a tree."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from curation.view import View

# What `fit` learns of the pool: arrays by name, so that it can be kept in a file.
State = dict[str, np.ndarray]


class Node:
    """A tree of filters: a filter, or `All`, `Any`, `Not` over trees. Joined in Python by `&`, `|`, `~`."""

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


@dataclass(frozen=True)
class All(Node):
    """Keeps what every child keeps; no children keep everything (no filter)."""

    nodes: tuple[Node, ...] = ()

    @property
    def children(self) -> tuple[Node, ...]:
        return self.nodes

    def __str__(self) -> str:
        return " & ".join(_wrapped(node) for node in self.nodes) if self.nodes else "no filter"


@dataclass(frozen=True)
class Any_(Node):
    """Keeps what at least one child keeps."""

    nodes: tuple[Node, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.nodes

    def __str__(self) -> str:
        return " | ".join(_wrapped(node) for node in self.nodes)


@dataclass(frozen=True)
class Not(Node):
    """Keeps what its child drops."""

    child: Node

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)

    def __str__(self) -> str:
        return f"~{_wrapped(self.child)}"


def _wrapped(node: Node) -> str:
    return f"({node})" if isinstance(node, (All, Any_)) else str(node)


@dataclass(frozen=True)
class Filter(Node, abc.ABC):
    """A decision over columns. Subclasses are frozen dataclasses in a file of their own; fields are parameters.

    Class attributes:
        name: as registered; for a filter of your own, any word.
        version: raise it when the decision changes for the same parameters.
        paper: the source, for `winnow ls filters`.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""

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

    def filters(self) -> Iterator[Filter]:
        yield self

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults."""
        result = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if value != default:
                result[item.name] = list(value) if isinstance(value, tuple) else value
        return result

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.given().items())})"


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A numeric column as float64 with null as NaN, shape [n]."""
    return column.to_numpy().astype(np.float64)

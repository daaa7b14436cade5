"""Nodes of a tree of filters: `All`, `AnyOf` and `Not` over filters and other nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar


class Node:
    """A tree of filters: a `Filter`, or `All`, `AnyOf`, `Not` over trees. Joined in Python by `&`, `|`, `~`.

    `str` gives the Python expression: operators where possible, otherwise the classes by name, as in `All((a,))` or
    `Not(~a)`.

    Class attributes:
        tree_key: the node in YAML; "filter" for a filter.
    """

    tree_key: ClassVar[str]

    def __and__(self, other: Node) -> All:
        return All((*_parts(self, All), *_parts(other, All)))

    def __or__(self, other: Node) -> AnyOf:
        return AnyOf((*_parts(self, AnyOf), *_parts(other, AnyOf)))

    def __invert__(self) -> Node:
        return self.child if isinstance(self, Not) else Not(self)

    @property
    def children(self) -> tuple[Node, ...]:
        return ()

    def filters(self) -> Iterator[Any]:
        """The filters (`winnow.curation.filters.base.Filter`) at the leaves, in order."""
        for child in self.children:
            yield from child.filters()


def _parts(node: Node, kind: type) -> tuple[Node, ...]:
    return node.children if isinstance(node, kind) else (node,)


def _by_operator(node: Node) -> bool:
    """Whether `&` or `|` over the children would make this node: they flatten nodes of their own kind."""
    return len(node.children) > 1 and not any(type(child) is type(node) for child in node.children)


def _wrapped(node: Node) -> str:
    return f"({node})" if isinstance(node, _Join) and _by_operator(node) else str(node)


@dataclass(frozen=True)
class _Join(Node):
    nodes: tuple[Node, ...] = ()

    sign: ClassVar[str]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.nodes

    def __str__(self) -> str:
        if _by_operator(self):
            return f" {self.sign} ".join(map(_wrapped, self.nodes))
        inner = ", ".join(map(str, self.nodes)) + ("," if len(self.nodes) == 1 else "")
        return f"{type(self).__name__}({f'({inner})' if inner else ''})"


class All(_Join):
    """Keeps what every child keeps. Without children it keeps everything (no filter)."""

    tree_key, sign = "all", "&"


class AnyOf(_Join):
    """Keeps what at least one child keeps."""

    tree_key, sign = "any", "|"


@dataclass(frozen=True)
class Not(Node):
    """Keeps what its child drops, except samples that the child cannot decide on because a value is missing."""

    child: Node

    tree_key: ClassVar[str] = "not"

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)

    def __str__(self) -> str:
        return f"Not({self.child})" if isinstance(self.child, Not) else f"~{_wrapped(self.child)}"

"""Fitting the filters of a tree in order, each to the pool or to what the filters before it kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.nodes import All, Node
from winnow.curation.algebra.parse import fingerprint
from winnow.curation.columns.table import State, View
from winnow.curation.filters.base import Filter
from winnow.infra.io.arrow import mask_array
from winnow.infra.io.storage import digest_json


def columns_of(node: Node) -> tuple[str, ...]:
    """The columns a tree reads, each once, in order."""
    return tuple(dict.fromkeys(column for item in node.filters() for column in item.columns()))


@dataclass(frozen=True)
class Survivors(View):
    """What a tree with the fitted states of its filters keeps of a pool, as a view."""

    node: Node = field(default_factory=All)
    states: tuple[State, ...] = ()

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches(("uid",)))

    @property
    def whole(self) -> View:
        return View(self.pool, self.columns_url, self.targets)

    def digest(self, columns: Sequence[str]) -> str:
        return digest_json([super().digest((*columns, *columns_of(self.node))), fingerprint(self.node)])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        evaluator = TreeEvaluator(self.node, self.states)
        for batch in super().batches(tuple(dict.fromkeys((*columns, *columns_of(self.node))))):
            yield batch.filter(mask_array(evaluator.mask(batch))).select(list(columns))


Fit = Callable[[Filter, View], State]


def fit_tree(node: Node, view: View, fit: Fit) -> list[State]:
    """The states of a tree's filters, in the order of `node.filters()`.

    A filter with the scope "survivors" is fitted to what the earlier members of every enclosing `all` kept. The members
    of an `any` do not affect each other. `fit` fits one filter to a view.
    """

    def walk(part: Node, before: tuple[tuple[Node, tuple[State, ...]], ...]) -> tuple[State, ...]:
        if isinstance(part, Filter):
            if part.scope == "pool" or not before:
                return (fit(part, view),)
            nodes = tuple(earlier for earlier, _ in before)
            states = tuple(state for _, found in before for state in found)
            return (fit(part, Survivors(view.pool, view.columns_url, view.targets, All(nodes), states)),)
        found: tuple[State, ...] = ()
        for child in part.children:
            states = walk(child, before)
            found += states
            if isinstance(part, All):
                before = (*before, (child, states))
        return found

    return list(walk(node, ()))

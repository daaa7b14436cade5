"""Applying a fitted tree, and the funnel: what each node kept and dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.curation.algebra.nodes import All, AnyOf, Node, Not
from winnow.curation.columns.table import State, missing
from winnow.curation.filters.base import Filter
from winnow.infra.errors import UsageError


@dataclass
class NodeCounts:
    """Counts of samples at one node.

    Attributes:
        alone: dropped by it, and kept by the tree without it.
        nan: not decided on, because a value is missing; see `TreeEvaluator`.
        state, facts: of a filter: what `fit` and `report` returned.
    """

    node: Node
    label: str
    kind: str
    kept: int = 0
    dropped: int = 0
    alone: int = 0
    nan: int = 0
    children: list[NodeCounts] = field(default_factory=list)
    state: State = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(node: Node, states: Iterator[State]) -> NodeCounts:
        label = str(node) if isinstance(node, Filter) else node.tree_key if node.children else "no filter"
        if isinstance(node, Filter):
            state = next(states)
            return NodeCounts(node, label, node.tree_key, state=state, facts=node.report(state))
        return NodeCounts(
            node, label, node.tree_key, children=[NodeCounts.of(child, states) for child in node.children]
        )

    def leaves(self) -> Iterator[NodeCounts]:
        """Those of the filters, in order."""
        if isinstance(self.node, Filter):
            yield self
        for child in self.children:
            yield from child.leaves()

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"label": self.label, "kind": self.kind, "kept": self.kept, "dropped": self.dropped}
        result |= {"alone": self.alone, "nan": self.nan, "children": [child.as_json() for child in self.children]}
        return result | ({"facts": self.facts} if self.facts else {})


@dataclass(frozen=True)
class NodeDecision:
    """What one node decided about one sample. `facts` are the values that a filter compared."""

    label: str
    depth: int
    kept: bool
    facts: dict[str, Any]


class TreeEvaluator:
    """Applies a fitted tree batch by batch and counts. `states` are in the order of `node.filters()`.

    A sample without a finite value in a column that a filter needs is dropped by the filter, and by `not` of it. This
    is the three-valued logic of SQL (Kleene 1952): the filter and its `not` are unknown; `all` is unknown unless
    another member drops the sample, `any` unless another keeps it; and what is unknown is dropped.
    """

    def __init__(self, node: Node, states: Sequence[State]) -> None:
        if len(states) != len(list(node.filters())):
            raise ValueError("one state for each filter")
        self.counts = NodeCounts.of(node, iter(states))

    def mask(self, batch: pa.Table) -> np.ndarray:
        """bool, shape [n]; counts the batch in."""
        return self._evaluate(batch)[0]

    def reasons(self, batch: pa.Table) -> tuple[np.ndarray, pa.Array]:
        """`mask`, and for each dropped sample the label of the first node that dropped it (null if kept)."""
        mask, masks = self._evaluate(batch)
        labels: list[str] = []
        codes = np.full(len(mask), -1, dtype=np.int32)
        self._first(self.counts, masks, ~mask, labels, codes)
        array = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(labels, pa.string()))
        return mask, array.cast(pa.string())

    def decisions(self, sample: pa.Table) -> tuple[str | None, list[NodeDecision]]:
        """Of one sample (a batch of one row): the label of the first node that dropped it, and each node's decision."""
        masks: dict[int, np.ndarray] = {}
        kept = bool(self._mask(self.counts, sample, masks)[0][0])
        found: list[NodeDecision] = []

        def walk(counts: NodeCounts, depth: int) -> None:
            node = counts.node
            facts = node.explain(sample, counts.state) if isinstance(node, Filter) else {}
            found.append(NodeDecision(counts.label, depth, bool(masks[id(counts)][0]), facts))
            for child in counts.children:
                walk(child, depth + 1)

        walk(self.counts, 0)
        labels: list[str] = []
        code = np.zeros(1, np.int32)
        self._first(self.counts, masks, np.array([not kept]), labels, code)
        return (None if kept else labels[code[0]]), found

    def _evaluate(self, batch: pa.Table) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        masks: dict[int, np.ndarray] = {}
        mask, _ = self._mask(self.counts, batch, masks)
        self._count(self.counts, masks, np.ones(len(mask), dtype=bool))
        return mask, masks

    def _mask(
        self, counts: NodeCounts, batch: pa.Table, masks: dict[int, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Which samples a node keeps, and which of the others it cannot decide on; None for none."""
        node = counts.node
        parts = [self._mask(child, batch, masks) for child in counts.children]
        unknown = next((rows for _, rows in parts if rows is not None), None)
        if isinstance(node, Filter):
            mask = np.asarray(node.mask(batch, counts.state), dtype=bool)
            if mask.shape != (batch.num_rows,):
                raise UsageError(f"{node.name}: mask returned shape {mask.shape} for {batch.num_rows} samples")
            unknown = missing(batch, node.numeric())
            mask = mask & ~unknown
        elif isinstance(node, Not):
            ((mask, unknown),) = parts
            mask = ~mask if unknown is None else ~(mask | unknown)
        elif isinstance(node, AnyOf):
            mask = np.logical_or.reduce([kept for kept, _ in parts])
            if unknown is not None:
                unknown = np.logical_or.reduce([rows for _, rows in parts if rows is not None]) & ~mask
        else:
            mask = np.logical_and.reduce([np.ones(batch.num_rows, dtype=bool), *(kept for kept, _ in parts)])
            if unknown is not None:
                possible = (kept if rows is None else kept | rows for kept, rows in parts)
                unknown = np.logical_and.reduce(list(possible)) & ~mask
        masks[id(counts)] = mask
        if unknown is None or not unknown.any():
            return mask, None
        counts.nan += int(np.count_nonzero(unknown))
        return mask, unknown

    def _count(self, counts: NodeCounts, masks: dict[int, np.ndarray], decides: np.ndarray) -> None:
        """Add a batch to the counts. `decides`: samples that the whole tree keeps if and only if this node does."""
        mask = masks[id(counts)]
        kept = int(np.count_nonzero(mask))
        counts.kept += kept
        counts.dropped += len(mask) - kept
        counts.alone += int(np.count_nonzero(decides & ~mask))
        for child in counts.children:
            others = [masks[id(other)] for other in counts.children if other is not child]
            if isinstance(counts.node, Not):
                inner = np.zeros_like(decides)  # what a child under `not` drops is what is kept
            elif isinstance(counts.node, AnyOf):
                inner = decides & ~np.logical_or.reduce([np.zeros_like(decides), *others])
            else:
                inner = np.logical_and.reduce([decides, *others])
            self._count(child, masks, inner)

    def _first(
        self, counts: NodeCounts, masks: dict[int, np.ndarray], rows: np.ndarray, labels: list[str], codes: np.ndarray
    ) -> None:
        if isinstance(counts.node, All) and counts.children:
            for child in counts.children:
                self._first(child, masks, rows & ~masks[id(child)], labels, codes)
                rows = rows & masks[id(child)]
            return
        codes[rows] = len(labels)
        labels.append(str(counts.node))

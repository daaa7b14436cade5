"""Trees of filters: from YAML and back, and the funnel of what each node kept and dropped."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import missing
from winnow.curation.filters import FILTERS
from winnow.curation.filters.base import (
    All,
    Any_,
    Filter,
    Node,
    Not,
    State,
    parameter_name,
)
from winnow.infra.errors import UsageError
from winnow.infra.io.content import content_digest
from winnow.infra.registry import unknown

_JOINS = ("all", "any", "not")


def parse(tree: Any) -> Node:
    """A tree out of its YAML form.

    `{}` no filter; `{all: [...]}`, `{any: [...]}`, `{not: {...}}`; `{NAME: {parameter: value}}` with a registered
    filter or one of your own as `module:Class`.

    Raises:
        UsageError: unknown filter or parameter (with the nearest one known), or a wrong shape.
    """
    if tree is None or tree == {}:
        return All()
    if not isinstance(tree, Mapping):
        raise UsageError(f"a filter is written `name: {{parameters}}`, this is {tree!r}")
    if len(tree) != 1:
        raise UsageError(f"one filter at a time, these are {', '.join(map(str, tree))}", do="Join them under `all:`.")
    name, body = next(iter(tree.items()))
    if name == "not":
        return Not(parse(body))
    if name in _JOINS:
        if not isinstance(body, list) or not body:
            raise UsageError(f"`{name}` takes a list of filters")
        nodes = tuple(parse(child) for child in body)
        return All(nodes) if name == "all" else Any_(nodes)
    if ":" not in str(name) and name not in FILTERS.table:
        raise unknown("filter", str(name), [*FILTERS.table, *_JOINS])
    return _make(FILTERS.load(str(name)), {} if body is None else body)


def _make(kind: Any, params: Any) -> Filter:
    if not (inspect.isclass(kind) and issubclass(kind, Filter)):
        raise UsageError(
            f"{kind} is not a Filter",
            do="A filter is a frozen dataclass derived from winnow.curation.filters.base.Filter.",
        )
    if not isinstance(params, Mapping):
        raise UsageError(f"{kind.name}: parameters are written `name: value`, this is {params!r}")
    known = {parameter_name(item): item for item in fields(kind)}
    params = kind.read(params)
    for key in params:
        if key not in known:
            raise unknown(f"parameter of {kind.name}", str(key), known)
    for key, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and key not in params:
            raise UsageError(f'{kind.name} needs "{key}"')
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in params.items()})
    except TypeError as error:
        raise UsageError(f"{kind.name}: {error}") from None


def unparse(node: Node) -> dict[str, Any]:
    """The YAML form of a tree; `parse(unparse(node)) == node`."""
    if isinstance(node, All):
        return {"all": [unparse(child) for child in node.nodes]} if node.nodes else {}
    if isinstance(node, Any_):
        return {"any": [unparse(child) for child in node.nodes]}
    if isinstance(node, Not):
        return {"not": unparse(node.child)}
    assert isinstance(node, Filter)
    return {FILTERS.name_of(type(node)): node.given()}


def from_python(text: str) -> Node:
    """The tree that a node's `str` says, with registered filters alone; `from_python(str(node)) == node`.

    Raises:
        UsageError: it is no expression of filters, `&`, `|`, `~`, `All`, `Any_` and `Not` over literal parameters.
    """
    try:
        return _node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise UsageError(f"is not a filter expression ({error})", where=text) from None


def _node(part: ast.AST) -> Node:
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.Invert):
        return ~_node(part.operand)
    if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitAnd):
        return _node(part.left) & _node(part.right)
    if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
        return _node(part.left) | _node(part.right)
    if not (isinstance(part, ast.Call) and isinstance(part.func, ast.Name)):
        raise ValueError(ast.unparse(part))
    name = part.func.id
    if name in ("All", "Any_"):
        inner = part.args[0] if part.args else ast.Tuple(elts=[])
        nodes = tuple(_node(item) for item in getattr(inner, "elts", ()))
        return All(nodes) if name == "All" else Any_(nodes)
    if name == "Not":
        return Not(_node(part.args[0]))
    if part.args:
        raise ValueError(f"{name}: parameters are named")
    params = {str(item.arg): ast.literal_eval(item.value) for item in part.keywords}
    return _make(FILTERS.load(name), params)


def fingerprint(node: Node) -> Any:
    """What decides a tree's decision beside the data: parameters and versions, and the source of filters of one's own.

    Targets stand in it by name; their content is an input of its own. Files stand in it by their content.
    """
    if isinstance(node, Filter):
        name = FILTERS.name_of(type(node))
        mark: dict[str, Any] = {"filter": name, "version": node.version}
        params = asdict(node)
        if node.targets():
            params.pop("target", None)
        for key in node.files:
            if isinstance(named := params.get(key), str):
                params[key] = content_digest(named)
            elif isinstance(named, (list, tuple)):
                params[key] = [content_digest(url) for url in named]
        mark["params"] = params
        if ":" in name:
            module = inspect.getmodule(type(node))
            mark["source"] = hashlib.sha256(inspect.getsource(module or type(node)).encode()).hexdigest()
        return mark
    return {type(node).__name__.strip("_").lower(): [fingerprint(child) for child in node.children]}


@dataclass
class NodeCounts:
    """Counts of one node: how many it kept and dropped, dropped by it alone, and could not judge.

    `state` and `facts` are a filter's: what it was fitted to, and what it reports of that.
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
        kind = "filter" if isinstance(node, Filter) else type(node).__name__.strip("_").lower()
        label = str(node) if isinstance(node, Filter) else kind if node.children else "no filter"
        counts = NodeCounts(node, label, kind)
        if isinstance(node, Filter):
            counts.state = next(states)
            counts.facts = node.report(counts.state)
        counts.children = [NodeCounts.of(child, states) for child in node.children]
        return counts

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
    """What one node said of one sample: whether it kept it, and, if it is a filter, what it saw and held against it."""

    label: str
    depth: int
    kept: bool
    facts: dict[str, Any]


class TreeEvaluator:
    """Applies a fitted tree batch by batch and keeps the tally.

    Args:
        node: the tree.
        states: of its filters, in the order of `node.filters()`.
    """

    def __init__(self, node: Node, states: list[State]) -> None:
        if len(states) != sum(1 for _ in node.filters()):
            raise ValueError("one state for each filter")
        self.node = node
        self.counts = NodeCounts.of(node, iter(states))

    def keep(self, batch: pa.Table) -> np.ndarray:
        """bool, shape [n]; counts the batch in."""
        return self._judge(batch)[0]

    def reasons(self, batch: pa.Table) -> tuple[np.ndarray, pa.Array]:
        """`keep`, and for each dropped sample the label of the first node that dropped it (null if kept)."""
        mask, masks = self._judge(batch)
        labels: list[str] = []
        codes = np.full(len(mask), -1, dtype=np.int32)
        self._first(self.counts, masks, ~mask, labels, codes)
        array = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(labels, pa.string()))
        return mask, array.cast(pa.string())

    def decisions(self, sample: pa.Table) -> tuple[str | None, list[NodeDecision]]:
        """Of one sample (a batch of one row): the label of the first node that dropped it, and each node's verdict."""
        masks: dict[int, np.ndarray] = {}
        kept = bool(self._mask(self.counts, sample, masks)[0])
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

    def _judge(self, batch: pa.Table) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        masks: dict[int, np.ndarray] = {}
        mask = self._mask(self.counts, batch, masks)
        self._count(self.counts, masks, np.ones(len(mask), dtype=bool))
        return mask, masks

    def _mask(self, counts: NodeCounts, batch: pa.Table, masks: dict[int, np.ndarray]) -> np.ndarray:
        node = counts.node
        parts = [self._mask(child, batch, masks) for child in counts.children]
        if isinstance(node, Filter):
            mask = np.asarray(node.keep(batch, counts.state), dtype=bool)
            if mask.shape != (batch.num_rows,):
                raise UsageError(f"{node.name}: keep returned shape {mask.shape} for {batch.num_rows} samples")
            unknown_rows = missing(batch, node.numeric())
            if unknown_rows.any():
                counts.nan += int(np.count_nonzero(unknown_rows))
                mask = mask & ~unknown_rows
        elif isinstance(node, Not):
            mask = ~parts[0]
        elif isinstance(node, Any_):
            mask = np.logical_or.reduce(parts)
        else:
            mask = np.logical_and.reduce(parts) if parts else np.ones(batch.num_rows, dtype=bool)
        masks[id(counts)] = mask
        return mask

    def _count(self, counts: NodeCounts, masks: dict[int, np.ndarray], decides: np.ndarray) -> None:
        """Add a batch to the counts. `decides`: samples that the whole tree keeps if and only if this node does."""
        mask = masks[id(counts)]
        kept = int(np.count_nonzero(mask))
        counts.kept += kept
        counts.dropped += len(mask) - kept
        counts.alone += int(np.count_nonzero(decides & ~mask))
        parts = [masks[id(child)] for child in counts.children]
        for i, child in enumerate(counts.children):
            others = [part for j, part in enumerate(parts) if j != i]
            if isinstance(counts.node, Not):
                inner = np.zeros_like(decides)  # what a child under `not` drops is what is kept
            elif isinstance(counts.node, Any_):
                inner = decides & ~np.logical_or.reduce([np.zeros_like(decides), *others])
            else:
                inner = decides & np.logical_and.reduce([np.ones_like(decides), *others])
            self._count(child, masks, inner)

    def _first(
        self, counts: NodeCounts, masks: dict[int, np.ndarray], rows: np.ndarray, labels: list[str], codes: np.ndarray
    ) -> None:
        if isinstance(counts.node, All) and counts.children:
            left = rows.copy()
            for child in counts.children:
                here = left & ~masks[id(child)]
                self._first(child, masks, here, labels, codes)
                left &= ~here
            return
        codes[rows] = len(labels)
        labels.append(str(counts.node))

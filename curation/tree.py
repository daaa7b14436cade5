"""Trees of filters: from YAML and back, and the funnel of what each node kept and dropped."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.filters import FILTERS
from curation.filters.base import All, Any_, Filter, Node, Not, State
from curation.view import missing
from infra.errors import UsageError
from infra.registry import unknown

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
            f"{kind} is not a Filter", do="A filter is a frozen dataclass derived from curation.filters.base.Filter."
        )
    if not isinstance(params, Mapping):
        raise UsageError(f"{kind.name}: parameters are written `name: value`, this is {params!r}")
    known = {item.name: item for item in fields(kind)}
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


def fingerprint(node: Node) -> Any:
    """What decides a tree's decision beside the data: parameters and versions, and the source of filters of one's own.

    Targets stand in it by name; their content is an input of its own.
    """
    if isinstance(node, Filter):
        name = FILTERS.name_of(type(node))
        mark: dict[str, Any] = {"filter": name, "version": node.version}
        params = asdict(node)
        if node.targets():
            params.pop("target", None)
        mark["params"] = params
        if ":" in name:
            module = inspect.getmodule(type(node))
            mark["source"] = hashlib.sha256(inspect.getsource(module or type(node)).encode()).hexdigest()
        return mark
    return {type(node).__name__.strip("_").lower(): [fingerprint(child) for child in node.children]}


@dataclass
class Tally:
    """Counts of one node: how many it kept and dropped, dropped by it alone, and could not judge."""

    node: Node
    label: str
    kind: str
    kept: int = 0
    dropped: int = 0
    alone: int = 0
    nan: int = 0
    children: list[Tally] = field(default_factory=list)

    @staticmethod
    def of(node: Node) -> Tally:
        kind = "filter" if isinstance(node, Filter) else type(node).__name__.strip("_").lower()
        label = str(node) if isinstance(node, Filter) or not node.children else kind
        return Tally(node, label, kind, children=[Tally.of(child) for child in node.children])

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"label": self.label, "kind": self.kind, "kept": self.kept, "dropped": self.dropped}
        result |= {"alone": self.alone, "nan": self.nan, "children": [child.as_json() for child in self.children]}
        return result


class Judge:
    """Applies a fitted tree batch by batch and keeps the tally.

    Args:
        node: the tree.
        states: of its filters, in the order of `node.filters()`.
    """

    def __init__(self, node: Node, states: list[State]) -> None:
        self.node = node
        self.states = {id(item): state for item, state in zip(node.filters(), states, strict=True)}
        self.tally = Tally.of(node)

    def keep(self, batch: pa.Table) -> np.ndarray:
        """bool, shape [n]; counts the batch in."""
        return self._judge(batch)[0]

    def reasons(self, batch: pa.Table) -> tuple[np.ndarray, pa.Array]:
        """`keep`, and for each dropped sample the label of the first node that dropped it (null if kept)."""
        mask, masks = self._judge(batch)
        labels: list[str] = []
        codes = np.full(len(mask), -1, dtype=np.int32)
        self._first(self.tally, masks, ~mask, labels, codes)
        array = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(labels, pa.string()))
        return mask, array.cast(pa.string())

    def _judge(self, batch: pa.Table) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        masks: dict[int, np.ndarray] = {}
        mask = self._mask(self.tally, batch, masks)
        self._count(self.tally, masks, np.ones(len(mask), dtype=bool))
        return mask, masks

    def _mask(self, tally: Tally, batch: pa.Table, masks: dict[int, np.ndarray]) -> np.ndarray:
        node = tally.node
        parts = [self._mask(child, batch, masks) for child in tally.children]
        if isinstance(node, Filter):
            mask = np.asarray(node.keep(batch, self.states[id(node)]), dtype=bool)
            if mask.shape != (batch.num_rows,):
                raise UsageError(f"{node.name}: keep returned shape {mask.shape} for {batch.num_rows} samples")
            unknown_rows = missing(batch, node.numeric())
            tally.nan += int(pc.sum(unknown_rows).as_py() or 0)
            mask &= ~np.asarray(unknown_rows)
        elif isinstance(node, Not):
            mask = ~parts[0]
        elif isinstance(node, Any_):
            mask = np.logical_or.reduce(parts)
        else:
            mask = np.logical_and.reduce(parts) if parts else np.ones(batch.num_rows, dtype=bool)
        masks[id(tally)] = mask
        return mask

    def _count(self, tally: Tally, masks: dict[int, np.ndarray], decides: np.ndarray) -> None:
        """Add a batch to the counts. `decides`: samples that the whole tree keeps if and only if this node does."""
        mask = masks[id(tally)]
        tally.kept += int(mask.sum())
        tally.dropped += int((~mask).sum())
        tally.alone += int((~mask & decides).sum())
        parts = [masks[id(child)] for child in tally.children]
        for i, child in enumerate(tally.children):
            others = [part for j, part in enumerate(parts) if j != i]
            if isinstance(tally.node, Not):
                inner = np.zeros_like(decides)  # what a child under `not` drops is what is kept
            elif isinstance(tally.node, Any_):
                inner = decides & ~np.logical_or.reduce([np.zeros_like(decides), *others])
            else:
                inner = decides & np.logical_and.reduce([np.ones_like(decides), *others])
            self._count(child, masks, inner)

    def _first(
        self, tally: Tally, masks: dict[int, np.ndarray], rows: np.ndarray, labels: list[str], codes: np.ndarray
    ) -> None:
        if isinstance(tally.node, All) and tally.children:
            left = rows.copy()
            for child in tally.children:
                here = left & ~masks[id(child)]
                self._first(child, masks, here, labels, codes)
                left &= ~here
            return
        codes[rows] = len(labels)
        labels.append(str(tally.node))

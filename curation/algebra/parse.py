"""Trees of filters from YAML and back, and their content keys."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from winnow.curation.algebra.nodes import All, AnyOf, Node, Not
from winnow.curation.filters import FILTERS
from winnow.curation.filters.base import Filter
from winnow.curation.located import load_class, located
from winnow.infra.io.content import content_digest
from winnow.infra.params import ParameterError, build
from winnow.infra.registry import unknown

_JOINS = {"all": All, "any": AnyOf}


def parse(tree: Any) -> Node:
    """A tree from its YAML form.

    `{}` or null is no filter; `{all: [...]}`, `{any: [...]}`, `{not: {...}}` join trees; `{NAME: {parameter: value}}`
    is a registered filter, or a custom one named `module:Class`.

        >>> str(parse({"any": [{"random": {"fraction": 0.1}}, {"not": {"random": {"fraction": 0.5}}}]}))
        'random(fraction=0.1) | ~random(fraction=0.5)'

    Raises:
        ParameterError: an unknown filter or parameter, a value that is refused, or a wrong shape. Its `path` leads
            from the tree to the fault.
    """
    if tree is None or tree == {}:
        return All()
    if not isinstance(tree, Mapping):
        raise ParameterError(f"a filter is written `name: {{parameters}}`, this is {tree!r}")
    if len(tree) != 1:
        names = ", ".join(map(str, tree))
        raise ParameterError(f"one filter at a time, these are {names}", do="Join them under `all:`.")
    name, body = next(iter(tree.items()))
    with located(name):
        if name == "not":
            return Not(parse(body))
        if name not in _JOINS:
            return _parse_filter(str(name), body)
        if not isinstance(body, (list, tuple)) or not body:
            raise ParameterError(f"`{name}` takes a list of filters")
        nodes = []
        for i, child in enumerate(body):
            with located(i):
                nodes.append(parse(child))
        return _JOINS[name](tuple(nodes))


def _parse_filter(name: str, given: Any) -> Filter:
    if ":" not in name and name not in FILTERS.table:
        raise unknown("filter", name, [*FILTERS.table, *_JOINS, "not"])
    kind, given = load_class(FILTERS, name, Filter, given)  # type: ignore[type-abstract]
    return build(kind, given, kind.name)


def unparse(node: Node) -> dict[str, Any]:
    """The YAML form of a tree; `parse(unparse(node)) == node`."""
    if isinstance(node, Filter):
        return {FILTERS.name_of(type(node)): node.yaml()}
    if isinstance(node, Not):
        return {node.tree_key: unparse(node.child)}
    return {node.tree_key: [unparse(child) for child in node.children]} if node.children else {}


def fingerprint(node: Node) -> Any:
    """What decides a tree's decision besides the data, as JSON values: parameters, versions, and the source of custom
    filters. Targets are left out, because their content is an input itself. Files are represented by their content."""
    if not isinstance(node, Filter):
        return {node.tree_key: [fingerprint(child) for child in node.children]}
    name, params = FILTERS.name_of(type(node)), node.identity()
    if node.targets():
        params.pop("target", None)
    for key in node.files:
        if isinstance(named := params.get(key), str):
            params[key] = content_digest(named)
        elif isinstance(named, (list, tuple)):
            params[key] = [content_digest(url) for url in named]
    result = {"filter": name, "version": node.version, "params": params}
    if ":" in name:
        module = inspect.getmodule(type(node))
        result["source"] = hashlib.sha256(inspect.getsource(module or type(node)).encode()).hexdigest()
    return result

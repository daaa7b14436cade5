"""YAML files read with the line of every key, so that a message can say where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from winnow.infra.errors import UsageError

Path = tuple[str | int, ...]
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 1 << 20, 50_000, 50  # of a text; the last two with its aliases expanded


def _bound(count: int, depth: int) -> None:
    if count > MAX_VALUES:
        raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, with aliases expanded")
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: `5e-4` is one, where PyYAML's YAML 1.1 wants `5.0e-4`. Bounded, because PyYAML
    recurses, and because a few hundred characters of aliases can stand for billions of values."""

    count = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.count, self.depth = self.count + 1, self.depth + 1
        _bound(self.count, self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_value(text: str) -> Any:
    """A YAML text as Python values. Raises yaml.YAMLError, also for a text that is too large or nested too deeply."""
    return _load(text)[0]


def _load(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a text, and its node."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS:,} characters")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _size(root, {})
        return loader.construct_document(root), root
    except (ValueError, OverflowError) as error:  # of a date or a number
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The number of nodes of a node and its depth, where an alias counts as what it stands for."""
    if id(node) in known:
        if not known[id(node)][0]:
            raise yaml.YAMLError("an alias within what it stands for")
        return known[id(node)]
    known[id(node)] = 0, 0
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    sizes = [_size(child, known) for child in children]
    known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    _bound(*known[id(node)])
    return known[id(node)]


@dataclass(frozen=True)
class Lines:
    """Where the values of a YAML text are.

    Attributes:
        name: of the file, for messages.
        lines: line of each key and list item, counted from 1, by its path.
        overrides: dotted paths whose values came from the command line.
    """

    name: str
    lines: Mapping[Path, int] = field(default_factory=dict)
    overrides: frozenset[str] = frozenset()

    def where(self, path: Path = ()) -> str:
        """`FILE, line N` of a value or its nearest parent; `--set KEY` where the command line gave it."""
        while path:
            dotted = ".".join(map(str, path))
            if dotted in self.overrides:
                return f"--set {dotted}"
            if path in self.lines:
                return f"{self.name}, line {self.lines[path]}"
            path = path[:-1]
        return self.name


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """A mapping out of the text of the YAML file `name`, and where its values are.

    Raises:
        UsageError: it is not valid YAML, too large or nested too deeply, not a mapping, gives a key twice (YAML itself
            takes the last), or has a key that YAML does not read as text (`no`, which is false).
    """
    try:
        raw, root = _load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"is not valid YAML ({' '.join(str(error).split())})", where=name) from None
    if not isinstance(raw, dict) or root is None:
        raise UsageError("is not a mapping of keys to values", where=name)
    lines: dict[Path, int] = {}
    _note(root, (), lines, name)
    return raw, Lines(name, lines)


def _note(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in _KEYS:
                what = f"YAML reads the key `{key.value}` as {key.tag.rpartition(':')[2]}, not as text"
                do = f'Write "{key.value}", with quotes.' if isinstance(key, yaml.ScalarNode) else None
                raise UsageError(what, where=f"{name}, line {line}", do=do)
            if key.value in seen:
                what = f'"{key.value}" is given twice (before in line {seen[key.value]})'
                raise UsageError(what, where=f"{name}, line {line}")
            seen[key.value] = line
            lines[(*path, key.value)] = line
            _note(value, (*path, key.value), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _note(value, (*path, i), lines, name)

"""YAML files read with the line of every key, so that a message can say where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from winnow.infra.errors import UsageError

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2: `5e-4` is one, where PyYAML's YAML 1.1 wants `5.0e-4`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_value(text: str) -> Any:
    """A YAML text as Python values. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


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
        UsageError: it is not valid YAML, not a mapping, or gives a key twice (YAML itself takes the last).
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        raw = read_value(text)
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
            if key.value in seen:
                what = f'"{key.value}" is given twice (before in line {seen[key.value]})'
                raise UsageError(what, where=f"{name}, line {line}")
            seen[key.value] = line
            lines[(*path, key.value)] = line
            _note(value, (*path, key.value), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _note(value, (*path, i), lines, name)

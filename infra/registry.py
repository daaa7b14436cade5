"""A registry is a visible table of `name: "module:Object"`; other objects are named `module:Object` directly."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from winnow.infra.errors import UsageError

SHOWN = 20  # words of a table in a message


def closest_word(word: str, words: Iterable[str]) -> str | None:
    """The known word most like the given one, or None when none is near."""
    near = difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.5)
    return near[0] if near else None


def unknown(kind: str, word: str, words: Iterable[str], where: str | None = None) -> UsageError:
    """The error for a name that is not known, with the nearest one that is."""
    words = sorted(set(words))
    near = closest_word(word, words)
    listed = words if len(words) <= SHOWN else [*words[:SHOWN], f"… ({len(words)} in all)"]
    hint = f'Did you mean "{near}"?' if near else f"Known: {', '.join(listed)}."
    return UsageError(f'unknown {kind} "{word}"', where=where, do=hint)


class Registry:
    """A table of names.

    Args:
        kind: what the names denote, as in messages ("filter").
        table: name to "module:Object".
    """

    def __init__(self, kind: str, table: dict[str, str]) -> None:
        self.kind, self.table = kind, table

    def names(self) -> list[str]:
        return sorted(self.table)

    def path(self, name: str) -> str:
        """The "module:Object" of a name, which may be one itself. Raises UsageError with a suggestion."""
        if name in self.table:
            return self.table[name]
        if ":" in name:
            return name
        raise unknown(self.kind, name, self.table)

    def load(self, name: str) -> Any:
        """Import and return the object. Raises UsageError when it is not there."""
        module_name, _, attribute = self.path(name).partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError as error:
            if error.name and module_name.split(".")[0] != error.name.split(".")[0]:
                raise
            raise UsageError(
                f'no module "{module_name}" for {self.kind} "{name}"',
                do="It must be importable: put the file next to the recipe, or set PYTHONPATH.",
            ) from error
        except AttributeError:
            raise UsageError(
                f'module "{module_name}" has no "{attribute}"', do=f"It was named as a {self.kind}."
            ) from None

    def name_of(self, obj: type) -> str:
        """The registered name of a class, or its "module:Class"."""
        path = f"{obj.__module__}:{obj.__qualname__}"
        return next((name for name, value in self.table.items() if value == path), path)


def config_fields(path: str) -> dict[str, bool]:
    """The fields of the dataclass `Config` in the module of "module:Object", each with whether it has a default.

    Read from the source without importing it: an objective imports torch, and a recipe with a misspelt key should be
    refused before that takes its seconds.
    """
    spec = importlib.util.find_spec(path.partition(":")[0])
    if spec is None or not spec.origin:
        raise UsageError(f'no module "{path.partition(":")[0]}"')
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return {
                item.target.id: item.value is not None
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return {}


def class_constants(path: str) -> dict[str, Any]:
    """The literals that the body of "module:Class" gives to names, read as `config_fields` reads; none inherited."""
    module, _, name = path.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        raise UsageError(f'no module "{module}"')
    constants = {}
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
                if isinstance(item, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and item.value:
                    with contextlib.suppress(ValueError):  # no literal
                        constants[target.id] = ast.literal_eval(item.value)
    return constants

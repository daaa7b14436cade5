"""A registry is a visible table of `name: "module:Object"`; a user names other objects `module:Object` directly."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from winnow.infra.errors import UsageError
from winnow.infra.importing import import_custom, trust, trusted

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
    """A table of name to "module:Object"; `kind` says in messages what the names denote ("filter")."""

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

    def check_data(self, name: Any, where: str) -> None:
        """For a name in a data file: raises UsageError unless it is registered, or the user named it as well."""
        if isinstance(name, str) and (name in self.table or name in trusted()):
            return
        if isinstance(name, str) and ":" in name:
            what = f'names custom code, the {self.kind} "{name}", and a data file may name registered ones only'
            raise UsageError(what, where=where, do=f"If you trust that code, give --trust {name}.")
        raise unknown(self.kind, str(name), self.table, where)

    def load(self, name: str) -> Any:
        """Import and return the object of a name that a user gives, in a recipe or on the command line. Raises
        UsageError when it is not there. Of a name in a data file call `check_data` first."""
        if name not in self.table and ":" in name:
            trust(name)
        module_name, _, attribute = self.path(name).partition(":")
        try:
            return getattr(import_custom(module_name), attribute)
        except ModuleNotFoundError as error:
            if error.name and module_name.split(".")[0] != error.name.split(".")[0]:
                raise
            do = "It must be importable: put the file next to the recipe, or set PYTHONPATH."
            raise UsageError(f'no module "{module_name}" for {self.kind} "{name}"', do=do) from error
        except AttributeError:
            do = f"It was named as a {self.kind}."
            raise UsageError(f'module "{module_name}" has no "{attribute}"', do=do) from None

    def name_of(self, obj: type) -> str:
        """The registered name of a class, or its "module:Class"."""
        path = f"{obj.__module__}:{obj.__qualname__}"
        return next((name for name, value in self.table.items() if value == path), path)

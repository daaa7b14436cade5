"""Custom modules: where `module:Object` names of a recipe are found, and which of them data files may use.

A recipe and a command line are code. A checkpoint's config and a task file next to the data are not: they may use a
`module:Object` only where the user named it as well.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from winnow.infra.errors import UsageError

VARIABLE = "WINNOW_MODULES"  # folders of custom modules, divided as PATH is; worker processes inherit it
TRUSTED = "WINNOW_TRUSTED"  # the `module:Object` names that the user gave, divided by commas; inherited as well
_folders: list[str] = []
_allowed = True


def search_also(*folders: str | Path) -> None:
    """Name folders to search for custom modules where Python's own path has no module of that name."""
    _folders.extend(path for path in map(str, folders) if path not in _folders)


def custom_allowed() -> bool:
    """Whether a recipe may name custom modules and shell commands (`pipe:`)."""
    return _allowed


def trusted() -> frozenset[str]:
    """The `module:Object` names that the user gave: in a recipe, with --trust, or in the environment variable."""
    return frozenset(filter(None, os.environ.get(TRUSTED, "").split(","))) if _allowed else frozenset()


def trust(*names: str) -> None:
    """Let data files use `module:Object` names. Raises UsageError after `allow_custom(False)`."""
    for name in names:
        if not _allowed:
            raise UsageError(f'"{name}" is custom code, and --no-custom-code forbids it')
    os.environ[TRUSTED] = ",".join(sorted({*trusted(), *names}))


def allow_custom(allowed: bool, names: Iterable[str] = ()) -> None:
    """Whether this process may import custom modules at all; and the names to `trust`."""
    global _allowed
    _allowed = allowed
    if not allowed:
        os.environ.pop(TRUSTED, None)
    if names := list(names):
        trust(*names)


def environment() -> dict[str, str]:
    """The variables that a worker process on another machine needs to find custom modules."""
    return {name: os.environ[name] for name in (VARIABLE, TRUSTED) if os.environ.get(name)}


def import_custom(name: str) -> ModuleType:
    """Import the module of a `module:Object` name. Raises ModuleNotFoundError.

    The folders given to `search_also` join Python's path, as its last entries, only when a module is found nowhere
    else. So no file in them can replace an installed package.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = [path for path in _folders if path not in sys.path]
        if error.name != name.partition(".")[0] or not missing:
            raise
        os.environ[VARIABLE] = os.pathsep.join(_folders)
        extend_path()
        return importlib.import_module(name)


def extend_path() -> None:
    """Append the folders of the environment variable to Python's path."""
    folders = os.environ.get(VARIABLE, "").split(os.pathsep)
    sys.path.extend(path for path in folders if path and path not in sys.path)
    importlib.invalidate_caches()


extend_path()  # a worker process unpickles objects of custom classes before it runs any of our code

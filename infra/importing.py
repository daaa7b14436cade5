"""Custom modules: where `module:Object` names of a recipe are found."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

VARIABLE = "WINNOW_MODULES"  # folders of custom modules, divided as PATH is; worker processes inherit it
_folders: list[str] = []


def search_also(*folders: str | Path) -> None:
    """Name folders to search for custom modules where Python's own path has no module of that name."""
    _folders.extend(path for path in map(str, folders) if path not in _folders)


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

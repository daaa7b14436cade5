"""Names that users choose and that become folders in the directory of a stage."""

from __future__ import annotations

import re
from typing import Any

from winnow.infra.params import ParameterError
from winnow.infra.stages.stage import CHECKSUMS, LOCATIONS, MANIFEST, RECORDS

MAX_NAME = 120  # bytes; a file name has at most 255, and ours are longer than the name
# What a stage keeps in its directory; names with a dot in front (.lock, temporary files) are refused in any case.
RESERVED = frozenset({MANIFEST, LOCATIONS, CHECKSUMS, RECORDS, "places.json", "log.jsonl", "notes", "fits"})


def check_name(what: str, name: Any) -> None:
    """Raises ParameterError for a name that cannot be a folder next to the files that a stage keeps there. `what` says
    of what it is the name.

    Example:
        >>> check_name("subset", "clip-30")
        >>> check_name("subset", "notes")
        Traceback (most recent call last):
        winnow.infra.params.ParameterError: subset "notes": winnow keeps files of its own under this name. Take another.
    """
    if not isinstance(name, str):
        raise ParameterError(f"{what} {name!r}: a name is a text, and YAML does not read this as one")
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        do = "It may not begin with a dot." if name.startswith(".") else None
        raise ParameterError(f'{what} "{name}": a name has letters, digits and . _ + - only', do=do)
    if name.lower() in RESERVED or name.lower().endswith(".part"):
        raise ParameterError(f'{what} "{name}": winnow keeps files of its own under this name', do="Take another.")
    if len(name.encode()) > MAX_NAME:
        raise ParameterError(f'{what} "{name[:40]}…": the name has more than {MAX_NAME} bytes')

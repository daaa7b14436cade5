"""Text that others wrote: bounded before it is read, split at line ends alone, and JSON in it."""

from __future__ import annotations

import json
from typing import Any

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

MAX_TEXT_BYTES = 16 << 20


class TextError(WinnowError):
    """A file that is no text of a reasonable size; reading it again does not help."""


def read_text(url: str, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        TextError: it has more than `limit` bytes, or it is not UTF-8.
        WinnowError: there is no such file, or it cannot be read.
    """
    with storage.open_read(url) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise TextError(f"is larger than {limit >> 20} MiB", where=url)
    try:
        return str(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TextError(f"is not UTF-8 (byte {error.start})", where=url) from None


def text_lines(text: str) -> list[str]:
    r"""The lines of a text, which end at \n, \r\n or \r as in Python's text files. `str.splitlines` also splits at a
    form feed and at U+001C to U+001E, U+0085, U+2028 and U+2029, which occur within captions and names.

    Example:
        >>> text_lines("a\u2028b\r\n\nc\n")
        ['a\u2028b', '', 'c']
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_json_text(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None

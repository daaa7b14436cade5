"""One row of a view out of the members of one sample in a tar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from winnow.infra.errors import WinnowError
from winnow.infra.io.images import EXTENSIONS, image_extension, image_size_of
from winnow.infra.io.tar import Member
from winnow.infra.pool.views import IDENTITY, LOCATION, locate

READ = frozenset((*EXTENSIONS, "txt", "json", "cls"))  # extensions whose content a row needs
# Values of the json that become columns where there is no parquet.
_JSON_FIELDS = {"url": str, "sha256": str, "source": str, "original_width": int, "original_height": int}


def row_of(key: str, members: Mapping[str, Member], require: frozenset[str]) -> dict[str, Any]:
    """A row with the columns IDENTITY, LOCATION and some of the json; the uid is None where the json has none.

    `members` hold the data of the extensions in READ; `require` lists "image", "text", or extensions.

    Raises:
        WinnowError: the sample cannot be used; `what` is a short fixed phrase.
    """
    ext = image_extension(members)
    image = members[ext] if ext else None
    if image is None and "image" in require:
        raise WinnowError("no image")
    width, height = image_size_of(image.data) if image else (None, None)
    for ext in sorted(require - {"image", "text"}):
        if ext not in members:
            raise WinnowError(f"no .{ext}")
    facts, text = _json(members), _text(members)
    for name in ("text", "caption"):  # DataComp's name and img2dataset's
        if text is None and isinstance(facts.get(name), str):
            text = facts[name]
    row: dict[str, Any] = {"uid": _uid(facts), "key": key, "text": text} | locate(members)
    row |= {"original_width": width, "original_height": height}
    for name, kind in _JSON_FIELDS.items():
        value = facts.get(name)
        if type(value) is kind and (not isinstance(value, int) or 0 <= value < 1 << 31):
            row[name] = value
    if (label := _label(members, facts)) is not None:
        row["label"] = label
    # JSON can express a lone surrogate, and a name in a tar need not be UTF-8.
    if any(isinstance(value, str) and not _is_utf8(value) for value in row.values()):
        raise WinnowError("a name or text is not UTF-8")
    if text is None and "text" in require:
        raise WinnowError("missing caption")
    return row


def identity_of(key: str, members: Mapping[str, Member]) -> dict[str, Any]:
    """What identifies a sample that `row_of` refuses: its key, and uid, url and sha256 of its json if that is valid."""
    try:
        facts = _json(members)
    except WinnowError:
        facts = {}
    return {name: facts.get(name) for name in ("url", "sha256")} | {"uid": _uid(facts), "key": key}


def _uid(facts: Mapping[str, Any]) -> str | None:
    return facts["uid"].lower() if isinstance(facts.get("uid"), str) else None


def _json(members: Mapping[str, Member]) -> dict[str, Any]:
    if "json" not in members:
        return {}
    try:
        facts = json.loads(members["json"].data)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise WinnowError("json is not valid")
    return facts


def _text(members: Mapping[str, Member]) -> str | None:
    try:
        return members["txt"].data.decode("utf-8") if "txt" in members else None
    except UnicodeDecodeError:
        raise WinnowError("caption is not UTF-8") from None


def _label(members: Mapping[str, Member], facts: Mapping[str, Any]) -> int | None:
    label = facts.get("label")
    if "cls" in members and re.fullmatch(rb"\s*\d{1,18}\s*", members["cls"].data):
        label = int(members["cls"].data)
    return label if type(label) is int and 0 <= label < 1 << 63 else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as a table; a column of the json is there if a row has it."""
    fields = list(IDENTITY) + list(LOCATION)
    for name, kind in {**_JSON_FIELDS, "label": int}.items():
        if name not in IDENTITY.names and any(name in row for row in rows):
            fields.append(pa.field(name, pa.string() if kind is str else pa.int64()))
    arrays = [pa.array([row.get(item.name) for row in rows], item.type) for item in fields]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

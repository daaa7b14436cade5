"""The columns of a view: what every pool knows of a sample, and where its members are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.io.images import image_extension
from winnow.infra.io.tar import Member

# Byte ranges of a sample's members. `tar` is an index into the shard's list of tars, sizes are in bytes. A member that
# the sample does not have is null. `other` lists what is neither the image nor `txt` nor `json`.
_OTHER = pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
_RANGES = [(f"{role}_{what}", pa.int64()) for role in ("image", "text", "json") for what in ("offset", "size")]
LOCATION = pa.schema([("tar", pa.uint8()), ("image_ext", pa.string()), *_RANGES, ("other", _OTHER)])
_SIZES = [("original_width", pa.int32()), ("original_height", pa.int32())]
IDENTITY = pa.schema([("uid", pa.string()), ("key", pa.string()), ("text", pa.string()), *_SIZES])
SOURCE = pa.field("source", pa.dictionary(pa.int32(), pa.string()))  # where a sample came from
HERE = "."  # location of tars in the directory of the pool itself
ROLES = {"txt": "text", "json": "json"}  # extension: prefix of its columns


def locate(members: Mapping[str, Member], tar: int = 0) -> dict[str, Any]:
    """The LOCATION columns of one sample whose members, by extension, are in the given tar of the shard's list."""
    image = image_extension(members)
    row: dict[str, Any] = {"tar": tar, "image_ext": image}
    for name, ext in (("image", image), ("text", "txt"), ("json", "json")):
        member = members.get(ext) if ext else None
        row[f"{name}_offset"] = member.offset if member else None
        row[f"{name}_size"] = member.size if member else None
    row["other"] = [
        {"ext": member.ext, "offset": member.offset, "size": member.size}
        for ext, member in members.items()
        if ext != image and ext not in ROLES
    ]
    return row


def located(table: pa.Table, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table with its LOCATION columns replaced by those of `rows`, at the end."""
    table = table.drop_columns([name for name in table.column_names if name in LOCATION.names])
    for item in LOCATION:
        table = table.append_column(item, pa.array([row[item.name] for row in rows], item.type))
    return table


def with_source(table: pa.Table, name: str) -> pa.Table:
    """A table with the column `source`, dictionary-encoded; the given name where it says nothing."""
    known = table[SOURCE.name].to_pylist() if SOURCE.name in table.column_names else [None] * table.num_rows
    values = pa.array([name if value is None else str(value) for value in known], SOURCE.type)
    if SOURCE.name in table.column_names:
        return table.set_column(table.column_names.index(SOURCE.name), SOURCE, values)
    return table.append_column(SOURCE, values)


def write_view(file: Any, table: pa.Table) -> None:
    """Write a view parquet to a local path or a file object; equal tables give equal bytes."""
    pq.write_table(table, file, compression="zstd", compression_level=1)

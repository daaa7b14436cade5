"""Reading the members of samples by byte range."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow import int_values
from winnow.infra.pool.views import LOCATION, ROLES
from winnow.infra.stages.kept import check

_NONE = -1  # offset of a member that a sample does not have


def read_members(tars: Sequence[str], table: pa.Table, member: str) -> list[bytes]:
    """One member of each row, read in file order; b"" where a row has none.

    Args:
        tars: the shard's.
        table: rows of a view, with `tar` and the columns of the member: `image_offset` and `image_size` for "image"
            (likewise "text" and "json"), all of LOCATION for an extension.
        member: "image", "text", "json", or an extension.

    Raises:
        WinnowError: a tar has changed since it was indexed.
    """
    offset, size = member_ranges(table, member)
    tar = int_values(table["tar"])
    out: list[bytes] = [b""] * table.num_rows
    for index in np.unique(tar[offset != _NONE]):
        rows = np.nonzero((tar == index) & (offset != _NONE))[0]
        rows = rows[np.argsort(offset[rows], kind="stable")]
        for row, data in zip(rows, _read(tars[index], offset[rows].tolist(), size[rows].tolist()), strict=True):
            out[row] = data
    return out


def member_ranges(table: pa.Table, member: str) -> tuple[np.ndarray, np.ndarray]:
    """Offset and size in bytes of one member of each row, int64 [n] each; -1 where a row has none."""
    name = ROLES.get(member, member)
    if f"{name}_offset" in table.column_names:
        return int_values(table[f"{name}_offset"], _NONE), int_values(table[f"{name}_size"], _NONE)
    rows = table.select(LOCATION.names).to_pylist()
    ranges = np.array([_ranges(row).get(name, (_NONE, _NONE)) for row in rows], np.int64).reshape(-1, 2)
    return ranges[:, 0], ranges[:, 1]


def _read(tar: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    found = storage.read_ranges(tar, offsets, sizes)
    check(tar)
    if any(len(data) != size for data, size in zip(found, sizes, strict=True)):
        raise WinnowError("is shorter than when it was indexed", where=tar, do="Index the pool again.")
    return found


class MemberBlock:
    """The members of some samples of a shard, given their LOCATION columns, read when they are asked for.

    Extensions in `together` are read for all samples at once, at the first access; others one by one.
    """

    def __init__(self, tars: Sequence[str], rows: Sequence[Mapping[str, Any]], together: Collection[str]) -> None:
        self._tars, self._together = tars, together
        self._tar = [row["tar"] for row in rows]
        self._ranges = [_ranges(row) for row in rows]
        self._read: dict[str, dict[int, bytes]] = {}

    def extensions(self, row: int) -> Collection[str]:
        return self._ranges[row].keys()

    def get(self, row: int, ext: str) -> bytes:
        """A member of a sample. Raises KeyError when it has none of that extension."""
        offset, size = self._ranges[row][ext]
        if ext not in self._together:
            return _read(self._tars[self._tar[row]], [offset], [size])[0]
        if ext not in self._read:
            self._read[ext] = self._all(ext)
        return self._read[ext][row]

    def _all(self, ext: str) -> dict[int, bytes]:
        found, by_tar = dict[int, bytes](), defaultdict[int, list[int]](list)
        for i, there in enumerate(self._ranges):
            if ext in there:
                by_tar[self._tar[i]].append(i)
        for tar, rows in by_tar.items():
            offsets, sizes = [self._ranges[i][ext][0] for i in rows], [self._ranges[i][ext][1] for i in rows]
            found |= zip(rows, _read(self._tars[tar], offsets, sizes), strict=True)
        return found


class Members(Mapping[str, bytes]):
    """The members of one sample of a block, by extension."""

    def __init__(self, block: MemberBlock, row: int) -> None:
        self._block, self._row = block, row

    def __getitem__(self, ext: str) -> bytes:
        return self._block.get(self._row, ext)

    def __iter__(self) -> Iterator[str]:
        return iter(self._block.extensions(self._row))

    def __len__(self) -> int:
        return len(self._block.extensions(self._row))

    def __contains__(self, ext: object) -> bool:
        return ext in self._block.extensions(self._row)


def _ranges(row: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Offset and size of each member by extension."""
    found = {row["image_ext"]: (row["image_offset"], row["image_size"])} if row["image_ext"] else {}
    for ext, name in ROLES.items():
        if row[f"{name}_offset"] is not None:
            found[ext] = row[f"{name}_offset"], row[f"{name}_size"]
    for member in row["other"] or ():
        found[member["ext"]] = member["offset"], member["size"]
    return found

"""Joining the rows of a tar with those of the parquet next to it. What the two disagree on is skipped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import decoded, float_values, is_text, mask_array, null_mask, number_array, plain, utf8
from winnow.infra.io.parquet import read_parquet
from winnow.infra.pool.matching import ONLY_PARQUET as ONLY_PARQUET
from winnow.infra.pool.matching import Facts, Matching, best_matching, caption_of
from winnow.infra.pool.rows import table_of
from winnow.infra.pool.views import IDENTITY, LOCATION
from winnow.infra.stages.stage import Skipped

# Columns of img2dataset that describe the download, not the sample, and what its `status` says.
_DOWNLOAD = ("status", "error_message", "exif")
_STATUS = frozenset(("success", "failed_to_download", "failed_to_resize"))
_IDS = ("uid", "url", "sha256")  # compared wherever tar and parquet both have them
_SIZES = ("original_width", "original_height")
_NAMES = {"text": "caption"}  # what columns are called in reasons
_HEX = frozenset("0123456789abcdef")


def read_rows(url: str, shard: str, skipped: list[Skipped]) -> pa.Table | None:
    """A shard's parquet in plain types, without the rows whose download failed, as img2dataset lists them; None,
    reported in `skipped`, if it is unreadable."""
    try:
        table = plain(read_parquet(url))
    except WinnowError as error:
        skipped.append(Skipped(shard, "unreadable parquet", error.what))
        return None
    status = table["status"] if "status" in table.column_names else pa.chunked_array([], pa.null())
    # A column `status` with anything else is the user's.
    if pa.types.is_string(status.type) and _STATUS.issuperset(status.unique().to_pylist()):
        table = table.filter(pc.equal(status, "success"))
        table = table.drop_columns([name for name in _DOWNLOAD if name in table.column_names])
    return table


def join(
    rows: list[dict[str, Any]],
    parquet: pa.Table,
    shard: str,
    skipped: list[Skipped],
    unusable: Collection[Facts] = (),
) -> pa.Table:
    """A view: the tar's rows, with the columns of the parquet.

    Rows are matched by what identifies the most of them: uid, key (as written, else without folder, extension or
    leading zeros), url, sha256, or, where none of these identifies any, a caption that is unique. Then uid, url,
    sha256, caption and label must agree as far as both have them. `skipped` gets the samples that are in one of the two
    alone, differ between them, or occur twice.

    Args:
        unusable: key and identities of samples of the tar that have been skipped, whose rows are not reported again.

    Raises:
        WinnowError: no column identifies the rows, or a column has the name of one of the pool's.
    """
    rest = _Parquet(parquet)
    matching = best_matching(rows, rest.words, rest.numbers)
    if matching is None:
        what = f"the parquet ({parquet.num_rows} rows) and the tar ({len(rows)} samples) have no column to join them by"
        raise WinnowError(what, where=shard, do="Add a column key, uid, url or sha256 to the parquet.")
    reasons = rest.reasons(rows, matching)
    skipped += [Skipped(f"{shard}/{rows[i]['key']}", reason) for i, reason in sorted(reasons.items())]
    kept = [row for i, row in enumerate(rows) if i not in reasons]
    take = [at for i, at in enumerate(matching.found) if i not in reasons]
    for name, column in (("uid", "uid"), ("text", "caption" if "caption" in rest.words else "text")):
        for row, at in zip(kept, take, strict=True) if column in rest.words else ():
            if row[name] is None:
                row[name] = rest.words[column][at]
    skipped += matching.left_over(shard, unusable)
    return rest.columns_of(table_of(kept), np.array(take, np.int64))


class _Parquet:
    """The rows of a parquet.

    Attributes:
        words: what identifies them, as strings by column.
        numbers: whether the keys are numbers.
        faults: why a row cannot be used, by row.
    """

    def __init__(self, table: pa.Table) -> None:
        names = set(table.column_names)
        taken = sorted(names & set(LOCATION.names))
        if taken and not {"tar", "image_offset"} <= names:  # else it is a view of ours
            raise WinnowError(f'the parquet has a column "{taken[0]}", as a pool has for itself', do="Rename it.")
        self.faults: dict[int, str] = {}
        self._table = self._readable(table)
        for name in _SIZES:
            if name in names:
                self._use_sizes(name)
        self._label = _whole(table["label"]) if "label" in names else None
        asked = ("key", *_IDS, "text", *(() if "text" in names else ("caption",)))
        self.words = {name: _words(name, self._table[name]) for name in asked if name in names}
        self.numbers = "key" in names and not is_text(self._table["key"].type)

    def _readable(self, table: pa.Table) -> pa.Table:
        """The table with null for strings that are not UTF-8, which Arrow does not check."""
        for i, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
            if pa.types.is_string(kind):
                column, bad = utf8(table[i])
                self.faults.update(dict.fromkeys(bad, "a name or text is not UTF-8"))
                table = table.set_column(i, name, column) if bad else table
                continue
            try:
                table[i].validate(full=True)
            except pa.ArrowInvalid as error:
                raise WinnowError(f'the column "{name}" cannot be read ({error})') from None
        return table

    def _use_sizes(self, name: str) -> None:
        """Make a column of sizes one of int32, with NaN as null. A row with anything else is at fault."""
        column = self._table[name]
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            values = float_values(column).astype(np.float64)
        else:
            values = np.array([_number(value) for value in column.to_pylist()], np.float64)
        with np.errstate(invalid="ignore"):
            good = (values >= 0) & (values < 1 << 31) & (np.floor(values) == values)
        bad = np.flatnonzero(~good & ~np.isnan(values)).tolist()
        self.faults.update(dict.fromkeys(bad, f"{name} is not a size"))
        sizes = number_array(np.where(good, values, 0).astype(np.int32))
        sizes = pa.chunked_array([pc.if_else(mask_array(good), sizes, None)])
        self._table = self._table.set_column(self._table.column_names.index(name), name, sizes)

    def reasons(self, rows: list[dict[str, Any]], matching: Matching) -> dict[int, str]:
        """Why samples of the tar cannot be used with their row, by index; none for those that can."""
        found = matching.found
        reasons = {i: reason for i, at in enumerate(found) if (reason := matching.reason(at) or self.faults.get(at))}
        columns: dict[str, Sequence[Any]] = {n: self.words[n] for n in (*_IDS, "text") if n in self.words}
        if self._label is not None:
            columns["label"] = self._label
        for name, values in columns.items():
            theirs = [values[at] if at >= 0 else None for at in found]
            mine = [row.get(name) for row in rows]
            if mine == theirs:
                continue
            for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
                if one is not None and other is not None and one != other and _unlike(name, one, other):
                    reasons.setdefault(i, f"{_NAMES.get(name, name)} differs between tar and parquet")
        return reasons

    def columns_of(self, table: pa.Table, take: np.ndarray) -> pa.Table:
        """A view with the columns of the parquet's given rows; what these lack is that of the tar."""
        theirs = self._table.take(number_array(take))
        for name in _SIZES:
            if name in theirs.column_names:
                sizes = pc.coalesce(theirs[name], table[name].cast(pa.int32()))
                table = table.set_column(table.column_names.index(name), name, sizes)
        known = {*IDENTITY.names, *LOCATION.names}
        for name in theirs.column_names:
            column = theirs[name]
            if name in known or pa.types.is_null(column.type):
                continue
            if name == "label" and self._label is not None:
                column = pa.chunked_array([pa.array([self._label[at] for at in take], pa.int64())])
            elif name == "label" and name in table.column_names:
                what = f'the parquet has {column.type} in the column "label", and the tar whole numbers (.cls or .json)'
                raise WinnowError(what, do="Rename the column.")
            if name in table.column_names:
                if column.type == table[name].type and column.null_count:
                    column = pc.coalesce(column, table[name])
                table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table


def _unlike(name: str, mine: Any, theirs: Any) -> bool:
    if name == "text":
        return caption_of(mine) != caption_of(theirs)
    return bool(mine) and (name != "sha256" or mine.lower() != theirs) if name in _IDS else True


def _words(name: str, column: pa.ChunkedArray) -> list[str | None]:
    """A column as strings: whole numbers as their digits, the 16 bytes of a uid and 32 of a sha256 as hexadecimal."""
    values = column.to_pylist()
    if pa.types.is_binary(column.type):
        size = {"uid": 16, "sha256": 32}.get(name)
        values = [one if one is None else one.hex() if len(one) == size else decoded(one) for one in values]
    elif pa.types.is_floating(column.type):
        values = [str(int(one)) if one is not None and one.is_integer() else None for one in values]
    elif not is_text(column.type):
        values = [None if one is None else str(one) for one in values]
    if name in ("uid", "sha256"):
        return [one.lower() if one else None for one in values]
    return values if name in ("text", "caption") else [one or None for one in values]


def _number(value: Any) -> float:
    """A size that is not of a number type; infinite where it is no number."""
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        return float("inf")


def _whole(column: pa.ChunkedArray) -> list[int | None] | None:
    """A column of whole numbers below 2^63, NaN as null; None for any other."""
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(column.type):
        values = [None if one != one else one for one in values]
        if not all(one is None or one.is_integer() for one in values):
            return None
    elif not pa.types.is_integer(column.type):
        return None
    if any(one is not None and abs(one) >= 1 << 63 for one in values):
        return None
    return [None if one is None else int(one) for one in values]


def usable(table: pa.Table, shard: str, skipped: list[Skipped], captions: bool) -> pa.Table:
    """The view without rows whose uid is invalid or occurs earlier in the shard and, if captions are required, without
    those that have none."""
    seen: set[str] = set()
    keep = []
    bare = (null_mask(table["text"]) & captions).tolist()
    for uid, key, lacking in zip(table["uid"].to_pylist(), table["key"].to_pylist(), bare, strict=True):
        valid = isinstance(uid, str) and len(uid) == 32 and _HEX.issuperset(uid)
        keep.append(valid and not lacking and uid not in seen)
        if not keep[-1]:
            reason = "missing caption" if lacking else "duplicated uid" if valid else "uid is not 32 hex characters"
            skipped.append(Skipped(f"{shard}/{key}", reason))
        seen.add(uid)
    return table if all(keep) else table.filter(mask_array(np.array(keep)))

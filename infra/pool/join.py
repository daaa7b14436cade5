"""Joining the rows of a tar with those of the parquet next to it. What the two disagree on is skipped."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import WinnowError
from winnow.infra.io.parquet import read_parquet
from winnow.infra.pool.rows import table_of
from winnow.infra.pool.views import IDENTITY, LOCATION
from winnow.infra.stages.stage import Skipped

# Columns of img2dataset that describe the download, not the sample.
_DOWNLOAD = {"status", "error_message", "exif"}
ONLY_PARQUET = "in the parquet but not in the tar"
_HEX = frozenset("0123456789abcdef")


def read_rows(url: str, shard: str, skipped: list[Skipped]) -> pa.Table | None:
    """A shard's parquet without the rows whose download failed; None, reported in `skipped`, if it is unreadable."""
    try:
        table = read_parquet(url)
    except WinnowError as error:
        skipped.append(Skipped(shard, "unreadable parquet", error.what))
        return None
    return table.filter(pc.equal(table["status"], "success")) if "status" in table.column_names else table


def join(rows: list[dict[str, Any]], parquet: pa.Table, shard: str, skipped: list[Skipped]) -> pa.Table:
    """A view: the tar's rows, with the columns of the parquet.

    `skipped` gets the samples that are in one of the two alone, or differ between them.

    Raises:
        WinnowError: no column identifies the rows.
    """
    by, tar_values, parquet_values = _identity(rows, parquet, shard)
    index = {value: i for i, value in enumerate(parquet_values)}
    reported = {item.id for item in skipped}
    columns = {name: parquet[name].to_pylist() for name in ("uid", "text") if name in parquet.column_names}
    kept, take = [], []
    for row, value in zip(rows, tar_values, strict=True):
        at = index.pop(value, None)
        reason = "in the tar but not in the parquet" if at is None else _difference(row, columns, at)
        if reason is not None or at is None:
            skipped.append(Skipped(f"{shard}/{row['key']}", str(reason)))
            continue
        if "uid" in columns and columns["uid"][at]:
            row["uid"] = columns["uid"][at]
        if "text" in columns and row["text"] is None:
            row["text"] = columns["text"][at]
        kept.append(row)
        take.append(at)
    for value in index:
        if f"{shard}/{value}" not in reported:
            skipped.append(Skipped(f"{shard}/{value}", f"{ONLY_PARQUET} (by {by})"))
    return _with_columns(table_of(kept), parquet.take(pa.array(take, pa.int64())))


def _identity(rows: list[dict[str, Any]], parquet: pa.Table, shard: str) -> tuple[str, list[Any], list[Any]]:
    """The column to join by, and its values in the tar and in the parquet."""
    names = parquet.column_names
    if "key" in names:
        return "key", [row["key"].rpartition("/")[2] for row in rows], [str(key) for key in parquet["key"].to_pylist()]
    for name in ("uid", "url", "sha256"):
        if name in names and all(name in row["from_json"] for row in rows):
            tar_values, values = [row.get(name) for row in rows], parquet[name].to_pylist()
            unique = len(set(tar_values)) == len(tar_values) and len(set(values)) == len(values)
            if name == "uid" or (unique and None not in tar_values):
                return name, tar_values, values
    # By order only where captions can show that the order is the same.
    if parquet.num_rows == len(rows) and "text" in names and any(row["text"] is not None for row in rows):
        return "order", list(range(len(rows))), list(range(len(rows)))
    what = f"the parquet ({parquet.num_rows} rows) and the tar ({len(rows)} samples) have no column to join them by"
    raise WinnowError(what, where=shard, do="Add a column key, uid, url or sha256 to the parquet.")


def _difference(row: dict[str, Any], columns: dict[str, list[Any]], at: int) -> str | None:
    """Why a row of the tar and one of the parquet are not the same sample; None if they are."""
    if "uid" in columns and "uid" in row["from_json"] and row["uid"] != columns["uid"][at]:
        return "uid differs between tar and parquet"
    text = columns["text"][at] if "text" in columns else None
    if row["text"] is not None and text is not None and row["text"] != text:
        return "caption differs between tar and parquet"
    return None


def _with_columns(table: pa.Table, parquet: pa.Table) -> pa.Table:
    """The view with the columns of the parquet; sizes that the parquet lacks are those of the stored image."""
    for name in ("original_width", "original_height"):
        if name in parquet.column_names:
            sizes = pc.coalesce(parquet[name].cast(pa.int32()), table[name].cast(pa.int32()))
            table = table.set_column(table.column_names.index(name), name, sizes)
    known = {*_DOWNLOAD, *IDENTITY.names, *LOCATION.names}
    for name in parquet.column_names:
        if name in known or pa.types.is_null(parquet[name].type):
            continue
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, parquet[name])
    return table


def without_duplicates(table: pa.Table, shard: str, skipped: list[Skipped]) -> pa.Table:
    """The view without rows whose uid is invalid or occurs earlier in the shard."""
    seen: set[str] = set()
    keep = []
    for uid, key in zip(table["uid"].to_pylist(), table["key"].to_pylist(), strict=True):
        valid = isinstance(uid, str) and len(uid) == 32 and _HEX.issuperset(uid)
        keep.append(valid and uid not in seen)
        if not keep[-1]:
            reason = "duplicated uid" if valid else "uid is not 32 hex characters"
            skipped.append(Skipped(f"{shard}/{key}", reason))
        seen.add(uid)
    return table if all(keep) else table.filter(pa.array(keep, pa.bool_()))

"""Arrow values as JSON holds them: dates as ISO 8601, bytes as base64, decimals as their digits, no NaN."""

from __future__ import annotations

import base64
import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as t

from winnow.infra.errors import WinnowError

_DIGITS = {"s": 0, "ms": -3, "us": -6, "ns": -9}
_LEAVES = (t.is_null, t.is_boolean, t.is_integer, t.is_floating, t.is_decimal, t.is_date, t.is_time, t.is_timestamp)
_TEXTS = (t.is_string, t.is_large_string, t.is_string_view)
_BYTES = (t.is_binary, t.is_large_binary, t.is_binary_view, t.is_fixed_size_binary)
_LISTS = (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)


def check_json(schema: pa.Schema, where: str) -> None:
    """Raises WinnowError when JSON cannot hold a column (intervals, unions)."""
    for field in schema:
        if not _expressible(field.type):
            what = f'JSON cannot hold the column "{field.name}", whose type is {field.type}'
            raise WinnowError(what, where=where, do="Leave the column out of the parquet, or write it as text.")


def json_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows by column, without null and non-finite values, as `json.dumps` takes them."""
    columns = {name: _values(table[name]) for name in table.column_names}
    rows = zip(*columns.values(), strict=True)
    return [{name: value for name, value in zip(columns, row, strict=True) if value is not None} for row in rows]


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object, with null for the numbers that are not finite; {} where the bytes are none."""
    try:
        found = json.loads(data, parse_constant=lambda _: None, parse_float=lambda digits: _finite(float(digits)))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def json_bytes(value: Any) -> bytes:
    """A value of `json_rows` or `json_object` as the content of a file."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
        return json.dumps(value, allow_nan=False).encode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _any(kinds: tuple[Any, ...], kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in kinds)


def _expressible(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _expressible(kind.storage_type)
    if t.is_dictionary(kind) or _any(_LISTS, kind):
        return _expressible(kind.value_type)
    if t.is_struct(kind):
        return all(_expressible(field.type) for field in kind)
    if t.is_map(kind):
        return _any(_TEXTS, kind.key_type) and _expressible(kind.item_type)
    return _any((*_LEAVES, *_TEXTS, *_BYTES, t.is_duration), kind)


def _values(column: pa.ChunkedArray) -> list[Any]:
    result: list[Any] = column.to_pylist() if _as_it_is(column) else [json_value(value) for value in column]
    return result


def _as_it_is(column: pa.ChunkedArray) -> bool:
    """Whether the column's Python values are those of JSON."""
    kind = column.type
    if t.is_floating(kind):
        finite = pc.is_finite(column.cast(pa.float32()) if t.is_float16(kind) else column)
        return pc.all(finite).as_py() is not False
    if _any(_LISTS[:3], kind):
        return _as_it_is(pc.list_flatten(column))
    return _any((*_LEAVES[:3], *_TEXTS), kind.value_type if t.is_dictionary(kind) else kind)


def json_value(value: pa.Scalar) -> Any:
    """One value as JSON holds it.

    Null and non-finite numbers are None. Dates, times and timestamps are ISO 8601 with as many digits of a second as
    they have, in UTC ("Z") where a time zone is known; durations are ISO 8601 in seconds; bytes are base64; decimals
    are text, which keeps their digits.

    Example:
        >>> import pyarrow as pa
        >>> [json_value(value) for value in pa.array([1_500_000_000], pa.timestamp("ns"))]
        ['1970-01-01T00:00:01.5']
    """
    kind = value.type
    if not value.is_valid:
        return None
    if isinstance(kind, pa.BaseExtensionType) or t.is_dictionary(kind):
        return json_value(value.value)
    if t.is_map(kind):
        return {entry["key"].as_py(): json_value(entry["value"]) for entry in value.values}
    if _any(_LISTS, kind):
        return [json_value(item) for item in value.values]
    if t.is_struct(kind):
        return {field.name: json_value(value[i]) for i, field in enumerate(kind)}
    if t.is_floating(kind):
        return _finite(float(value.as_py()))
    if _any(_BYTES, kind):
        return base64.b64encode(value.as_py()).decode()
    return _text(value) if t.is_temporal(kind) or t.is_decimal(kind) else value.as_py()


def _text(value: pa.Scalar) -> str:
    kind = value.type
    if t.is_decimal(kind):
        return str(value.as_py())
    if t.is_duration(kind):
        return f"PT{Decimal(value.value).scaleb(_DIGITS[kind.unit]):f}S"
    if t.is_date(kind):
        return str(np.datetime64(value.value, "D" if t.is_date32(kind) else "ms").astype("datetime64[D]"))
    text = str(np.datetime64(value.value, kind.unit))
    text = text.rstrip("0").removesuffix(".") if "." in text else text
    return text.partition("T")[2] if t.is_time(kind) else text + "Z" * bool(kind.tz)

"""Tables whose columns differ in type, as one."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from winnow.infra.errors import WinnowError
from winnow.infra.io.arrow import plain, plain_type

_DO = "Write the column with one type in all shards."


def common_schema(schemas: Sequence[pa.Schema], where: Sequence[str]) -> pa.Schema:
    """The columns of all schemas, in order, each with the narrowest type that holds its values in all of them: the
    wider of two numbers, the finer of two units of time, text in place of null.

    Args:
        schemas: at least one.
        where: the file of each, for the message.

    Raises:
        WinnowError: there is no such type, as for text and numbers.
    """
    found: dict[str, tuple[pa.DataType, str]] = {}
    for schema, url in zip(schemas, where, strict=True):
        for field in schema:
            kind, first = found.get(field.name, (field.type, url))
            found[field.name] = _wider(field, kind, first, url), first
    return pa.schema([(name, kind) for name, (kind, _) in found.items()])


def _wider(field: pa.Field, kind: pa.DataType, first: str, url: str) -> pa.DataType:
    if field.type == kind or pa.types.is_null(field.type):
        return kind
    if pa.types.is_null(kind):
        return field.type
    both = [pa.schema([(field.name, plain_type(each))]) for each in (kind, field.type)]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        what = f'the column "{field.name}" is {kind} in {first} and {field.type} here, which have no type in common'
        raise WinnowError(what, where=url, do=_DO) from None


def concat_columns(tables: Sequence[pa.Table], where: Sequence[str]) -> pa.Table:
    """The rows of all tables (at least one) with the columns of `common_schema`; null where a table lacks one.

    Raises:
        WinnowError: there is no common type, or a value does not fit into it.
    """
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    schema = common_schema([table.schema for table in tables], where)
    return pa.concat_tables([_cast(table, schema, url) for table, url in zip(tables, where, strict=True)])


def _cast(table: pa.Table, schema: pa.Schema, url: str) -> pa.Table:
    columns = []
    table = plain(table, leave=[field.name for field in schema if field in table.schema])
    for field in schema:
        try:
            known = field.name in table.column_names
            columns.append(table[field.name].cast(field.type) if known else pa.nulls(table.num_rows, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            what = f'a value of the column "{field.name}" does not fit {field.type}, which other shards need ({error})'
            raise WinnowError(what, where=url, do=_DO) from None
    return pa.table(columns, schema=schema)

"""Pools of samples in tar shards, as later stages see them: one view parquet a shard, members by byte range."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow import is_text, mask_array, plain, utf8
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.parquet import open_parquet, unreadable
from winnow.infra.io.prefetch import prefetch
from winnow.infra.io.schemas import concat_columns
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.members import MemberBlock, Members, read_members
from winnow.infra.pool.metadata import FEATURES, feature_dims, is_metadata, metadata_files, read_feature
from winnow.infra.pool.sample import Sample
from winnow.infra.pool.uids import decode_uids, uid_column
from winnow.infra.pool.views import HERE, IDENTITY, LOCATION, SOURCE
from winnow.infra.stages.kept import MANIFEST, KeptFile, check
from winnow.infra.stages.stage import Manifest, need_manifest, read_checksums, read_locations

# Columns that `Shard.samples` needs, to be read with `Shard.table`.
SAMPLE = ("uid", "key", "text", *LOCATION.names)


@dataclass(frozen=True)
class Shard:
    """A shard of a pool.

    Attributes:
        name: file stem.
        view: URL of its view parquet; a KeptFile, as the tars, where its content is known.
        tars: URLs of the tars the view's `tar` column counts in; none in a metadata folder.
        count: samples, without the dropped ones; None to count them when `rows` is asked for.
        digest: of the view and of the tars' content.
        dropped: rows of the view that are skipped (their uid is in an earlier shard).
        features: URL of the .npz next to a metadata parquet; its arrays are columns too.
    """

    name: str
    view: str
    tars: tuple[str, ...]
    count: int | None
    digest: str
    dropped: tuple[int, ...] = ()
    features: str | None = None

    @functools.cached_property
    def rows(self) -> int:
        """Samples, without the dropped ones."""
        if self.count is not None:
            return self.count
        with self._open() as parquet:
            return int(parquet.metadata.num_rows)

    def _open(self) -> pq.ParquetFile:
        check(self.view)
        return open_parquet(self.view)

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        with self._open() as parquet:
            schema = parquet.schema_arrow
        for name, dim in feature_dims(self.features).items() if self.features else ():
            schema = schema.append(pa.field(name, pa.list_(pa.float16(), dim)))
        return schema

    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema().names)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns in tar order and plain types; one that the shard does not have is null. Shape [rows].

        Raises:
            WinnowError: the file cannot be read or is damaged, or a metadata parquet does not have the column.
        """
        with self._open() as parquet:
            try:
                table = parquet.read(columns=columns, use_threads=False)
                missing = () if columns is None else sorted(set(columns) - set(table.column_names))
                if columns is not None and not table.num_columns:
                    table = parquet.read(columns=["uid"], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.view, error) from error
        table = self._plain(table)
        if missing and not self.tars:
            table = self._with_features(table, missing)
        if self.dropped:
            keep = np.ones(table.num_rows, dtype=bool)
            keep[list(self.dropped)] = False
            table = table.filter(mask_array(keep))
        if columns is not None and table.column_names != list(columns):
            for name in set(columns) - set(table.column_names):
                table = table.append_column(name, pa.nulls(table.num_rows, _type_of(name)))
            table = table.select(columns)
        return table

    def _plain(self, table: pa.Table) -> pa.Table:
        """The table in plain types. Uids and captions are text also where their writer did not mark them as such;
        captions of metadata that are not UTF-8 are null."""
        table = plain(table, leave=(SOURCE.name,))
        for i, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
            if name == "uid" and pa.types.is_binary(kind):
                table = table.set_column(i, name, uid_column(decode_uids(table[i])))
            elif name == "text" and not self.tars and is_text(kind):
                table = table.set_column(i, name, utf8(table[i])[0])
        return table

    def _with_features(self, table: pa.Table, names: Iterable[str]) -> pa.Table:
        for name in names:
            if name not in FEATURES:
                raise WinnowError(f'has no column "{name}"', where=self.view)
            if self.features is None:
                do = "Download the features next to the parquet."
                raise WinnowError(f'no "{name}": {self.name}.npz is missing', where=self.view, do=do)
            table = table.append_column(name, read_feature(self.features, name, table.num_rows))
        return table

    def uids(self) -> np.ndarray:
        """dtype u8,u8, shape [rows]."""
        return decode_uids(self.table(["uid"])["uid"])

    def image_bytes(self, table: pa.Table) -> list[bytes]:
        """The encoded images of rows of the view, which must hold `tar`, `image_offset` and `image_size`; b"" where
        there is none."""
        return read_members(self.tars, table, "image")

    def member_bytes(self, table: pa.Table, ext: str) -> list[bytes]:
        """The member with an extension of each row of the view, which must hold LOCATION; b"" where there is none."""
        return read_members(self.tars, table, ext)

    def samples(
        self, table: pa.Table, columns: Sequence[str] = (), together: Collection[str] = EXTENSIONS, block: int = 256
    ) -> Iterator[Sample]:
        """The rows of a table as samples whose members are read when they are asked for.

        Args:
            table: rows of the view with the columns SAMPLE, and any others.
            columns: of the table that the samples hold as `columns`. A column `label` of integers becomes the label.
            together: extensions that are read for `block` samples at once, in few requests. Others are read one by one.

        Example:
            >>> def durations(shard: Shard) -> list[int]:
            ...     return [len(sample.member("wav")) for sample in shard.samples(shard.table(SAMPLE))]
        """
        for start in range(0, table.num_rows, block):
            rows = table.slice(start, block).to_pylist()
            members = MemberBlock(self.tars, rows, together)
            for i, row in enumerate(rows):
                identity: dict[str, Any] = {name: row[name] or "" for name in ("uid", "key", "text")}
                label = row["label"] if isinstance(row.get("label"), int) else None
                asked = {name: row[name] for name in columns}
                yield Sample(**identity, label=label, columns=asked, members=Members(members, i))


def _finder(url: str, manifest: Manifest) -> Callable[[str], str]:
    """A function from references ("location/path") in a pool's manifest to URLs with what is known of the content."""
    locations, since = read_locations(url), storage.join(url, MANIFEST)
    sources = read_checksums(url).get("read", {})

    def file(reference: str) -> str:
        location, _, path = reference.partition("/")
        if location == HERE:
            facts, inside = manifest.files.get(path), storage.join(url, path)
            return KeptFile.written(inside, facts, since) if facts else inside
        outside = storage.join(locations[location], path)
        token, sha256 = sources.get(reference, ("", ""))
        return KeptFile.read(outside, sha256, token) if token else outside

    return file


def _type_of(column: str) -> pa.DataType:
    types = {field.name: field.type for schema in (IDENTITY, LOCATION) for field in schema}
    return types.get(column, pa.null())


@dataclass(frozen=True)
class Pool:
    """A pool: a directory made by `index`, `inject` or `reshard`, or DataComp's folder of metadata.

    Attributes:
        url: the directory.
        shards: in order.
        digest: of all shards' content; the pool's path is not part of it.
        lost: names of shards that belong to it and cannot be read.
    """

    url: str
    shards: tuple[Shard, ...]
    digest: str
    lost: tuple[str, ...] = ()

    @staticmethod
    def open(url: str) -> Pool:
        """Open a pool. Raises WinnowError when the directory is not one."""
        if is_metadata(url):
            shards = [
                Shard(stem, view, (), None, digest_json(token), features=features)
                for stem, view, features, token in metadata_files(url)
            ]
        else:
            manifest = need_manifest(url, "pool")
            if "shards" not in manifest.values:
                raise WinnowError(f"is the output of {manifest.stage}, not a pool", where=url)
            file, shards = _finder(url, manifest), []
            for entry in manifest.values["shards"]:
                tars, dropped = tuple(map(file, entry["tars"])), tuple(entry.get("dropped", ()))
                view = file(f"{HERE}/{entry['view']}")
                shards.append(Shard(entry["name"], view, tars, entry["rows"], entry["digest"], dropped))
        return Pool(url, tuple(shards), digest_json([[shard.name, shard.digest] for shard in shards]))

    def without(self, lost: Collection[str]) -> Pool:
        """The pool without the named shards, which cannot be read."""
        return replace(self, shards=tuple(shard for shard in self.shards if shard.name not in lost), lost=tuple(lost))

    def __len__(self) -> int:
        return sum(prefetch(lambda shard: shard.rows, self.shards))

    @property
    def counted(self) -> bool:
        """Whether the number of samples is known without opening the views."""
        return all(shard.count is not None for shard in self.shards)

    @property
    def images(self) -> bool:
        """Whether the pool has tars, so that images and other members can be read; a folder of metadata has none."""
        return all(shard.tars for shard in self.shards)

    def shard(self, name: str) -> Shard:
        return next(shard for shard in self.shards if shard.name == name)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Shard, pa.Table]]:
        for shard in self.shards:
            yield shard, shard.table(columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the whole pool; for small pools and reports."""
        if not self.shards:
            return pa.chunked_array([], pa.null())
        shards, tables = zip(*self.tables([name]), strict=True)
        return concat_columns(tables, [shard.view for shard in shards])[name]

    def uids(self) -> np.ndarray:
        """dtype u8,u8, shape [n], in pool order."""
        parts = [shard.uids() for shard in self.shards]
        return np.concatenate(parts) if parts else np.empty(0, dtype="u8,u8")

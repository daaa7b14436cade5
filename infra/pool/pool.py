"""Pools of samples in tar shards as later stages see them: one view parquet a shard, images by byte range."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.arrow import mask_array
from winnow.infra.io.parquet import open_parquet, unreadable
from winnow.infra.io.prefetch import prefetch
from winnow.infra.io.storage import digest_json
from winnow.infra.pool.metadata import FEATURES, feature_dims, is_metadata, metadata_files, read_feature
from winnow.infra.pool.uids import decode_uids
from winnow.infra.stages.stage import need_manifest, read_locations

# Where the members of a sample lie. `tar` counts in the shard's list of tars; sizes in bytes; null where there is none.
LOCATION = pa.schema(
    [
        ("tar", pa.uint8()),
        ("image_ext", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("other", pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))),
    ]
)
# What every view has beside that.
IDENTITY = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
    ]
)
HERE = "."


@dataclass(frozen=True)
class Shard:
    """A shard of a pool.

    Attributes:
        name: file stem.
        view: URL of its view parquet.
        tars: URLs of the tars the view's `tar` column counts in; none in a metadata folder.
        count: samples, without the dropped ones; None to count them when `rows` is asked for.
        digest: of the view and of the tars' content.
        dropped: row numbers in the view that are skipped (uids met before in another shard).
        features: URL of the .npz beside a metadata parquet; its arrays are columns too.
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
        with open_parquet(self.view) as parquet:
            return int(parquet.metadata.num_rows)

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        with open_parquet(self.view) as parquet:
            schema = parquet.schema_arrow
        for name, dim in feature_dims(self.features).items() if self.features else ():
            schema = schema.append(pa.field(name, pa.list_(pa.float16(), dim)))
        return schema

    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema().names)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns in tar order; one that the shard has not comes back null. Shape [rows].

        Raises:
            WinnowError: the file cannot be read, or a metadata parquet has not the column.
        """
        with open_parquet(self.view) as parquet:
            try:
                table = parquet.read(columns=columns, use_threads=False)
                lacking = () if columns is None else sorted(set(columns) - set(table.column_names))
                if columns is not None and not table.num_columns:
                    table = parquet.read(columns=["uid"], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(self.view, error) from error
        if lacking and not self.tars:
            table = self._with_features(table, lacking)
        if self.dropped:
            keep = np.ones(table.num_rows, dtype=bool)
            keep[list(self.dropped)] = False
            table = table.filter(mask_array(keep))
        if columns is not None and table.column_names != list(columns):
            arrays = [
                table[name] if name in table.column_names else pa.nulls(table.num_rows, _type_of(name))
                for name in columns
            ]
            table = pa.Table.from_arrays(arrays, names=list(columns))
        return table

    def _with_features(self, table: pa.Table, names: Iterable[str]) -> pa.Table:
        for name in names:
            if name not in FEATURES:
                raise WinnowError(f'has no column "{name}"', where=self.view)
            if self.features is None:
                raise WinnowError(
                    f'no "{name}": {self.name}.npz is missing', where=self.view, do="Fetch the features beside it."
                )
            table = table.append_column(name, read_feature(self.features, name, table.num_rows))
        return table

    def uids(self) -> np.ndarray:
        """dtype u8,u8, shape [rows]."""
        return decode_uids(self.table(["uid"])["uid"])

    def image_bytes(self, table: pa.Table) -> list[bytes]:
        """The encoded images of rows of the view, which must hold `tar`, `image_offset` and `image_size`."""
        return read_members(self.tars, table, "image")


def _type_of(column: str) -> pa.DataType:
    for schema in (IDENTITY, LOCATION):
        if column in schema.names:
            return schema.field(column).type
    return pa.null()


def read_members(tars: Sequence[str], table: pa.Table, member: str) -> list[bytes]:
    """The bytes of the `image`, `text` or `json` member of each row, read by range in file order."""
    tar = table["tar"].to_numpy()
    offset = table[f"{member}_offset"].to_numpy()
    size = table[f"{member}_size"].to_numpy()
    out: list[bytes] = [b""] * table.num_rows
    for index in np.unique(tar):
        rows = np.nonzero(tar == index)[0]
        rows = rows[np.argsort(offset[rows], kind="stable")]
        for row, data in zip(rows, storage.read_ranges(tars[index], offset[rows], size[rows]), strict=True):
            if len(data) != size[row]:
                raise WinnowError("is shorter than when it was indexed", where=tars[index], do="Index the pool again.")
            out[row] = data
    return out


@dataclass(frozen=True)
class Pool:
    """A pool: what `index`, `inject` and `reshard` leave in their directories, or DataComp's folder of metadata.

    Attributes:
        url: the directory.
        shards: in order.
        digest: of all shards' content; the pool's path is not part of it.
    """

    url: str
    shards: tuple[Shard, ...]
    digest: str

    @staticmethod
    def open(url: str) -> Pool:
        """Open a pool. Raises WinnowError when the directory is not one."""
        if is_metadata(url):
            shards = [
                Shard(stem, view, (), None, digest_json(token), features=features)
                for stem, view, features, token in metadata_files(url)
            ]
            return Pool(url, tuple(shards), digest_json([[shard.name, shard.digest] for shard in shards]))
        manifest = need_manifest(url, "pool")
        if "shards" not in manifest.values:
            raise WinnowError(f"is the output of {manifest.stage}, not a pool", where=url)
        locations = read_locations(url) | {HERE: url}
        shards = []
        for entry in manifest.values["shards"]:
            tars = []
            for reference in entry["tars"]:
                location, _, path = reference.partition("/")
                tars.append(storage.join(locations[location], path))
            shards.append(
                Shard(
                    name=entry["name"],
                    view=storage.join(url, entry["view"]),
                    tars=tuple(tars),
                    count=entry["rows"],
                    digest=entry["digest"],
                    dropped=tuple(entry.get("dropped", ())),
                )
            )
        return Pool(url, tuple(shards), digest_json([[shard.name, shard.digest] for shard in shards]))

    def __len__(self) -> int:
        return sum(prefetch(lambda shard: shard.rows, self.shards))

    @property
    def counted(self) -> bool:
        """Whether the number of samples is known without opening the views."""
        return all(shard.count is not None for shard in self.shards)

    @property
    def images(self) -> bool:
        """Whether the pool has images; a folder of metadata has not."""
        return all(shard.tars for shard in self.shards)

    def shard(self, name: str) -> Shard:
        return next(shard for shard in self.shards if shard.name == name)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[tuple[Shard, pa.Table]]:
        for shard in self.shards:
            yield shard, shard.table(columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the whole pool; for small pools and reports."""
        chunks = [chunk for _, table in self.tables([name]) for chunk in table[name].chunks]
        kinds = {chunk.type for chunk in chunks if not pa.types.is_null(chunk.type)}
        kind = kinds.pop() if kinds else pa.null()
        return pa.chunked_array([chunk.cast(kind) for chunk in chunks], type=kind)

    def uids(self) -> np.ndarray:
        """dtype u8,u8, shape [n], in pool order."""
        parts = [shard.uids() for shard in self.shards]
        return np.concatenate(parts) if parts else np.empty(0, dtype="u8,u8")


def shard_entry(
    name: str, view: str, view_digest: str, tars: Sequence[Sequence[str]], rows: int, dropped: list[int]
) -> dict:
    """A shard as a pool's manifest lists it.

    Args:
        name: the shard's.
        view: path of the view parquet, relative to the pool's directory.
        view_digest: sha256 of that file.
        tars: for each tar, in the order that the view counts them, its "place/path" and a digest of its content.
        rows: rows of the view.
        dropped: row numbers skipped.
    """
    return {
        "name": name,
        "view": view,
        "tars": [reference for reference, _ in tars],
        "rows": rows - len(dropped),
        "digest": digest_json([view_digest, [digest for _, digest in tars], dropped]),
        "dropped": dropped,
    }


def write_view(path: str, table: pa.Table) -> None:
    """Write a view parquet; equal tables give equal bytes."""
    pq.write_table(table, path, compression="zstd", compression_level=1)


def null_count(table: pa.Table, column: str) -> int:
    return int(pc.sum(pc.is_null(table[column])).as_py() or 0)

"""Writing a pool: the views and tars of its shards, and the manifest's list of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.io.storage import digest_bytes, digest_json
from winnow.infra.io.tar import Member, TarWriter
from winnow.infra.pool.views import HERE, locate, write_view
from winnow.infra.stages.stage import Output, Record, Skipped


class PoolWriter:
    """Writes one shard of a pool: any number of tars, then the view.

    Args:
        out: the pool's directory.
        name: of the shard.
        tars: (reference "location/path", digest of its content) of tars elsewhere, in the order that the view's `tar`
            column counts them.

    Example:
        >>> import tempfile
        >>> out = tempfile.mkdtemp()
        >>> shard = PoolWriter(out, "00000")
        >>> with shard.tar() as tar:
        ...     row = tar.add("0001", {"wav": b"RIFF", "cls": b"3"})
        >>> [(member["ext"], member["size"]) for member in row["other"]]
        [('wav', 4), ('cls', 1)]
    """

    def __init__(self, out: str, name: str, tars: Iterable[Sequence[str]] = ()) -> None:
        self.out, self.name = out, name
        self.tars = [list(tar) for tar in tars]
        self.files: list[str] = []

    @contextlib.contextmanager
    def tar(self, suffix: str = "") -> Iterator[SampleWriter]:
        """Write the tar `NAME{suffix}.tar`; it becomes the last of the shard's tars."""
        name = f"{self.name}{suffix}.tar"
        with storage.writing(storage.join(self.out, name)) as path, TarWriter(path) as tar:
            yield SampleWriter(tar, len(self.tars))
        self.tars.append([f"{HERE}/{name}", content_digest(storage.join(self.out, name))])
        self.files.append(name)

    def view(self, table: pa.Table, skipped: Sequence[Skipped] = (), **values: Any) -> Output:
        """Write the view and return the unit's output, with the given JSON values in its record.

        The value `content`, if given, decides the digest of the shard instead of the digest of the view's file.
        """
        view = f"{self.name}.parquet"
        with storage.writing(storage.join(self.out, view)) as path:
            write_view(str(path), table)
        values = {"tars": self.tars, "rows": table.num_rows, **values}
        return Output([view, *self.files], table.num_rows, list(skipped), values)


class SampleWriter:
    """Appends samples to an open tar, which has an index in the shard's list of tars."""

    def __init__(self, tar: TarWriter, index: int = 0) -> None:
        self._tar, self.index = tar, index

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
        """Append a sample's members in the given order; returns its LOCATION columns."""
        written = {ext: Member(ext, self._tar.add(f"{key}.{ext}", data), len(data)) for ext, data in members.items()}
        return locate(written, self.index)


def view_digest(table: pa.Table) -> str:
    """sha256 of the file that `write_view` makes of a table."""
    file = io.BytesIO()
    write_view(file, table)
    return digest_bytes(file.getvalue())


def shard_entries(records: Iterable[Record], dropped: Mapping[str, list[int]] | None = None) -> list[dict[str, Any]]:
    """The shards as a pool's manifest lists them: records of `PoolWriter.view`, in order, and by shard the rows of
    the view that are skipped."""
    entries: list[dict[str, Any]] = []
    for record in records:
        view, rows = f"{record.unit}.parquet", (dropped or {}).get(record.unit, [])
        content = record.values.get("content", record.files[view]["sha256"])
        tars, digests = zip(*record.values["tars"], strict=True) if record.values["tars"] else ((), ())
        count, digest = record.values["rows"] - len(rows), digest_json([content, digests, rows])
        entry = {"name": record.unit, "view": view, "tars": list(tars), "rows": count}
        entries.append(entry | {"digest": digest, "dropped": rows})
    return entries

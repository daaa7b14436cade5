"""The index stage: read each tar once, join it with its parquet, and record the byte range of every member.

Layouts (img2dataset's and DataComp's): `NAME.tar` of `KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`, with `NAME.parquet`
next to it; or bare tars in webdataset's convention, where `KEY.cls` becomes the column `label`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import HashingReader
from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.tar import Member, open_stream, tar_samples
from winnow.infra.pool.join import join, read_rows, without_duplicates
from winnow.infra.pool.layouts import ShardFiles, base_url, shard_files, source_names
from winnow.infra.pool.rows import READ, row_of, table_of
from winnow.infra.pool.uids import decode_uids, derived_uid
from winnow.infra.pool.views import with_source
from winnow.infra.pool.writer import PoolWriter, shard_entries, view_digest
from winnow.infra.stages.stage import Output, Record, Skipped, Stage, Unit


@dataclass
class IndexStage(Stage):
    """Index shards into a pool directory. The shards stay where they are, except those of sources that can only be
    read forwards (`pipe:COMMAND`, HTTP servers without range requests): they are copied into the directory.

    Args:
        sources: directories or URLs of shards, or pipes (see `shard_files`). With several, shard names get the index
            of the source in front.
        out: the pool's directory.
        only: names of shards to take; empty for all.
        skip: names of shards to leave out.
        captions: False is short for a `require` without "text".
        require: what a sample must have: "image", "text", or the extension of a member. A sample without it is
            skipped.

    Example:
        An audio set of `KEY.wav` and `KEY.cls`:

        >>> stage = IndexStage(("shards",), "pool", captions=False, require=frozenset({"wav"}))
    """

    sources: tuple[str, ...]
    out: str
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    captions: bool = True
    require: frozenset[str] = frozenset({"image", "text"})

    name = "index"
    version = 5
    allow_failures = True
    _shards: list[tuple[str, int, ShardFiles]] = field(default_factory=list, repr=False)

    @property
    def required(self) -> frozenset[str]:
        """What a sample must have, with `captions` taken into account."""
        return self.require if self.captions else self.require - {"text"}

    def params(self) -> dict[str, Any]:
        return {"captions": "text" in self.required, "require": sorted(self.required)}

    def locations(self) -> dict[str, str]:
        sources = ((i, source) for i, source in enumerate(self.sources) if not storage.is_pipe(source))
        return {f"pool{i}": storage.absolute(base_url(source)) for i, source in sources}

    def shards(self) -> list[tuple[str, int, ShardFiles]]:
        """(name, index of the source, files) of each shard, in order."""
        if not self._shards:
            found = [
                (shard.name if len(self.sources) == 1 else f"{i}-{shard.name}", i, shard)
                for i, source in enumerate(self.sources)
                for shard in shard_files(source)
            ]
            known = {name for name, _, _ in found}
            for name in (*self.only, *self.skip):
                if name not in known:
                    raise UsageError(f'no shard "{name}"', where=", ".join(self.sources))
            taken = (set(self.only) or known) - set(self.skip)
            self._shards = [entry for entry in found if entry[0] in taken]
            if not self._shards:
                raise UsageError("no shard is left to index", where=", ".join(self.sources))
        return self._shards

    def plan(self) -> list[Unit]:
        names, units = source_names(self.sources), []
        for name, i, shard in self.shards():
            inputs, reference = {"tar": _token(shard.tar)}, f"pool{i}/{shard.name}.tar"
            runtime: dict[str, Any] = {"tar": shard.tar, "reference": reference, "stream": shard.stream}
            if shard.parquet:
                inputs["parquet"] = storage.version_token(shard.parquet)
                runtime["parquet"] = shard.parquet
            units.append(Unit(name, inputs, {"source": names[i]}, runtime))
        return units

    def run(self, unit: Unit) -> Output:
        skipped: list[Skipped] = []
        writer = PoolWriter(self.out, unit.name)
        rows, digest, size = (self._copy if unit.runtime["stream"] else self._read)(unit, writer, skipped)
        for row in rows:
            row["uid"] = row["uid"] or derived_uid(digest, row["key"])
        parquet = read_rows(unit.runtime["parquet"], unit.name, skipped) if "parquet" in unit.runtime else None
        table = table_of(rows) if parquet is None else join(rows, parquet, unit.name, skipped)
        table = without_duplicates(table, unit.name, skipped)
        # The default source is the name of a directory, which may change; the pool's digest is of content alone.
        return writer.view(with_source(table, unit.params["source"]), skipped, bytes=size, content=view_digest(table))

    def _read(self, unit: Unit, writer: PoolWriter, skipped: list[Skipped]) -> tuple[list[dict[str, Any]], str, int]:
        """The rows of a tar that stays where it is, the sha256 of its content, and its size in bytes."""
        with storage.open_read(unit.runtime["tar"]) as raw:
            file = HashingReader(raw)
            rows = [row for row, _ in self._rows(file, unit.name, skipped)]
            file.drain()
        writer.tars.append([unit.runtime["reference"], file.digest])
        return rows, file.digest, file.count

    def _copy(self, unit: Unit, writer: PoolWriter, skipped: list[Skipped]) -> tuple[list[dict[str, Any]], str, int]:
        """The same for a stream, whose usable samples are copied into a tar of the pool."""
        rows = []
        with writer.tar() as tar, open_stream(unit.runtime["tar"]) as raw:
            file = HashingReader(raw)
            for row, members in self._rows(file, unit.name, skipped, everything=True):
                rows.append(row | tar.add(row["key"], {ext: member.data for ext, member in members.items()}))
            file.drain()
        return rows, file.digest, file.count

    def _rows(
        self, file: HashingReader, shard: str, skipped: list[Skipped], everything: bool = False
    ) -> Iterator[tuple[dict[str, Any], dict[str, Member]]]:
        seen: set[str] = set()
        try:
            for key, members in tar_samples(file, None if everything else READ):
                sample_id = f"{shard}/{key.encode('utf-8', 'backslashreplace').decode()}"
                if key in seen:
                    skipped.append(Skipped(sample_id, "duplicate key in the tar"))
                    continue
                seen.add(key)
                try:
                    row = row_of(key, members, self.required)
                except WinnowError as error:
                    skipped.append(Skipped(sample_id, error.what))
                    continue
                yield row, members
        except WinnowError as error:
            skipped.append(Skipped(shard, error.what, error.do or ""))

    def finish(self, records: list[Record]) -> Output:
        by_name = {record.unit: record for record in records}
        found = [by_name[name] for name, _, _ in self.shards() if name in by_name]
        dropped = self._duplicates([record.unit for record in found])
        skipped = [Skipped(f"{name}/row {row}", "duplicated uid") for name, rows in dropped.items() for row in rows]
        return Output(skipped=skipped, values={"shards": shard_entries(found, dropped)})

    def _duplicates(self, names: list[str]) -> dict[str, list[int]]:
        """Rows, by shard, whose uid an earlier shard has."""
        uids = [decode_uids(read_parquet(self.url(f"{name}.parquet"), ["uid"])["uid"]) for name in names]
        if not uids:
            return {}
        every = np.concatenate(uids)
        owner = np.repeat(np.arange(len(names)), [len(part) for part in uids])
        row = np.concatenate([np.arange(len(part)) for part in uids])
        order = np.lexsort((np.arange(len(every)), every["f1"], every["f0"]))
        ordered = every[order]
        result: dict[str, list[int]] = {}
        for at in sorted(order[1:][ordered[1:] == ordered[:-1]]):
            result.setdefault(names[owner[at]], []).append(int(row[at]))
        return result


def _token(tar: str) -> str:
    """What represents the content of a tar in the key of its unit; for a pipe, the command."""
    if storage.is_pipe(tar):
        return hashlib.sha256(tar.encode()).hexdigest()
    try:
        return storage.version_token(tar)
    except OSError:
        return "unreadable"  # as running the unit reports

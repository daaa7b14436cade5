"""The index stage: read each tar once, join it with its parquet, and record the byte range of every member.

Layouts (img2dataset's and DataComp's): `NAME.tar` of `KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`, with `NAME.parquet`
next to it; or bare tars in webdataset's convention, where `KEY.cls` becomes the column `label`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import HashingReader
from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.tar import TRUNCATED, Member, open_stream, tar_samples
from winnow.infra.pool.join import ONLY_PARQUET, join, read_rows, usable
from winnow.infra.pool.layouts import ShardFiles, base_url, shard_files, source_names
from winnow.infra.pool.matching import Facts
from winnow.infra.pool.rows import READ, identity_of, row_of, table_of
from winnow.infra.pool.uids import decode_uids, derived_uid
from winnow.infra.pool.views import with_source
from winnow.infra.pool.writer import PoolWriter, shard_entries, view_digest
from winnow.infra.stages.counts import mean_samples
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
    version = 5  # 5: what cannot be read is counted; archives that follow one another are read as one
    allow_failures = True
    alone = (".tar", ".parquet")
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

    def read_in_place(self, units: Iterable[Unit], records: Mapping[str, Record]) -> dict[str, list[str]]:
        """The tars that stay where they are."""
        read = [(unit, records[unit.name].values["tars"][0]) for unit in units if unit.name in records]
        return {tar: [unit.inputs["tar"], digest] for unit, (tar, digest) in read if not unit.runtime["stream"]}

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
            runtime["fault"] = shard.fault
            if shard.parquet:
                inputs["parquet"] = storage.version_token(shard.parquet)
                runtime["parquet"] = shard.parquet
            units.append(Unit(name, inputs, {"source": names[i]}, runtime))
        return units

    def run(self, unit: Unit) -> Output:
        if unit.runtime["fault"]:
            raise WinnowError(unit.runtime["fault"])
        skipped: list[Skipped] = []
        writer = PoolWriter(self.out, unit.name)
        unusable: list[Facts] = []
        rows, digest, size = (self._copy if unit.runtime["stream"] else self._read)(unit, writer, skipped, unusable)
        table = self._joined(unit, rows, skipped, unusable) if "parquet" in unit.runtime else table_of(rows)
        table = usable(_with_uids(table, digest), unit.name, skipped, "text" in self.required)
        # The default source is the name of a directory, which may change; the pool's digest is of content alone.
        return writer.view(with_source(table, unit.params["source"]), skipped, bytes=size, content=view_digest(table))

    def expected(self, unit: Unit, whole: Sequence[Record]) -> int:
        """What the shard's parquet has, else the mean of the other shards."""
        if "parquet" in unit.runtime and (table := read_rows(unit.runtime["parquet"], unit.name, [])) is not None:
            return table.num_rows
        return mean_samples(whole)

    def _joined(
        self, unit: Unit, rows: list[dict[str, Any]], skipped: list[Skipped], unusable: list[Facts]
    ) -> pa.Table:
        """The rows of a tar with the columns of its parquet. Without these, where it is unreadable, all are skipped."""
        damage = next((item for item in skipped if item.id == unit.name), None)
        parquet = read_rows(unit.runtime["parquet"], unit.name, skipped)
        if parquet is None:
            skipped[-1] = replace(skipped[-1], count=len(rows))
            return table_of([])
        table = join(rows, parquet, unit.name, skipped, unusable)
        if damage is not None:  # it has cost what the parquet alone has
            lost = [i for i, item in enumerate(skipped) if item.reason.startswith(ONLY_PARQUET)]
            for i in lost:
                skipped[i] = replace(skipped[i], reason=damage.reason, detail=damage.detail)
            at = skipped.index(damage)
            skipped[at : at + 1] = [] if lost else [replace(damage, count=1)]
        return table

    def _read(
        self, unit: Unit, writer: PoolWriter, skipped: list[Skipped], unusable: list[Facts]
    ) -> tuple[list[dict[str, Any]], str, int]:
        """The rows of a tar that stays where it is, the sha256 of its content, and its size in bytes."""
        with storage.open_read(unit.runtime["tar"]) as raw:
            file = HashingReader(raw)
            rows = [row for row, _ in self._rows(file, unit, skipped, unusable)]
            file.drain()
        writer.tars.append([unit.runtime["reference"], file.digest])
        return rows, file.digest, file.count

    def _copy(
        self, unit: Unit, writer: PoolWriter, skipped: list[Skipped], unusable: list[Facts]
    ) -> tuple[list[dict[str, Any]], str, int]:
        """The same for a stream, whose usable samples are copied into a tar of the pool."""
        rows = []
        with writer.tar() as tar, open_stream(unit.runtime["tar"]) as raw:
            file = HashingReader(raw)
            for row, members in self._rows(file, unit, skipped, unusable, everything=True):
                rows.append(row | tar.add(row["key"], {ext: member.data for ext, member in members.items()}))
            file.drain()
        return rows, file.digest, file.count

    def _rows(
        self, file: HashingReader, unit: Unit, skipped: list[Skipped], unusable: list[Facts], everything: bool = False
    ) -> Iterator[tuple[dict[str, Any], dict[str, Member]]]:
        seen: set[str] = set()
        shard, parquet = unit.name, "parquet" in unit.runtime
        require = self.required - {"text"} if parquet else self.required  # a parquet may hold the captions
        count = end = 0

        def skip(key: str, reason: str) -> None:
            skipped.append(Skipped(f"{shard}/{key.encode('utf-8', 'backslashreplace').decode()}", reason))

        def fault(key: str, reason: str, members: dict[str, Member]) -> None:
            skip(key, reason)
            unusable.append(identity_of(key, members))

        try:
            for key, members in tar_samples(file, None if everything else READ, fault):
                count, end = count + 1, max(member.offset + member.size for member in members.values())
                if key in seen:
                    skip(key, "duplicate key in the tar")
                    continue
                seen.add(key)
                try:
                    row = row_of(key, members, require)
                except WinnowError as error:
                    fault(key, error.what, members)
                    continue
                yield row, members
        except WinnowError as error:
            file.drain()
            # A cut says nothing of what there was. After other damage the rest has samples of about the same size.
            rest = 0 if error.what == TRUNCATED or not count else max(1, round(count * (file.count - end) / end))
            skipped.append(Skipped(shard, error.what, error.do or "", rest))

    def finish(self, records: list[Record]) -> Output:
        by_name = {record.unit: record for record in records}
        found = [by_name[name] for name, _, _ in self.shards() if name in by_name]
        dropped = self._duplicates([record.unit for record in found])
        if sum(record.items for record in found) == sum(map(len, dropped.values())):
            reasons = Counter(item["reason"] for record in found for item in record.skipped)
            why = f" ({'; '.join(reason for reason, _ in reasons.most_common(3))})" if reasons else ""
            raise WinnowError(f"holds not one sample that can be used{why}", where=", ".join(self.sources))
        skipped = []
        for name, rows in dropped.items():
            keys = read_parquet(self.url(f"{name}.parquet"), ["key"])["key"]
            skipped += [Skipped(f"{name}/{keys[row]}", "duplicated uid") for row in rows]
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


def _with_uids(table: pa.Table, digest: str) -> pa.Table:
    """The view with a uid derived from the content of the tar where a sample has none."""
    if not table["uid"].null_count:
        return table
    rows = zip(table["uid"].to_pylist(), table["key"].to_pylist(), strict=True)
    uids = [derived_uid(digest, key) if uid is None else uid for uid, key in rows]
    return table.set_column(table.column_names.index("uid"), "uid", pa.array(uids, pa.string()))


def _token(tar: str) -> str:
    """What represents the content of a tar in the key of its unit; for a pipe, the command."""
    if storage.is_pipe(tar):
        return hashlib.sha256(tar.encode()).hexdigest()
    try:
        return storage.version_token(tar)
    except OSError:
        return "unreadable"  # as running the unit reports

"""The index stage: read each tar once, join it with its parquet, note where every member lies.

Layouts (img2dataset's and DataComp's): `NAME.tar` of `KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`, with `NAME.parquet`
beside it; or bare tars in webdataset's convention, where `KEY.cls` becomes the column `label`. What
cannot be used is skipped with its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.infra.errors import UsageError, WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS, ImageError, image_size_of
from winnow.infra.io.parquet import read_parquet
from winnow.infra.io.storage import digest_bytes
from winnow.infra.pool.pool import IDENTITY, LOCATION, shard_entry, write_view
from winnow.infra.pool.uids import decode_uids, derived_uid
from winnow.infra.stages.stage import Output, Record, Skipped, Stage, Unit

# Columns of img2dataset that tell of the download, not of the sample.
_DOWNLOAD = {"status", "error_message", "exif"}
# Scalars a bare tar's json may carry over into the view.
_JSON_FIELDS = {"url": str, "sha256": str, "source": str, "original_width": int, "original_height": int}


@dataclass(frozen=True)
class Member:
    ext: str
    offset: int
    size: int
    data: bytes


class _Hashing:
    """A file object that hashes what is read through it."""

    def __init__(self, file: Any) -> None:
        self.file, self.state, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.state.update(data)
        self.count += len(data)
        return data


class _StrictInfo(tarfile.TarInfo):
    """A header that is cut or garbled, or an archive without its end, is an error; tarfile itself takes either for the
    end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end of the archive") from error


class _Counting:
    """A file object that counts the bytes read through it, and knows how they began."""

    def __init__(self, file: Any) -> None:
        self.file, self.count, self.head = file, 0, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.head = self.head or data[: tarfile.BLOCKSIZE]
        self.count += len(data)
        return data

    def fault(self) -> str:
        """What is wrong with a file that cannot be read as a tar to its end."""
        if not self.head:
            return "empty file"
        if self.head.startswith(_COMPRESSED):
            return "compressed; shards are plain tars"
        try:
            tarfile.TarInfo.frombuf(self.head, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return "truncated tar" if len(self.head) < tarfile.BLOCKSIZE else "no tar"
        return "truncated tar"


_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


def split_name(path: str) -> tuple[str, str]:
    """webdataset's rule: the key is the path up to the first dot of its last component, the rest is the extension. One
    of them is empty where webdataset passes a member over: `README`, `._0001.jpg`."""
    folder, slash, base = path.rpartition("/")
    stem, _, ext = base.partition(".")
    return folder + slash + stem, ext.lower()


def tar_samples(file: Any, keep: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar, in order: key and members by extension, with data where the extension is in `keep`.

    Raises WinnowError ("truncated tar", or what else is wrong with it) after the last whole sample when the file ends
    too early; a sample is whole when the next one, or the end of the archive, has been seen.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    counted = _Counting(file)
    try:
        with tarfile.open(fileobj=counted, mode="r|", bufsize=1 << 20, tarinfo=_StrictInfo) as tar:  # type: ignore[call-overload]
            for info in tar:
                if not info.isreg():
                    continue
                name, ext = split_name(info.name)
                if not ext or name.endswith("/") or not name:
                    continue
                if key is not None and (name != key or ext in members):
                    yield key, members
                    members = {}
                key = name
                data = b""
                if ext in keep:
                    handle = tar.extractfile(info)
                    data = handle.read() if handle else b""
                    if len(data) != info.size:
                        raise tarfile.ReadError("unexpected end of data")
                members[ext] = Member(ext, info.offset_data, info.size, data)
            # Nor does tarfile mind a file that ends within a member's skipped data or padding.
            if counted.count < tar.offset:
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        fault = counted.fault()
        raise WinnowError(fault, do=f"({error})" if fault == "truncated tar" else None) from error
    if key is not None:
        yield key, members


def find_shards(source: str) -> list[str]:
    """Stems of the `NAME.tar` in a directory, sorted.

    A directory without any may be evaluation sets in DataComp's layout, whose test shards these are then: of one set
    `test/NAME`, of a folder of sets `wds_TASK_test/test/NAME`.

    Raises:
        UsageError: there are none.
    """
    if not storage.is_dir(source):
        raise UsageError("no such folder", where=source)
    found = _tars(source) or _tars(source, "test/")
    if not found:
        sets = [name for name in storage.list_names(source) if name.startswith("wds_")]
        found = [stem for name in sets for stem in _tars(source, f"{name}/test/")]
    if not found:
        raise UsageError("holds no .tar shard", where=source)
    return found


def _tars(source: str, folder: str = "") -> list[str]:
    names = storage.list_names(storage.join(source, folder))
    return [folder + name.removesuffix(".tar") for name in names if name.endswith(".tar")]


@dataclass
class IndexStage(Stage):
    """Index shards into a pool directory.

    Args:
        sources: directories or URLs of shards. With several, shard names get the source's number in front.
        out: the pool's directory.
        only: names of shards to take; empty for all.
        skip: names of shards to leave out.
        captions: whether a sample must have a caption; False for image-only sets (targets).
    """

    sources: tuple[str, ...]
    out: str
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    captions: bool = True

    name = "index"
    version = 3
    allow_failures = True
    _shards: list[tuple[str, int, str]] = field(default_factory=list, repr=False)

    def params(self) -> dict[str, Any]:
        return {"captions": self.captions}

    def locations(self) -> dict[str, str]:
        return {f"pool{i}": storage.absolute(source) for i, source in enumerate(self.sources)}

    def shards(self) -> list[tuple[str, int, str]]:
        """(name, number of the source, stem) of each shard, in order."""
        if not self._shards:
            for i, source in enumerate(self.sources):
                for stem in find_shards(source):
                    name = stem if len(self.sources) == 1 else f"{i}-{stem}"
                    self._shards.append((name, i, stem))
            known = {name for name, _, _ in self._shards}
            for name in (*self.only, *self.skip):
                if name not in known:
                    raise UsageError(f'no shard "{name}"', where=", ".join(self.sources))
            self._shards = [
                entry
                for entry in self._shards
                if (not self.only or entry[0] in self.only) and entry[0] not in self.skip
            ]
            if not self._shards:
                raise UsageError("no shard is left to index", where=", ".join(self.sources))
        return self._shards

    def plan(self) -> list[Unit]:
        units = []
        for name, i, stem in self.shards():
            tar = storage.join(self.sources[i], f"{stem}.tar")
            parquet = storage.join(self.sources[i], f"{stem}.parquet")
            try:
                inputs = {"tar": storage.version_token(tar)}
            except OSError:
                inputs = {"tar": "unreadable"}  # as running the unit will say
            args: dict[str, Any] = {"tar": tar, "place": f"pool{i}/{stem}.tar"}
            if storage.exists(parquet):
                inputs["parquet"] = storage.version_token(parquet)
                args["parquet"] = parquet
            units.append(Unit(name, inputs, runtime=args))
        return units

    def run(self, unit: Unit) -> Output:
        skipped: list[Skipped] = []
        with storage.open_read(unit.runtime["tar"]) as raw:
            file = _Hashing(raw)
            rows = list(self._rows(file, unit.name, skipped))
            while file.read(8 << 20):
                pass
        digest = file.state.hexdigest()
        for row in rows:
            row["uid"] = row["uid"] or derived_uid(digest, row["key"])
        if "parquet" in unit.runtime:
            table = self._join(rows, _read_parquet(unit.runtime["parquet"], skipped, unit.name), unit.name, skipped)
        else:
            table = _view(rows)
        table = _without_duplicates(table, unit.name, skipped)
        view = f"{unit.name}.parquet"
        with storage.writing(self.url(view)) as path:
            write_view(str(path), table)
        values = {"tars": [[unit.runtime["place"], digest]], "rows": table.num_rows, "bytes": file.count}
        return Output([view], table.num_rows, skipped, values)

    def _rows(self, file: _Hashing, shard: str, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        try:
            for key, members in tar_samples(file, (*EXTENSIONS, "txt", "json", "cls")):
                sample_id = f"{shard}/{key.encode('utf-8', 'backslashreplace').decode()}"
                if key in seen:
                    skipped.append(Skipped(sample_id, "key met twice in the tar"))
                    continue
                seen.add(key)
                try:
                    yield self._row(key, members)
                except WinnowError as error:
                    skipped.append(Skipped(sample_id, error.what))
        except WinnowError as error:
            skipped.append(Skipped(shard, error.what, error.do or ""))

    def _row(self, key: str, members: dict[str, Member]) -> dict[str, Any]:
        """One row out of a sample's members. Raises WinnowError with a short fixed phrase."""
        ext = next((ext for ext in EXTENSIONS if ext in members), None)
        if ext is None:
            raise WinnowError("no image")
        image = members[ext]
        try:
            width, height = image_size_of(image.data)
        except ImageError as error:
            raise WinnowError(error.what) from None
        facts: dict[str, Any] = {}
        if "json" in members:
            try:
                facts = json.loads(members["json"].data)
                assert isinstance(facts, dict)
            except (ValueError, AssertionError, RecursionError):
                raise WinnowError("json is not valid") from None
        text = None
        if "txt" in members:
            try:
                text = members["txt"].data.decode("utf-8")
            except UnicodeDecodeError:
                raise WinnowError("caption is not UTF-8") from None
        uid = facts.get("uid")
        row: dict[str, Any] = {
            "uid": uid if isinstance(uid, str) else None,
            "key": key,
            "text": text,
            "original_width": width,
            "original_height": height,
            "tar": 0,
            "image_ext": ext,
            "image_offset": image.offset,
            "image_size": image.size,
            "other": [
                {"ext": member.ext, "offset": member.offset, "size": member.size}
                for member in members.values()
                if member.ext not in (ext, "txt", "json")
            ],
        }
        for name in ("text", "json"):
            member = members.get("txt" if name == "text" else name)
            row[f"{name}_offset"] = member.offset if member else None
            row[f"{name}_size"] = member.size if member else None
        for name, kind in _JSON_FIELDS.items():
            value = facts.get(name)
            if type(value) is kind and (not isinstance(value, int) or 0 <= value < 1 << 31):
                row[name] = value
        label = facts.get("label")
        if "cls" in members and re.fullmatch(rb"\s*\d{1,18}\s*", members["cls"].data):
            label = int(members["cls"].data)
        if type(label) is int and 0 <= label < 1 << 63:
            row["label"] = label
        if text is None and isinstance(facts.get("text"), str):
            row["text"] = facts["text"]
        # A lone surrogate, which JSON can say, or a name that is not UTF-8.
        if any(isinstance(value, str) and not _is_utf8(value) for value in row.values()):
            raise WinnowError("a name or text is not UTF-8")
        row["from_json"] = frozenset(facts)
        if self.captions and row["text"] is None:
            raise WinnowError("missing caption")
        return row

    def _join(
        self, rows: list[dict[str, Any]], parquet: pa.Table | None, shard: str, skipped: list[Skipped]
    ) -> pa.Table:
        """The tar's rows with the parquet's columns beside them; what the two disagree on is skipped."""
        if parquet is None:
            return _view(rows)
        names = parquet.column_names
        if "key" in names:
            by, tar_values = "key", [row["key"].rpartition("/")[2] for row in rows]
            parquet_values = [str(value) for value in parquet["key"].to_pylist()]
        elif "uid" in names and all("uid" in row["from_json"] for row in rows):
            by, tar_values = "uid", [row["uid"] for row in rows]
            parquet_values = parquet["uid"].to_pylist()
        elif parquet.num_rows == len(rows):
            by, tar_values = "order", [str(i) for i in range(len(rows))]
            parquet_values = tar_values
        else:
            raise WinnowError(
                f"parquet has {parquet.num_rows} rows, the tar {len(rows)} samples, and no column to join them by",
                where=shard,
            )
        position = {value: i for i, value in enumerate(parquet_values)}
        left_out = {item.id for item in skipped}
        take, kept = [], []
        uids = parquet["uid"].to_pylist() if "uid" in names else None
        texts = parquet["text"].to_pylist() if "text" in names else None
        for row, value in zip(rows, tar_values, strict=True):
            at = position.pop(value, None)
            sample_id = f"{shard}/{row['key']}"
            if at is None:
                skipped.append(Skipped(sample_id, "in the tar but not in the parquet"))
            elif uids is not None and "uid" in row["from_json"] and row["uid"] != uids[at]:
                skipped.append(Skipped(sample_id, "uid differs between tar and parquet"))
            elif texts is not None and row["text"] is not None and texts[at] is not None and row["text"] != texts[at]:
                skipped.append(Skipped(sample_id, "caption differs between tar and parquet"))
            else:
                if uids is not None and uids[at]:
                    row["uid"] = uids[at]
                if row["text"] is None and texts is not None:
                    row["text"] = texts[at]
                take.append(at)
                kept.append(row)
        for value in position:
            if f"{shard}/{value}" not in left_out:
                skipped.append(Skipped(f"{shard}/{value}", f"in the parquet but not in the tar (by {by})"))
        table = _view(kept)
        selected = parquet.take(pa.array(take, pa.int64()))
        for name in ("original_width", "original_height"):
            if name in names:
                index = table.column_names.index(name)
                # Where the parquet says nothing, the image's own.
                sizes = pc.coalesce(selected[name].cast(pa.int32()), table[name].cast(pa.int32()))
                table = table.set_column(index, name, sizes)
        for name in names:
            dull = name in _DOWNLOAD or name in IDENTITY.names or name in LOCATION.names
            if dull or pa.types.is_null(selected[name].type):
                continue
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, selected[name])
        return table

    def finish(self, records: list[Record]) -> Output:
        by_name = {record.unit: record for record in records}
        found = [name for name, _, _ in self.shards() if name in by_name]
        dropped = self._met_before(found)
        entries = []
        for name in found:
            record = by_name[name]
            view = f"{name}.parquet"
            entries.append(
                shard_entry(
                    name,
                    view,
                    record.files[view]["sha256"],
                    record.values["tars"],
                    record.values["rows"],
                    dropped.get(name, []),
                )
            )
        skipped = [Skipped(f"{name}/row {row}", "duplicated uid") for name, rows in dropped.items() for row in rows]
        return Output(skipped=skipped, values={"shards": entries})

    def _met_before(self, names: list[str]) -> dict[str, list[int]]:
        """Row numbers, by shard, of uids that an earlier shard has."""
        uids, owner, row = [], [], []
        for number, name in enumerate(names):
            part = decode_uids(read_parquet(self.url(f"{name}.parquet"), ["uid"])["uid"])
            uids.append(part)
            owner.append(np.full(len(part), number))
            row.append(np.arange(len(part)))
        if not uids:
            return {}
        all_uids, all_owner, all_row = np.concatenate(uids), np.concatenate(owner), np.concatenate(row)
        order = np.lexsort((np.arange(len(all_uids)), all_uids["f1"], all_uids["f0"]))
        ordered = all_uids[order]
        again = order[1:][ordered[1:] == ordered[:-1]]
        result: dict[str, list[int]] = {}
        for at in sorted(again):
            result.setdefault(names[all_owner[at]], []).append(int(all_row[at]))
        return result


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(url: str, skipped: list[Skipped], shard: str) -> pa.Table | None:
    """The parquet beside a tar without the rows whose download failed; None, and a note, when it cannot be read."""
    try:
        table = read_parquet(url)
    except WinnowError as error:
        skipped.append(Skipped(shard, "unreadable parquet", error.what))
        return None
    if "status" in table.column_names:
        table = table.filter(pa.compute.equal(table["status"], "success"))
    return table


def _view(rows: list[dict[str, Any]]) -> pa.Table:
    fields = list(IDENTITY) + list(LOCATION)
    for name, kind in {**_JSON_FIELDS, "label": int}.items():
        if name not in IDENTITY.names and any(name in row for row in rows):
            fields.append(pa.field(name, pa.string() if kind is str else pa.int64()))
    arrays = [pa.array([row.get(item.name) for row in rows], item.type) for item in fields]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _without_duplicates(table: pa.Table, shard: str, skipped: list[Skipped]) -> pa.Table:
    """Without rows whose uid is no uid, or was met before in the shard."""
    seen: set[str] = set()
    keep = []
    for uid, key in zip(table["uid"].to_pylist(), table["key"].to_pylist(), strict=True):
        good = isinstance(uid, str) and len(uid) == 32 and all(c in "0123456789abcdef" for c in uid)
        if not good:
            skipped.append(Skipped(f"{shard}/{key}", "uid is not 32 hex characters"))
        elif uid in seen:
            skipped.append(Skipped(f"{shard}/{key}", "duplicated uid"))
        keep.append(good and uid not in seen)
        if good:
            seen.add(uid)
    return table if all(keep) else table.filter(pa.array(keep, pa.bool_()))


def content_digest(url: str) -> str:
    """sha256 of a small file's bytes, for inputs that are not shards (a target array, a head's weights)."""
    return digest_bytes(storage.read_bytes(url))

"""Sets that are distributed as a table and images: Flickr, MSCOCO and WinoGAViL, which DataComp takes from the hub's
`nlphuji` repositories. They are converted to the layout of `winnow.evaluate.sets.layout` once, in a local cache.

Two forms are read, from any URL that `winnow.infra.io.storage` supports:

* as in the repository: one `.csv` and one `.zip` of images in a folder. Columns `filename` and `raw` (a list of
  captions), or `cue`, `candidates` and `associations` (lists of image names, the last those that belong to the cue);
  lists are JSON or Python literals. Rows with a `split` other than "test" are left out.
* as the `datasets` library caches them, which is what DataComp's download script leaves in
  `hf_cache/nlphuji___NAME/**/*.arrow`: columns `image` and `caption`, or `cue`, `candidates`, `associations` and
  `candidate_images`. An image is a struct of `bytes` and `path`; a path without bytes is looked up below the same
  `hf_cache`.

A converted WinoGAViL set has each image once, and `associations.jsonl` next to `test/`: one object a line with
`cue`, `candidates` and `associations`, names being keys of samples.
"""

from __future__ import annotations

import ast
import csv
import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from winnow.evaluate.tasks.task import TaskError
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.images import EXTENSIONS
from winnow.infra.io.text import TextError, read_json_text, read_text

ASSOCIATIONS = "associations.jsonl"
DATASETS_CACHE = "hf_cache"
MAX_IMAGE_BYTES = 256 << 20
MAX_TABLE_BYTES = 256 << 20
MAX_ROWS = 1_000_000  # of a batch in an Arrow file
_DEPTH = 4  # folders below `nlphuji___NAME` that the datasets library makes


def in_datasets_cache(data_url: str) -> dict[str, str]:
    """The sets in a data folder's `hf_cache`: URL by repository ("nlphuji/winogavil")."""
    root = storage.join(data_url, DATASETS_CACHE)
    names = [name for name in storage.list_names(root) if "___" in name]
    urls = {name.replace("___", "/", 1): storage.join(root, name) for name in names}
    return {repo: url for repo, url in urls.items() if files(url)}


def files(url: str) -> list[str]:
    """The files of a packed set, relative to its folder; empty where the folder is not one."""
    names = storage.list_names(url)
    flat = [name for name in names if name.endswith((".csv", ".zip"))]
    if sorted(name.rpartition(".")[2] for name in flat) == ["csv", "zip"]:
        return flat
    arrows = _arrows(url) if DATASETS_CACHE in url.split("/") else []
    # Where several versions are cached, the last.
    return [name for name in arrows if name.rpartition("/")[0] == arrows[-1].rpartition("/")[0]]


def _arrows(url: str, inside: str = "", depth: int = 0) -> list[str]:
    found = []
    for name in storage.list_names(storage.join(url, inside)):
        path = f"{inside}/{name}" if inside else name
        if name.endswith(".arrow") and "test" in name:
            found.append(path)
        elif "." not in name or depth in (1, 2):  # the version's folder has dots
            found += _arrows(url, path, depth + 1) if depth < _DEPTH else []
    return found


def layout(url: str) -> str:
    """The folder of a set in `winnow.evaluate.sets.layout`: itself, or the unpacked copy. Raises TaskError."""
    if storage.exists(storage.join(url, "test", "nshards.txt")):
        return url
    packed = files(url)
    if not packed:
        return url
    marks = {name: storage.version_token(storage.join(url, name)) for name in packed}
    return _unpacked(url, tuple(packed), storage.digest_json([storage.absolute(url), marks])[:24])


@functools.lru_cache(maxsize=64)
def _unpacked(url: str, packed: tuple[str, ...], digest: str) -> str:
    # In WINNOW_CACHE, by default ~/.cache/winnow.
    root = Path(os.environ.get("WINNOW_CACHE") or Path.home() / ".cache" / "winnow")
    target = root / "evaluate" / digest
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=target.parent))
    try:
        _unpack(url, packed, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


def _unpack(url: str, packed: Sequence[str], target: Path) -> None:
    (target / "test").mkdir()
    written: set[str] = set()
    associations = []
    rows = _zip_rows(url, packed) if packed[0].endswith((".csv", ".zip")) else _arrow_rows(url, packed)
    with tarfile.open(target / "test" / "0.tar", "w") as tar:
        for where, row, images in rows:
            names = [str(name) for name in row["candidates"]] if "cue" in row else [str(row["filename"])]
            for name, image in zip(names, images, strict=True):
                key = key_of(name)
                if key in written:
                    if "cue" in row:
                        continue
                    raise TaskError(f'two rows name the image "{name}"', where=where)
                written.add(key)
                _add(tar, f"{key}.{_extension(image)}", image)
                if "cue" not in row:
                    captions = [" ".join(str(text).split()) for text in row["captions"]]
                    _add(tar, f"{key}.txt", "\n".join(text for text in captions if text).encode())
            if "cue" in row:
                entry = {name: [key_of(str(one)) for one in row[name]] for name in ("candidates", "associations")}
                associations.append({"cue": str(row["cue"]), **entry})
    (target / "test" / "nshards.txt").write_text("1\n")
    if associations:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in associations]
        (target / ASSOCIATIONS).write_text("".join(lines), encoding="utf-8")


def key_of(name: str) -> str:
    """The key of an image's sample: its file name without the extension. A further dot, at which webdataset would split
    the name, is written as "%2E"."""
    stem, dot, ext = name.rpartition("/")[2].rpartition(".")
    if ext.lower() not in EXTENSIONS:
        stem += dot + ext
    return stem.replace("%", "%25").replace(".", "%2E")


def _extension(image: bytes) -> str:
    """By the first bytes; any other content is reported when it is decoded."""
    starts = {b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
    return next((ext for start, ext in starts.items() if image.startswith(start)), "jpg")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


Rows = Iterator[tuple[str, Mapping[str, Any], list[bytes]]]


def _zip_rows(url: str, packed: Sequence[str]) -> Rows:
    """(where, row, images) of each row of the table."""
    table = storage.join(url, next(name for name in packed if name.endswith(".csv")))
    archive = storage.join(url, next(name for name in packed if name.endswith(".zip")))
    fields, rows = _table(table)
    wino = "cue" in fields
    columns = ("cue", "candidates", "associations") if wino else ("filename", "raw")
    for name in columns:
        if name not in fields:
            raise TaskError(f'has no column "{name}"', where=table)
    with storage.open_read(archive) as file:
        try:
            images = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise TaskError(f"cannot be read ({error})", where=archive) from None
        shown = [info for info in images.infolist() if "__MACOSX" not in info.filename]
        members = {key_of(one.filename): one for one in shown if one.filename.rpartition(".")[2].lower() in EXTENSIONS}
        for where, row in rows:
            names = _list(row["candidates"], where) if wino else [row["filename"]]
            found = [_member(images, members, name, archive) for name in names]
            if wino:
                selected = _list(row["associations"], where)
                yield where, {"cue": row["cue"], "candidates": names, "associations": selected}, found
            else:
                yield where, {"filename": row["filename"], "captions": _list(row["raw"], where)}, found


def _table(url: str) -> tuple[Sequence[str], Iterator[tuple[str, dict[str, Any]]]]:
    """The columns of a CSV file, and its rows for the test split, each with the file and line."""
    csv.field_size_limit(1 << 24)
    try:
        reader = csv.DictReader(io.StringIO(read_text(url, MAX_TABLE_BYTES)))
        fields = list(reader.fieldnames or [])
    except (csv.Error, TextError) as error:
        raise TaskError(getattr(error, "what", f"is not a table ({error})"), where=url) from None

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        try:
            for row in reader:
                if row.get("split") in (None, "", "test"):
                    yield f"{url}:{reader.line_num}", row
        except csv.Error as error:
            raise TaskError(f"is not a table ({error})", where=f"{url}:{reader.line_num}") from None

    return fields, rows()


def _member(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, where: str) -> bytes:
    info = members.get(key_of(name))
    if info is None:
        raise TaskError(f'holds no image "{name}"', where=where)
    if info.file_size > MAX_IMAGE_BYTES:
        raise TaskError(f"is larger than {MAX_IMAGE_BYTES >> 20} MiB", where=f"{where}, {info.filename}")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise TaskError(f"cannot be read ({error})", where=f"{where}, {info.filename}") from None


def _list(text: str | None, where: str) -> list[str]:
    """A list of strings in JSON or as Python writes one."""
    try:
        value = read_json_text(text or "")
    except ValueError:
        try:
            value = ast.literal_eval((text or "").strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TaskError(f"{(text or '')[:40]!r} is not a list of strings", where=where)
    return value


def _arrow_rows(url: str, packed: Sequence[str]) -> Rows:
    number = 0
    for name in packed:
        where = storage.join(url, name)
        with storage.open_read(where) as file:
            try:
                for batch in pa.ipc.open_stream(file):
                    batch.validate(full=True)  # offsets, which the reader itself trusts
                    if batch.num_rows > MAX_ROWS:
                        raise TaskError(f"has a batch of {batch.num_rows:,} rows", where=where)
                    for row in batch.to_pylist():
                        yield _arrow_row(row, where, number)
                        number += 1
            except (pa.ArrowException, ValueError, OSError) as error:
                raise TaskError(f"is not an Arrow stream ({error})", where=where) from None


def _arrow_row(row: Mapping[str, Any], where: str, number: int) -> tuple[str, Mapping[str, Any], list[bytes]]:
    row_name = f"{where}, row {number}"
    try:
        if "cue" in row:
            return row_name, row, [_image(one, row_name) for one in row["candidate_images"]]
        image = row["image"]
        name = row.get("filename") or image["path"] or f"{number:09d}"
        return row_name, {"filename": name, "captions": row["caption"]}, [_image(image, row_name)]
    except (KeyError, TypeError) as error:
        raise TaskError(f"lacks a column ({error})", where=row_name) from None


def _image(value: Mapping[str, Any], where: str) -> bytes:
    """The bytes of an image cell. Of a path the part after `hf_cache` is used, so nothing outside is read."""
    data, path = value["bytes"], value["path"]
    if data:
        return bytes(data)
    inside = f"/{DATASETS_CACHE}/"
    parts = str(path or "").replace("\\", "/").rpartition(inside)[2].split("/")
    if not path or inside not in str(path) or ".." in parts:
        raise TaskError(f"an image is neither embedded nor in {DATASETS_CACHE}: {path}", where=where)
    url = storage.join(where.rpartition(inside)[0], DATASETS_CACHE, *parts)
    try:
        return storage.read_bytes(url)
    except WinnowError as error:
        raise TaskError(error.what, where=f"{where}: {url}") from None

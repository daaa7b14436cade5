"""Files wherever fsspec reaches (disk, s3://, gs://, memory://): read by range, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from winnow.infra.errors import UsageError, WinnowError

_LONGEST = 8 << 20  # bytes in a merged range


def is_pipe(url: str) -> bool:
    """True for `pipe:COMMAND`, a shell command whose output is read (webdataset's notation)."""
    return url.startswith("pipe:")


def is_local(url: str) -> bool:
    """True for a plain path or a file:// URL."""
    return ("://" not in url or url.startswith("file://")) and not is_pipe(url)


def has_ranges(url: str) -> bool:
    """Whether parts of a file can be read; not from a pipe, nor from an HTTP server that ignores `Range`."""
    if not url.startswith(("http://", "https://")):
        return not is_pipe(url)
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(answer.status == 206)
    except OSError:
        return True  # reading it reports the error


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _fs(url: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(url)


def absolute(url: str) -> str:
    """The URL with a local path made absolute, so that it is valid in every worker process."""
    return str(local_path(url).expanduser().absolute()) if is_local(url) else url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """Append path components to a URL."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts if part)])


def name_of(url: str) -> str:
    """The last component of a URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    if is_local(url):
        return local_path(url).exists()
    if is_pipe(url):
        return False
    fs, path = _fs(url)
    return bool(fs.exists(path))


def is_dir(url: str) -> bool:
    if is_local(url):
        return local_path(url).is_dir()
    if is_pipe(url):
        return False
    fs, path = _fs(url)
    return bool(fs.isdir(path))


def list_names(url: str) -> list[str]:
    """Sorted names of the entries of a directory; empty if there is no such directory."""
    if is_local(url):
        folder = local_path(url)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not is_dir(url):
        return []
    fs, path = _fs(url)
    return sorted({name_of(entry) for entry in fs.ls(path, detail=False)} - {name_of(path), ""})


def open_read(url: str) -> Any:
    """Open for reading bytes. Raises WinnowError when the file cannot be opened."""
    try:
        if is_local(url):
            return open(local_path(url), "rb")
        fs, path = _fs(url)
        return fs.open(path, "rb")
    except FileNotFoundError:
        raise WinnowError("no such file", where=url) from None
    except OSError as error:
        raise WinnowError(f"cannot be read ({error})", where=url) from error


def read_bytes(url: str) -> bytes:
    with open_read(url) as file:
        return file.read()


def read_ranges(url: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Many ranges of one file: `pread` calls on a local disk, concurrent requests on an object store.

    Neighbouring ranges are merged, so that at most an eighth of what is read is not wanted. A range that extends
    beyond the end of the file is returned short.
    """
    spans, positions = _spans([int(offset) for offset in offsets], [int(size) for size in sizes])
    if is_local(url):
        with open_read(url) as file:
            handle = file.fileno()
            data = [os.pread(handle, end - start, start) for start, end in spans]
    else:
        fs, path = _fs(url)
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        data = list(fs.cat_ranges([path] * len(spans), starts, ends))
    return [data[span][first : first + size] for (span, first), size in zip(positions, sizes, strict=True)]


def _spans(offsets: list[int], sizes: list[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The spans (start, end) to read for ranges of a file, and for each range (number of its span, offset in it)."""
    spans: list[list[int]] = []
    positions = [(0, 0)] * len(offsets)
    before = 0
    for i in sorted(range(len(offsets)), key=offsets.__getitem__):
        start, end = offsets[i], offsets[i] + sizes[i]
        if spans and start - spans[-1][1] <= (before + sizes[i]) // 16 and end - spans[-1][0] <= _LONGEST:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
        before = sizes[i]
        positions[i] = (len(spans) - 1, start - spans[-1][0])
    return [(start, end) for start, end in spans], positions


def size_of(url: str) -> int:
    if is_local(url):
        return local_path(url).stat().st_size
    fs, path = _fs(url)
    return int(fs.size(path))


def version_token(url: str) -> str:
    """A string that changes when the file does, without reading it: size and modification time, or the ETag."""
    if is_local(url):
        stat = local_path(url).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    fs, path = _fs(url)
    return _token(fs.info(path))


def _token(info: dict[str, Any]) -> str:
    marks = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
    mark = next((info[name] for name in marks if info.get(name)), "")
    return f"{info.get('size')}-{mark}"


def list_tokens(url: str) -> dict[str, str]:
    """Names of the files in a directory with the version token of each, by one listing."""
    if is_local(url):
        folder = local_path(url)
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        return {name: f"{stat.st_size}-{stat.st_mtime_ns}" for name, stat in files}
    fs, path = _fs(url)
    entries = fs.ls(path, detail=True) if fs.isdir(path) else []
    return {name_of(info["name"]): _token(info) for info in entries if info.get("type") == "file"}


def make_dir(url: str) -> None:
    """Create a directory and its parents. Raises UsageError where a file is in the way or writing is forbidden."""
    if is_local(url):
        try:
            local_path(url).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"cannot be created as a directory ({error.strerror})", where=url) from error
    else:
        fs, path = _fs(url)
        fs.makedirs(path, exist_ok=True)


def remove(url: str) -> None:
    """Remove a file, or a directory with its content, if it exists."""
    if is_local(url):
        path = local_path(url)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, path_ = _fs(url)
    if fs.exists(path_):
        fs.rm(path_, recursive=True)


@contextlib.contextmanager
def locked(url: str) -> Iterator[None]:
    """Keep other processes out of a local directory that this one writes. The lock ends with its owner.

    Raises:
        UsageError: another process holds it.
    """
    if not is_local(url):
        yield
        return
    make_dir(url)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(local_path(url) / ".lock", "ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a forked process would keep it
        except BlockingIOError:
            do = "Wait until it has ended, or give another directory."
            raise UsageError("another run is writing this directory", where=url, do=do) from None
        except OSError:  # a read-only directory, or a file system without locks
            pass
        yield


@contextlib.contextmanager
def writing(url: str) -> Iterator[Path]:
    """Yields a local temporary path to write. On success it becomes `url` atomically; on an exception it is removed.

    On local disks the temporary file is in the target's directory and is renamed. On object stores it is uploaded,
    which is atomic.
    """
    if is_local(url):
        target = local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            yield temporary
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / name_of(url)
        yield temporary
        fs, path = _fs(url)
        fs.put_file(str(temporary), path)


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with writing(url) as path:
        path.write_bytes(data)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_line(value: Any) -> str:
    """A line of a file of JSON lines, with null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(url: str, value: Any) -> None:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
    write_bytes(url, f"{text}\n".encode())


def read_json(url: str) -> Any:
    """Raises WinnowError when the file is missing or not JSON."""
    try:
        return json.loads(read_bytes(url))
    except ValueError as error:
        raise WinnowError(f"is not valid JSON ({error})", where=url) from error


def digest_json(value: Any) -> str:
    """sha256 (64 hex characters) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(url: str) -> str:
    """sha256 of a file's content, read once, 8 MiB at a time."""
    state = hashlib.sha256()
    with open_read(url) as file:
        while block := file.read(8 << 20):
            state.update(block)
    return state.hexdigest()

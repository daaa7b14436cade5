"""Files wherever fsspec reaches (disk, s3://, gs://, memory://): read by range, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from winnow.infra.errors import StorageError, UsageError, WinnowError
from winnow.infra.io.retry import RemoteFile, patiently

_LONGEST = 8 << 20  # bytes in a merged range
_PART = re.compile(r"\..*\.(\d+|[0-9a-f]{16})\.part")  # temporary names of `writing`, and of earlier versions


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

    def status() -> int:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)

    try:
        return patiently(url, status) == 206
    except OSError:
        return True  # reading it reports the error


def local_path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _fs(url: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(url)


def _info(url: str, fresh: bool = False) -> dict[str, Any] | None:
    """What a remote storage says of a file or folder; None if there is none. `fresh` passes by fsspec's cache."""
    fs, path = _fs(url)
    if fresh:
        fs.invalidate_cache(path)
    try:
        return dict(patiently(url, lambda: fs.info(path)))
    except FileNotFoundError:
        return None


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
    if url.startswith(("http://", "https://")):
        fs, path = _fs(url)
        try:
            return bool(patiently(url, lambda: fs.exists(path, strict=True)))
        except StorageError:
            raise
        except Exception:  # 403, say
            return False
    return _info(url) is not None


def is_dir(url: str) -> bool:
    if is_local(url):
        return local_path(url).is_dir()
    if is_pipe(url):
        return False
    if url.startswith(("http://", "https://")):
        fs, path = _fs(url)
        return bool(patiently(url, lambda: fs.isdir(path)))
    return (_info(url) or {}).get("type") == "directory"


def list_names(url: str) -> list[str]:
    """Sorted names of the entries of a directory; empty if there is no such directory."""
    if is_local(url):
        folder = local_path(url)
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not is_dir(url):
        return []
    fs, path = _fs(url)
    entries = patiently(url, lambda: fs.ls(path, detail=False))
    return sorted({name_of(entry) for entry in entries} - {name_of(path), ""})


def open_read(url: str) -> Any:
    """Open for reading bytes. Raises WinnowError when the file cannot be opened."""
    try:
        if is_local(url):
            return open(local_path(url), "rb")
        fs, path = _fs(url)
        return RemoteFile(url, lambda: fs.open(path, "rb"))
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
        data = patiently(url, lambda: _whole(fs.cat_ranges([path] * len(spans), starts, ends, on_error="raise")))
    return [data[span][first : first + size] for (span, first), size in zip(positions, sizes, strict=True)]


def _whole(answers: Sequence[Any]) -> list[bytes]:
    """The answers of a storage, where some file systems have errors in place of data."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [bytes(answer) for answer in answers]


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


def touch(url: str) -> None:
    """Set the time of a local file's last change to now, where that is allowed."""
    if is_local(url):
        with contextlib.suppress(OSError):
            os.utime(local_path(url))


def size_of(url: str) -> int:
    if is_local(url):
        return local_path(url).stat().st_size
    return int(_must(url)["size"])


def _must(url: str, fresh: bool = False) -> dict[str, Any]:
    if (info := _info(url, fresh)) is None:
        raise FileNotFoundError(url)
    return info


def version_token(url: str, fresh: bool = False) -> str:
    """A string that changes when the file does, without reading it: size and modification time, or the ETag. `fresh`
    passes by what fsspec remembers of a remote folder. Raises FileNotFoundError."""
    if is_local(url):
        stat = local_path(url).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    return _token(_must(url, fresh))


def times(url: str) -> tuple[int, tuple[float, ...]] | None:
    """Size in bytes and times of the last change (of a local file, of its content and of its inode, in ns); None if
    there is no such file. A remote storage may tell no time."""
    if is_local(url):
        try:
            stat = local_path(url).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns)
    if (info := _info(url, fresh=True)) is None:
        return None
    found: Any = next((info[name] for name in ("LastModified", "mtime", "updated", "created") if info.get(name)), None)
    return int(info["size"] or 0), (found.timestamp(),) if hasattr(found, "timestamp") else ()


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
    listed = patiently(url, lambda: fs.ls(path, detail=True)) if is_dir(url) else []
    return {name_of(info["name"]): _token(info) for info in listed if info.get("type") == "file"}


def make_dir(url: str) -> None:
    """Create a directory and its parents. Raises UsageError where a file is in the way or writing is forbidden."""
    if is_local(url):
        try:
            local_path(url).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UsageError(f"cannot be created as a directory ({error.strerror})", where=url) from error
    else:
        fs, path = _fs(url)
        patiently(url, lambda: fs.makedirs(path, exist_ok=True))


def remove(url: str) -> None:
    """Remove a file, or a directory with its content, if it exists."""
    if is_local(url):
        path = local_path(url)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    fs, name = _fs(url)  # its `rm` takes a name for a pattern, and so may remove other files
    if not is_dir(url):
        _remove_file(fs, url, name)
        return
    found = patiently(url, lambda: fs.find(name, withdirs=True, detail=True))
    for inner in (inner for inner, info in found.items() if info["type"] != "directory"):
        _remove_file(fs, url, inner)
    folders = [inner for inner, info in found.items() if info["type"] == "directory"]
    for folder in sorted({*folders, name}, key=len, reverse=True):
        with contextlib.suppress(OSError, NotImplementedError):  # an object store has none
            fs.rmdir(folder)


def _remove_file(fs: Any, url: str, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        patiently(url, lambda: fs.rm_file(path))


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
        # Two containers on one folder may have the same process ids, and clones of a machine the same name too.
        name = target.name.encode()[:120].decode(errors="ignore")
        owner = f"{socket.gethostname()[:40]}.{os.getpid()}.{secrets.token_hex(8)}"
        temporary = target.with_name(f".{name}.{owner}.part")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # else a machine that loses power may keep the name and not the content
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / name_of(url)
        yield temporary
        fs, path = _fs(url)
        patiently(url, lambda: fs.put_file(str(temporary), path))


def sweep(url: str, nested: Callable[[str], bool]) -> None:
    """Remove what killed processes left of files they were writing below a local directory whose lock this one holds,
    but not below inner directories that `nested` says are another's."""
    if not is_local(url):
        return
    folders = [str(local_path(url))]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders += [] if nested(entry.path) else [entry.path]
                elif _PART.fullmatch(entry.name):
                    Path(entry.path).unlink(missing_ok=True)


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

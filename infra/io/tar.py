"""Tar shards: a strict reader, a stream opener, and a writer whose bytes depend on names and contents alone."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.infra.errors import StorageError, WinnowError
from winnow.infra.io.content import LFS_POINTER, is_lfs_pointer

MAX_HEADER_BYTES = 1 << 20  # with the headers of its long name, its attributes and its sparse map
MAX_PADDING = 1 << 20  # of zeros at the end: a record of tar(1) is at most as long
MAX_TEXT_BYTES = 4 << 20  # of a .txt, .json or .cls
MAX_MEMBER_BYTES = 512 << 20  # of another member
TRUNCATED, BAD_HEADER, TRAILING = "truncated tar", "bad header", "bytes after the end of the archive"
_DAMAGE = (TRUNCATED, BAD_HEADER, TRAILING)
_PASSING = (5, 6, 7, 18, 28, 35, 52, 55, 56)  # exit statuses of curl: no connection, or it was lost
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


@dataclass(frozen=True)
class Member:
    """A file of a tar: its extension, offset and size in bytes, and its data if that was asked for."""

    ext: str
    offset: int
    size: int
    data: bytes = b""


class _Fault(tarfile.ReadError):
    """Why a tar cannot be read to its end: one of a few fixed phrases, and tarfile's message."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, str(detail)


class _Source:
    """A file object that keeps what is read of a tar within bounds, and its first block."""

    def __init__(self, file: Any) -> None:
        self.file, self.head, self.last = file, b"", b""
        self.count, self.depth, self.limit = 0, 0, 0  # of nested headers, and where these must have ended
        self.ended = False  # whether there was no more to read
        self.zeros: int | None = None  # offset of an end of the archive that no member has followed yet

    def read(self, size: int = -1) -> bytes:
        if self.ended:  # tarfile would go on for as long as a size says that is not true
            raise _Fault(TRUNCATED, "unexpected end of data")
        if self.depth and self.count > self.limit:
            raise _Fault(BAD_HEADER, f"larger than {MAX_HEADER_BYTES >> 20} MiB")
        data: bytes = self.file.read(size)
        self.head, self.ended = self.head or data[: tarfile.BLOCKSIZE], not data
        self.count, self.last = self.count + len(data), data or self.last
        return data

    def at_start(self) -> str | None:
        """What is wrong with the first block; None if it is a header."""
        if not self.head:
            return "empty file"
        try:
            tarfile.TarInfo.frombuf(self.head, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except tarfile.HeaderError:
            if self.head.startswith(_COMPRESSED):
                return "compressed; shards are plain tars"
            if is_lfs_pointer(self.head):
                return LFS_POINTER
            return TRUNCATED if len(self.head) < tarfile.BLOCKSIZE else "not a tar"
        return None


class _StrictInfo(tarfile.TarInfo):
    """Makes a truncated or damaged header, a missing end of archive, and what follows an end that is not a tar, errors.
    `tarfile` takes them for the end. Archives that follow one another are read as one."""

    source: _Source

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictInfo:
        source = cls.source
        source.limit = source.limit if source.depth else source.count + MAX_HEADER_BYTES
        source.depth += 1
        try:
            info = super().fromtarfile(archive)  # calls itself for the headers of long names
            if info.size < 0:
                raise ValueError("negative size")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            if source.zeros is None and source.depth == 1:
                source.zeros = archive.offset
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if source.zeros is None:
                raise _Fault(TRUNCATED, "no end of the archive") from error
            if archive.offset - source.zeros > MAX_PADDING:
                raise _Fault(TRUNCATED, f"only zeros from byte {source.zeros:,}") from error
            raise
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
            if source.zeros is None:
                raise _Fault(TRUNCATED, error) from error
            if any(source.last[-(source.count % tarfile.BLOCKSIZE) :]):
                raise _Fault(TRAILING, error) from error
            raise tarfile.EmptyHeaderError("end of the padding") from error  # type: ignore[attr-defined]
        except (tarfile.HeaderError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
            raise _Fault(BAD_HEADER if source.zeros is None else TRAILING, error) from error
        finally:
            source.depth -= 1
        source.zeros = None
        return info


def split_name(path: str) -> tuple[str, str]:
    """Key and extension of a member, by webdataset's rule: the key ends at the first dot of the last component.

    One of them is empty for members that webdataset ignores, such as `README` and `._0001.jpg`.

    Example:
        >>> split_name("a.b/0001.seg.PNG")
        ('a.b/0001', 'seg.png')
    """
    folder, slash, base = path.rpartition("/")
    stem, _, ext = base.partition(".")
    return folder + slash + stem, ext.lower()


def tar_samples(
    file: Any, keep: Collection[str] | None, skip: Callable[[str, str, dict[str, Member]], None] | None = None
) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar, in order: key and members by extension. What follows the end of the archive is read, too.

    Args:
        file: a binary file object; it is only read forwards.
        keep: extensions whose data is wanted; None for all.
        skip: called with the key of each sample that has a member which cannot be read (a link, a sparse file, more
            bytes than `max_bytes`), the reason, and its members. Without it, such a sample is an error.

    Raises:
        WinnowError: the file is damaged or not a tar. Raised after the last complete sample, that is, one after which
            another sample or the end of the archive was found.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    fault: str | None = None

    def whole() -> Iterator[tuple[str, dict[str, Member]]]:
        if key is not None and fault is None:
            yield key, members
        elif key is not None and skip is not None:
            skip(key, str(fault), members)
        elif key is not None:
            raise WinnowError(str(fault), do=f"It is of the sample {key}. Store the file itself.")

    source = _Source(file)
    info_class = type("_Info", (_StrictInfo,), {"source": source})
    options: dict[str, Any] = {"bufsize": 1 << 20, "tarinfo": info_class, "ignore_zeros": True}
    try:
        with tarfile.open(fileobj=source, mode="r|", **options) as tar:  # type: ignore[call-overload]
            for info in tar:
                name, ext = split_name(info.name)
                if info.isdir() or not ext or not name or name.endswith("/"):
                    continue
                if key is not None and (name != key or ext in members):
                    yield from whole()
                    members, fault = {}, None
                key = name
                read = keep is None or ext in keep
                why = _unreadable(info) or (f".{ext} too large" if read and info.size > max_bytes(ext) else None)
                fault = fault or why
                data = _data(tar, info) if read and not why else b""
                members[ext] = Member(ext, info.offset_data, info.size, data)
    except tarfile.TarError as error:
        reason = source.at_start() or (error.reason if isinstance(error, _Fault) else _reason(error))
        if reason == TRAILING:
            yield from whole()
        detail = error.detail if isinstance(error, _Fault) else error
        raise WinnowError(reason, do=f"({detail})" if reason in _DAMAGE else None) from error
    yield from whole()


def _reason(error: tarfile.TarError) -> str:
    return BAD_HEADER if isinstance(error, tarfile.StreamError) else TRUNCATED  # a negative size seeks backwards


def max_bytes(ext: str) -> int:
    """Size in bytes above which a member is not read into memory."""
    return MAX_TEXT_BYTES if ext in ("txt", "json", "cls") else MAX_MEMBER_BYTES


def _unreadable(info: tarfile.TarInfo) -> str | None:
    """Why the data of a member are not the bytes at its offset; None if they are."""
    if info.isreg():
        return "sparse member" if info.issparse() else None
    return "hard link" if info.islnk() else "symbolic link" if info.issym() else "not a regular file"


def _data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(info)
    data = handle.read() if handle else b""
    if len(data) != info.size:
        raise _Fault(TRUNCATED, "unexpected end of data")
    return data


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[Any]:
    """Open a source that can only be read forwards: a `pipe:` command, or a URL of a plain HTTP server.

    webdataset opens it: commands run in a shell, and `http(s)://` is fetched by curl.

    Raises:
        WinnowError: the command or the server failed; also at the end of the data.
        StorageError: the connection to the server failed.
    """
    from webdataset.gopen import gopen  # imports torch

    file = None
    try:
        with gopen(url) as file:
            yield file
    except OSError as error:
        status = getattr(file, "status", None)  # of the command
        if status in _PASSING and not url.startswith("pipe:"):
            raise StorageError(f"{url}: the connection failed (curl's exit status {status}). Run again.") from error
        raise WinnowError(f"the stream failed ({f'exit status {status}' if status else error})", where=url) from error


class TarWriter:
    """Writes members to a local path, one after the other, with webdataset's writer.

    The format is GNU, with UTF-8 names of any length, mtime, uid and gid 0 and mode 0644. Use it as a context manager;
    the file is emptied when the block ends with an exception.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file, TarWriter(file.name) as tar:
        ...     tar.add("0001.txt", b"a red square"), tar.add("0001.cls", b"3")
        (512, 1536)
    """

    def __init__(self, path: str | Path) -> None:
        import webdataset  # imports torch

        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by close()
        options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False, "keep_meta": True}
        self._tar = webdataset.TarWriter(self._file, **options)
        self._tar.tarstream.format = tarfile.GNU_FORMAT  # webdataset ignores its argument `format`

    def add(self, name: str, data: bytes) -> int:
        """Append a member named `KEY.EXT`; returns the offset of its data in bytes."""
        key = split_name(name)[0]
        # One call a member: within a call, webdataset sorts by extension. The name keeps its letters' case.
        self._tar.write({"__key__": key, name[len(key) + 1 :]: data})
        stream = self._tar.tarstream
        stream.members.clear()  # they are only kept for reading
        return stream.offset - len(data) - -len(data) % tarfile.BLOCKSIZE

    def close(self) -> None:
        """Write the end of the archive, padded to whole records as tar(1) does, and close the file."""
        self._tar.close()
        self._file.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._tar.close()
            self._file.truncate(0)
        self.close()

"""Tar shards: a strict reader, a stream opener, and a writer whose bytes depend on names and contents alone."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.infra.errors import StorageError, WinnowError

_PASSING = (5, 6, 7, 18, 28, 35, 52, 55, 56)  # exit statuses of curl: no connection, or it was lost
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")


@dataclass(frozen=True)
class Member:
    """A file of a tar: its extension, offset and size in bytes, and its data if that was asked for."""

    ext: str
    offset: int
    size: int
    data: bytes = b""


class _StrictInfo(tarfile.TarInfo):
    """Makes a truncated or damaged header, or a missing end of archive, an error. `tarfile` takes them for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("no end of the archive") from error


class _Counting:
    """A file object that counts the bytes read through it and keeps the first block."""

    def __init__(self, file: Any) -> None:
        self.file, self.count, self.head = file, 0, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.head = self.head or data[: tarfile.BLOCKSIZE]
        self.count += len(data)
        return data

    def fault(self) -> str:
        """Why the file cannot be read as a tar to its end."""
        if not self.head:
            return "empty file"
        if self.head.startswith(_COMPRESSED):
            return "compressed; shards are plain tars"
        try:
            tarfile.TarInfo.frombuf(self.head, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return "truncated tar" if len(self.head) < tarfile.BLOCKSIZE else "not a tar"
        return "truncated tar"


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


def tar_samples(file: Any, keep: Collection[str] | None) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar, in order: key and members by extension.

    Args:
        file: a binary file object; it is only read forwards.
        keep: extensions whose data is wanted; None for all.

    Raises:
        WinnowError: the file is truncated or not a tar. Raised after the last complete sample, that is, one after
            which another sample or the end of the archive was found.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    counted = _Counting(file)
    try:
        with tarfile.open(fileobj=counted, mode="r|", bufsize=1 << 20, tarinfo=_StrictInfo) as tar:  # type: ignore[call-overload]
            for info in tar:
                name, ext = split_name(info.name)
                if not info.isreg() or not ext or not name or name.endswith("/"):
                    continue
                if key is not None and (name != key or ext in members):
                    yield key, members
                    members = {}
                key = name
                data = _data(tar, info) if keep is None or ext in keep else b""
                members[ext] = Member(ext, info.offset_data, info.size, data)
            # tarfile also accepts a file that ends within a member's skipped data or padding.
            if counted.count < tar.offset:
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        fault = counted.fault()
        raise WinnowError(fault, do=f"({error})" if fault == "truncated tar" else None) from error
    if key is not None:
        yield key, members


def _data(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(info)
    data = handle.read() if handle else b""
    if len(data) != info.size:
        raise tarfile.ReadError("unexpected end of data")
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

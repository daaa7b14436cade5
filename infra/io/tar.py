"""Writing tars whose bytes depend on names and contents alone."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import TracebackType


class TarWriter:
    """Writes members one after the other: GNU format, UTF-8 names of any length, mtime 0, uid and gid 0, mode 0644.

    Use as a context manager; leaving it without an exception writes the end of the archive.

    Args:
        path: a local path to create.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by close()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data in bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """Write the end of the archive, padded to whole records as tar(1) does, and close the file."""
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
        self._file.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

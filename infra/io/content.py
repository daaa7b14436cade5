"""What the bytes of a file say: its digest, computed once a process or while it is read, and Git LFS pointers."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from winnow.infra.io.storage import digest_file, is_local, times, version_token

LFS_POINTER = "a Git LFS pointer instead of the file; fetch the file with `git lfs pull`"


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes (60 are enough) is what Git LFS leaves where it has not fetched the
    file (its specification, version 1). `LFS_POINTER` says so to the user.

    Example:
        >>> is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a")
        True
    """
    return head.startswith((b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"))


def content_digest(url: str) -> str:
    """sha256 of a file's content, read again only when its size or a time has changed. Raises WinnowError."""
    try:
        return _digest(url, f"{version_token(url, fresh=True)} {times(url) if is_local(url) else ''}")
    except FileNotFoundError:
        return digest_file(url)  # whose message names the file


@functools.lru_cache(maxsize=1 << 16)
def _digest(url: str, token: str) -> str:
    return digest_file(url)


class HashingReader:
    """A binary file object that hashes what is read through it and counts its bytes."""

    def __init__(self, file: Any) -> None:
        self._file, self._state, self.count = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        self._state.update(data)
        self.count += len(data)
        return data

    def drain(self) -> None:
        """Read to the end of the file."""
        while self.read(8 << 20):
            pass

    @property
    def digest(self) -> str:
        """sha256 of what has been read (64 hex characters)."""
        return self._state.hexdigest()

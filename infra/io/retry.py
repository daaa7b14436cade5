"""Requests to a remote storage, repeated after errors that may pass."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from winnow.infra.errors import StorageError, WinnowError

T = TypeVar("T")
ATTEMPTS, WAIT, LIMIT = 6, 0.5, 300.0  # of one request: attempts, seconds before the second (then doubled), seconds
_PERMANENT = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ImportError, EOFError),
)


def patiently(url: str, request: Callable[[], T]) -> T:
    """The result of a request to a remote storage. It is repeated, ever more slowly, after an error that may pass: 500,
    503, a time-out, a closed connection.

    Raises:
        StorageError: every attempt failed so, or access is refused, which is no property of the data either.
        Exception: another error of the storage, such as FileNotFoundError, at once.
    """
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:
            if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
                what = f"{url}: the storage refuses access ({error})."
                raise StorageError(f"{what} Check credentials and permissions, and run again.") from error
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS or time.monotonic() - start > LIMIT:
                what = f"{url}: the storage failed {attempt} times ({type(error).__name__}: {error})."
                raise StorageError(f"{what} Run again when it answers; what is finished is kept.") from error
        time.sleep(WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    """Whether a request that failed so may succeed later."""
    if isinstance(error, (StorageError, WinnowError)):  # of a file system of ours, which has repeated it itself
        return False
    # fsspec reports whatever an HTTP server answers as a missing file, and the answer as the cause.
    chain = [error, *filter(None, (error.__cause__,))]
    answers = [getattr(item, name, None) for item in chain for name in ("status", "response")]
    answers.append(getattr(error, "code", None))  # not of a cause: aiohttp's for an answer that was cut is 400
    for answer in answers:
        if isinstance(answer, dict):  # of botocore
            answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        answer = getattr(answer, "status_code", answer)
        if isinstance(answer, int) and answer >= 400:
            return answer >= 500 or answer in (408, 429)
    return not isinstance(error, _PERMANENT) and "Credential" not in type(error).__name__


class RemoteFile(io.RawIOBase):
    """A file of a remote storage, open for reading. After an error that may pass it is opened again where it was."""

    def __init__(self, url: str, open_file: Callable[[], Any]) -> None:
        self._url, self._open, self._at = url, open_file, 0
        self._file: Any = None
        self._patiently(lambda file: None)

    def _patiently(self, use: Callable[[Any], T]) -> T:
        def attempt() -> T:
            if self._file is None:
                self._file = self._open()
                if self._at:
                    self._go_on()
            try:
                return use(self._file)
            except Exception:
                self._file = None
                raise

        return patiently(self._url, attempt)

    def _go_on(self) -> None:
        try:
            self._file.seek(self._at)
        except Exception as error:
            what = f"{self._url}: the connection was lost, and the server cannot go on from the middle of a file."
            raise StorageError(f"{what} Run again.") from error

    def read(self, size: int | None = -1) -> bytes:
        data: bytes = self._patiently(lambda file: file.read(-1 if size is None else size))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = int(self._patiently(lambda file: file.seek(offset, whence)))
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._patiently(lambda file: file.seekable()))

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

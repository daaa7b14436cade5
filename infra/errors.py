"""Errors that a user reads: what went wrong, where, and what to do, in one paragraph."""

from __future__ import annotations

import functools


class WinnowError(Exception):
    """A run failed for a reason its user can act on. Exit status 1.

    Args:
        what: what went wrong, as a clause without a full stop.
        where: file and line, shard, or sample.
        do: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        self.what, self.where, self.do = what, where, do
        text = f"{where}: {what}" if where else what
        text += "" if text.endswith((".", "!", "?")) else "."
        super().__init__(f"{text} {do}" if do else text)

    def __reduce__(self) -> tuple:
        # Keyword-only arguments would be lost when the error crosses a process boundary.
        return functools.partial(type(self), self.what, where=self.where, do=self.do), ()


class UsageError(WinnowError):
    """A wrong command line or recipe. Exit status 2."""

    exit_code = 2


class StorageError(Exception):
    """A remote storage kept failing in a way that may pass. Exit status 1.

    Not a WinnowError, so that nothing takes it for a fault of the data and skips a sample or a shard: then a result
    would depend on the network.
    """

    exit_code = 1

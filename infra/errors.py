"""Errors that a user reads: what went wrong, where, and what to do, in one paragraph."""

from __future__ import annotations


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
        if not text.endswith((".", "!", "?")):
            text += "."
        if do:
            text += f" {do}"
        super().__init__(text)

    def __reduce__(self) -> tuple:
        # Keyword-only arguments would be lost when the error crosses a process boundary.
        return _rebuild, (type(self), self.what, self.where, self.do)


class UsageError(WinnowError):
    """A wrong command line or recipe. Exit status 2."""

    exit_code = 2


def _rebuild(cls: type[WinnowError], what: str, where: str | None, do: str | None) -> WinnowError:
    return cls(what, where=where, do=do)

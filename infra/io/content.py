"""Digests of the files that measures and filters read, computed once a process."""

from __future__ import annotations

import functools

from winnow.infra.io.storage import digest_file, version_token


def content_digest(url: str) -> str:
    """sha256 of a file's content (64 hex characters); read again only when its size or time has changed.

    Raises:
        WinnowError: there is no such file.
    """
    try:
        return _digest(url, version_token(url))
    except FileNotFoundError:
        return digest_file(url)  # whose message names the file


@functools.lru_cache(maxsize=64)
def _digest(url: str, token: str) -> str:
    return digest_file(url)

"""Whether files that stages have written or read still have the content that was recorded of them.

A file that is no newer than the record of it was not written since, and one that was read in place has its version
token; neither is read again. Any other is hashed, once a process, so that a copy with other times is as good.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest

MANIFEST, RECORDS = "manifest.json", "units"
_LEVELS = 4  # folders between a file and the manifest that lists it, at most
_REMOTE = 60.0  # seconds after which a remote file that was found whole is asked about again


class KeptFile(str):
    """URL of a file, with what was recorded of its content.

    Attributes:
        sha256: of its content.
        since: URL of the record or manifest that was written after it; "" for a file that was read in place.
        size: in bytes, of a file that a stage has written.
        token: `storage.version_token` of a file that was read in place.
    """

    sha256: str
    since: str
    size: int
    token: str
    _whole_until = 0.0

    @classmethod
    def written(cls, url: str, facts: Mapping[str, Any], since: str) -> KeptFile:
        """A file that a stage wrote; `facts` as a record has them."""
        return cls._made(url, facts["sha256"], since, facts["bytes"], "")

    @classmethod
    def read(cls, url: str, sha256: str, token: str) -> KeptFile:
        """A file that a stage read in place."""
        return cls._made(url, sha256, "", 0, token)

    @classmethod
    def _made(cls, url: str, sha256: str, since: str, size: int, token: str) -> KeptFile:
        file = cls(url)
        file.sha256, file.since, file.size, file.token = sha256, since, size, token
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptFile._made, (str(self), self.sha256, self.since, self.size, self.token)

    def is_whole(self) -> bool:
        """Whether the file exists and has the recorded content."""
        if time.monotonic() < self._whole_until:
            return True
        url = str(self)
        try:
            whole = self.is_untouched() or (self._has_size() and content_digest(url) == self.sha256)
        except FileNotFoundError:
            return False
        if whole and not storage.is_local(url):
            self._whole_until = time.monotonic() + _REMOTE
        return whole

    def is_untouched(self) -> bool:
        """Whether size and times say that nobody wrote to it. Raises FileNotFoundError where it was read in place."""
        if not self.since:
            return storage.version_token(str(self), fresh=True) == self.token
        found, record = storage.times(str(self)), storage.times(self.since)
        if found is None or record is None or found[0] != self.size or not found[1] or not record[1]:
            return False
        return all(mine <= other for mine, other in zip(found[1], record[1], strict=True))

    def _has_size(self) -> bool:
        found = storage.times(str(self)) if self.since else None
        return not self.since or (found is not None and found[0] == self.size)

    def check(self) -> None:
        """Raises WinnowError where its content is not what was recorded."""
        if self.is_whole():
            return
        if not storage.exists(str(self)):
            raise WinnowError("no such file", where=str(self))
        if not self.since:
            raise WinnowError("has changed since it was indexed", where=str(self), do="Index the pool again.")
        do = "Run the command that wrote it again: it is recomputed. `winnow verify` names every such file."
        raise WinnowError("is damaged: it does not have the content that was written", where=str(self), do=do)


def check(url: str) -> None:
    """Raises WinnowError where a file whose content is known (a KeptFile) has another."""
    if isinstance(url, KeptFile):
        url.check()


def check_unit(folder: str, unit: str, file: str) -> str:
    """The URL of a file of a unit in the directory of its stage. Raises WinnowError where it is damaged."""
    record, url = storage.join(folder, RECORDS, f"{unit}.json"), storage.join(folder, file)
    if storage.exists(record):
        facts = storage.read_json(record)["files"].get(file)
        if facts is not None:
            KeptFile.written(url, facts, record).check()
    return url


def check_kept(url: str) -> str:
    """The URL of a file, which may be the user's own. Raises WinnowError where a stage wrote it and it is damaged."""
    folder, path = storage.absolute(url), ""
    for _ in range(_LEVELS):
        folder, _, name = folder.rpartition("/")
        path = f"{name}/{path}" if path else name
        if not folder or folder.endswith("/"):
            break
        manifest = storage.join(folder, MANIFEST)
        if storage.exists(manifest) and (facts := _listed(manifest, storage.version_token(manifest)).get(path)):
            KeptFile.written(url, facts, manifest).check()
            break
    return url


@functools.lru_cache(maxsize=64)
def _listed(manifest: str, token: str) -> dict[str, Any]:
    """The files in a manifest; none where it is another program's."""
    try:
        content = storage.read_json(manifest)
    except WinnowError:
        return {}
    files = content.get("files") if isinstance(content, dict) else None
    return files if isinstance(files, dict) and "stage" in content else {}

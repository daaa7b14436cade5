"""Test sets on the Hugging Face hub, as a file system: `hub://OWNER/REPO@REVISION/path` is a file of a data set there.

A file is downloaded when it is first opened, into huggingface_hub's cache. Importing this module registers the URLs
with fsspec. huggingface_hub's `HfFileSystem` does not fit: it keeps no file on disk, needs the network, and reports
every failed request as a missing file.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from winnow.infra.errors import UsageError, WinnowError

DATA = "hf://datasets/"  # what a user writes: hf://datasets/OWNER or hf://datasets/OWNER@REVISION
SCHEME = "hub://"
MAIN = "main"
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each repetition
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses worth repeating
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
T = TypeVar("T")


class Unreachable(WinnowError):
    """The hub does not answer at all, so that requesting the next file is pointless."""


def parse_data(url: str) -> tuple[str, str | None]:
    """Owner and revision of "hf://datasets/OWNER[@REVISION]". Raises UsageError."""
    owner, _, revision = url.removeprefix(DATA).strip("/").partition("@")
    if not _NAME.fullmatch(owner) or ("@" in url and not revision):
        example = f'"{DATA}djghosh", or with a revision "{DATA}djghosh@{MAIN}"'
        raise UsageError("names no owner of data sets", where=url, do=f"It should read {example}.")
    return owner, revision or None


@functools.lru_cache(maxsize=256)
def url_of(repo: str, revision: str) -> str:
    """The URL of a repository ("owner/name"), with a branch or tag replaced by its commit, where there is such."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        from huggingface_hub import HfApi

        with contextlib.suppress(FileNotFoundError):
            ask = functools.partial(HfApi().dataset_info, repo, revision=revision)
            revision = str(_request(ask, f"{SCHEME}{repo}@{revision}").sha)
    return f"{SCHEME}{repo}@{revision.replace('/', '%2F')}"


def parse(path: str) -> tuple[str, str, str]:
    """Repository, revision and path in it, of a URL with or without its scheme. Raises FileNotFoundError."""
    owner, _, rest = path.removeprefix(SCHEME).strip("/").partition("/")
    head, _, inner = rest.partition("/")
    name, _, revision = head.partition("@")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)) or ".." in inner.split("/"):
        raise FileNotFoundError(path)
    return f"{owner}/{name}", revision.replace("%2F", "/") or MAIN, inner


@functools.lru_cache(maxsize=256)
def listing(repo: str, revision: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and content hash of each file of a repository; requested once a process.

    Where the hub cannot be reached, that of the local cache, whose blobs are named after their hash. Raises
    FileNotFoundError where there is no such revision or repository, or it may not be read; else WinnowError.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    tree = functools.partial(HfApi().list_repo_tree, repo, recursive=True, revision=revision, repo_type="dataset")
    try:
        files = _request(lambda: [one for one in tree() if isinstance(one, RepoFile)], f"{SCHEME}{repo}@{revision}", ())
        return {file.path: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files}
    except WinnowError as error:
        try:
            folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise error from None
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): (path.stat().st_size, path.resolve().name) for path in paths}


def _request(ask: Callable[[], T], where: str, delays: Sequence[float] = DELAYS) -> T:
    """The result of `ask`, repeated where huggingface_hub does not do so. Raises as `listing` does."""
    from huggingface_hub import errors

    for wait in (*delays, None):
        try:
            return ask()
        except (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
            raise FileNotFoundError(f"{where}: {type(error).__name__}") from error
        except Exception as error:  # of the HTTP library, or the hub's own: no common class but this
            answer = getattr(error, "response", None)
            final = isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled))
            if wait is None or final or (answer is not None and answer.status_code not in PASSING):
                first = (str(error).strip().splitlines() or [""])[0]
                what = f"cannot be fetched from the hub ({type(error).__name__}: {first})"
                do = "Without a network, evaluate a folder of sets instead, or fill the hub's cache beforehand."
                raise (Unreachable if answer is None else WinnowError)(what, where=where, do=do) from error
            time.sleep(wait)
    raise AssertionError


class HubFileSystem(AbstractFileSystem):
    """The read-only fsspec file system of `hub://`. Each method raises as `listing` does."""

    protocol = "hub"
    cachable = False

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        repo, revision, inner = parse(path)
        files, name = listing(repo, revision), self._strip_protocol(path)
        if inner in files:
            size, digest = files[inner]
            return {"name": name, "size": size, "type": "file", "ETag": digest}
        if inner and not any(file.startswith(f"{inner}/") for file in files):
            raise FileNotFoundError(path)
        return {"name": name, "size": 0, "type": "directory"}

    def exists(self, path: str, **kwargs: Any) -> bool:  # fsspec's own returns False for any failure
        with contextlib.suppress(FileNotFoundError):
            return bool(self.info(path))
        return False

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        repo, revision, inner = parse(path)
        start = f"{inner}/" if inner else ""
        files = [file.removeprefix(start) for file in listing(repo, revision) if file.startswith(start)]
        name = self._strip_protocol(path)
        paths = [f"{name}/{one}" for one in sorted({file.partition("/")[0] for file in files})] or [name]
        return [self.info(one) for one in paths] if detail else paths

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        from huggingface_hub import hf_hub_download

        repo, revision, inner = parse(path)
        download = functools.partial(hf_hub_download, repo, inner, repo_type="dataset", revision=revision)
        return open(_request(download, f"{SCHEME}{repo}@{revision}/{inner}"), "rb")


fsspec.register_implementation("hub", HubFileSystem, clobber=True)

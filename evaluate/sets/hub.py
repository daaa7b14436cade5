"""Test sets on the Hugging Face hub, as a file system: `hub://OWNER/REPO@REVISION/path` is a file of a data set there.

A file is downloaded when it is first opened, into the hub's local cache (`HF_HUB_CACHE`, by default under
`~/.cache/huggingface`), and read from there afterwards. A revision that is a commit is never requested again. Requests
that fail for a temporary reason are repeated. `HF_ENDPOINT` and `HF_TOKEN` are those of huggingface_hub, which does the
work. Importing this module registers the URLs with fsspec, and so with `winnow.infra.io.storage`.

huggingface_hub's own `HfFileSystem` does not do: it keeps no file on disk, cannot list the cache without a network,
gives no content hash that fsspec's callers would find, and takes every failed request for a missing file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")

T = TypeVar("T")


class Unreachable(WinnowError):
    """The hub does not answer at all, so that requesting the next file is pointless."""


@dataclass(frozen=True)
class HubPath:
    """A file or folder of a repository; `path` is empty for the repository itself."""

    repo: str
    revision: str
    path: str


def is_data(url: str) -> bool:
    """Whether a data folder is an owner on the hub."""
    return url.startswith(DATA)


def parse_data(url: str) -> tuple[str, str | None]:
    """Owner and revision of "hf://datasets/OWNER[@REVISION]". Raises UsageError."""
    owner, _, revision = url.removeprefix(DATA).strip("/").partition("@")
    if not _NAME.fullmatch(owner) or ("@" in url and not revision):
        raise UsageError(
            "names no owner of data sets",
            where=url,
            do=f'It should read "{DATA}djghosh", or with a revision "{DATA}djghosh@{MAIN}".',
        )
    return owner, revision or None


def url_of(repo: str, revision: str) -> str:
    """The URL of a repository ("owner/name"), with a branch or tag replaced by its commit.

    Where the hub has no such repository or revision, the URL keeps it, and opening a file there raises the error.
    """
    if not _COMMIT.fullmatch(revision):
        with contextlib.suppress(FileNotFoundError):
            revision = _resolve(repo, revision)
    return f"{SCHEME}{repo}@{revision.replace('/', '%2F')}"


def parse(path: str) -> HubPath:
    """The parts of a URL, with or without its scheme. Raises FileNotFoundError where it is not valid."""
    owner, _, rest = path.removeprefix(SCHEME).strip("/").partition("/")
    head, _, inner = rest.partition("/")
    name, _, revision = head.partition("@")
    if not (_NAME.fullmatch(owner) and _NAME.fullmatch(name)) or ".." in inner.split("/"):
        raise FileNotFoundError(path)
    return HubPath(f"{owner}/{name}", revision.replace("%2F", "/") or MAIN, inner)


def fetch(hub_path: HubPath) -> Path:
    """The local copy of a file.

    Raises:
        FileNotFoundError: there is no such file, revision or repository, or it may not be read.
        WinnowError: the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return str(
            hf_hub_download(
                hub_path.repo,
                hub_path.path,
                repo_type="dataset",
                revision=hub_path.revision,
                cache_dir=_cache(),
                endpoint=_endpoint(),
            )
        )

    return Path(_retry(download, f"{SCHEME}{hub_path.repo}@{hub_path.revision}/{hub_path.path}"))


def listing(repo: str, revision: str) -> dict[str, tuple[int, str]]:
    """Size in bytes and content hash of each file of a repository; requested once a process.

    Where the hub cannot be reached, that of the local cache. Raises as `fetch` does.
    """
    return _listing(repo, revision, _endpoint(), _cache())


@functools.lru_cache(maxsize=256)
def _listing(repo: str, revision: str, endpoint: str | None, cache: str | None) -> dict[str, tuple[int, str]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> dict[str, tuple[int, str]]:
        tree = HfApi(endpoint).list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return {file.path: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files}

    try:
        return _retry(ask, f"{SCHEME}{repo}@{revision}", ())  # huggingface_hub retries these itself
    except WinnowError:
        found = _cached(repo, revision)
        if not found:
            raise
        return found


def _cached(repo: str, revision: str) -> dict[str, tuple[int, str]]:
    """`listing` of the local cache, where a file is a link to a blob named after its hash."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo, repo_type="dataset")
    folder = Path(_cache() or constants.HF_HUB_CACHE) / name / "snapshots" / revision
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.resolve().name) for path in files}


@functools.lru_cache(maxsize=256)
def _resolve(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    info = _retry(lambda: HfApi(_endpoint()).dataset_info(repo, revision=revision), f"{SCHEME}{repo}@{revision}")
    return str(info.sha)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _cache() -> str | None:
    return os.environ.get("HF_HUB_CACHE") or None


def _retry(ask: Callable[[], T], where: str, delays: Sequence[float] | None = None) -> T:
    """The result of `ask`, repeated while it fails for a temporary reason."""
    from huggingface_hub import errors

    for wait in (*(DELAYS if delays is None else delays), None):
        try:
            return ask()
        except (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
            raise FileNotFoundError(f"{where}: {type(error).__name__}") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise _unreachable(where, error) from error  # the first after huggingface_hub's own retries
        except Exception as error:  # httpx's, requests's, urllib3's or the hub's own: no common class but this
            status = getattr(getattr(error, "response", None), "status_code", None)
            if wait is None or (status is not None and status not in PASSING):
                raise _unreachable(where, error) from error
            time.sleep(wait)
    raise AssertionError


def _unreachable(where: str, error: Exception) -> WinnowError:
    text = str(error).strip().splitlines()
    kind = WinnowError if getattr(error, "response", None) is not None else Unreachable
    return kind(
        f"cannot be fetched from the hub ({type(error).__name__}: {text[0] if text else ''})",
        where=where,
        do="Without a network, evaluate a folder of sets instead, or fill the hub's cache beforehand.",
    )


class HubFileSystem(AbstractFileSystem):
    """The fsspec file system behind `hub://`; read only."""

    protocol = "hub"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str | list[str]) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return path.removeprefix(SCHEME).rstrip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        hub_path = parse(path)
        files = listing(hub_path.repo, hub_path.revision)
        name = self._strip_protocol(path)
        if hub_path.path in files:
            size, mark = files[hub_path.path]
            return {"name": name, "size": size, "type": "file", "ETag": mark}
        if hub_path.path and not any(file.startswith(f"{hub_path.path}/") for file in files):
            raise FileNotFoundError(path)
        return {"name": name, "size": 0, "type": "directory"}

    def exists(self, path: str, **kwargs: Any) -> bool:
        """fsspec's own returns False for any failure."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        hub_path = parse(path)
        inside = f"{hub_path.path}/" if hub_path.path else ""
        files = listing(hub_path.repo, hub_path.revision)
        names = {file.removeprefix(inside).split("/")[0] for file in files if file.startswith(inside)}
        if not names:
            return [self.info(path)] if detail else [self._strip_protocol(path)]
        paths = [f"{self._strip_protocol(path)}/{name}" for name in sorted(names)]
        return [self.info(path) for path in paths] if detail else paths

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "rb":
            raise OSError("the hub is read only")
        return fetch(parse(path)).open("rb")


fsspec.register_implementation("hub", HubFileSystem, clobber=True)

"""Finding shards: directories of tars and parquets, evaluation sets in DataComp's layout, single tars and pipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from winnow.infra.errors import UsageError
from winnow.infra.io import storage
from winnow.infra.io.storage import digest_bytes
from winnow.infra.stages.stage import MANIFEST


@dataclass(frozen=True)
class ShardFiles:
    """A shard of a source.

    Attributes:
        name: path of the tar below the source, without `.tar`.
        tar: URL, or the command of a pipe.
        parquet: URL of the parquet next to it; None if there is none.
        stream: whether it can only be read from start to end.
        fault: why it cannot be read at all.
    """

    name: str
    tar: str
    parquet: str | None = None
    stream: bool = False
    fault: str = ""


def shard_files(source: str) -> list[ShardFiles]:
    """The shards of a source, sorted by name.

    Args:
        source: a directory or its URL; the URL of one `.tar`; or `pipe:COMMAND`, whose output is one tar. A directory
            without tars may hold evaluation sets in DataComp's layout. Then these are the test shards: `test/NAME` of
            one set, `wds_TASK_test/test/NAME` of a directory of sets. Names that begin with "." or "_" are passed over.
            Compressed tars, parquets without a tar, and tars one directory below tars are listed, so that what they
            hold is counted as lost.

    Raises:
        UsageError: there are none.
    """
    if storage.is_pipe(source):
        names = re.findall(r"([\w.-]+)\.tar\b", source)
        return [ShardFiles(names[-1] if names else f"pipe-{digest_bytes(source.encode())[:8]}", source, stream=True)]
    if _is_tar(source):
        if not storage.exists(source):
            raise UsageError("no such file", where=source)
        stem = source.removesuffix(".tar")
        parquet = f"{stem}.parquet"
        found = [ShardFiles(storage.name_of(stem), source, parquet if storage.exists(parquet) else None)]
    elif not storage.is_dir(source):
        raise UsageError("no such folder", where=source)
    else:
        found = _below(source) or _below(source, "test/")
    if not found:
        sets = [name for name in storage.list_names(source) if name.startswith("wds_")]
        found = [shard for name in sets for shard in _below(source, f"{name}/test/")]
    if not found:
        raise UsageError("holds no .tar shard", where=source)
    stream = not storage.has_ranges(found[0].tar)
    return [replace(shard, stream=stream) for shard in found]


def find_shards(source: str) -> list[str]:
    """Names of the shards of a source; see `shard_files`."""
    return [shard.name for shard in shard_files(source)]


def _below(source: str, folder: str = "") -> list[ShardFiles]:
    url = storage.join(source, folder)
    names = [name for name in storage.list_names(url) if is_ours(name)]
    tars: dict[str, str] = {}  # by stem; sorted, so that `a.tar` comes before its compressed copy `a.tar.gz`
    for name in names:
        if found := re.fullmatch(r"(.+)\.(tar|tgz|tar\.(gz|bz2|xz|zst))", name):
            tars.setdefault(found[1], name)
    if not tars:
        return []
    parquets = {name.removesuffix(".parquet"): storage.join(url, name) for name in names if name.endswith(".parquet")}
    shards = []
    for stem, name in tars.items():
        fault = "" if name.endswith(".tar") else "a compressed tar; shards are plain tars"
        shards.append(ShardFiles(folder + stem, storage.join(url, name), parquets.get(stem), fault=fault))
    for stem in parquets.keys() - tars.keys():
        tar = storage.join(url, f"{stem}.tar")
        shards.append(ShardFiles(folder + stem, tar, parquets[stem], fault="a parquet without its tar"))
    return sorted(shards + _deeper(url, folder, names), key=lambda shard: f"{shard.name}.tar")


def _deeper(url: str, folder: str, names: Sequence[str]) -> list[ShardFiles]:
    """Tars in the directories among `names`, except in outputs of a stage."""
    found = []
    for name in names:
        if "." in name or not storage.is_dir(inner := storage.join(url, name)):
            continue
        inside = storage.list_names(inner)
        fault = "a tar in a directory below the others; give the directory as another source"
        for tar in (tar for tar in inside if MANIFEST not in inside and is_ours(tar) and tar.endswith(".tar")):
            stem = f"{folder}{name}/{tar.removesuffix('.tar')}"
            found.append(ShardFiles(stem, storage.join(inner, tar), fault=fault))
    return found


def is_ours(name: str) -> bool:
    """Whether a file may be part of a pool: others hide files that begin with a dot (macOS's `._00000.tar`) or an
    underscore (`_SUCCESS`)."""
    return not name.startswith((".", "_"))


def base_url(source: str) -> str:
    """The directory that the names of a source's shards are relative to."""
    return source.rpartition("/")[0] if _is_tar(source) else source


def _is_tar(source: str) -> bool:
    # On HTTP, asking whether a URL is a directory would download it.
    return source.endswith(".tar") and (source.startswith(("http://", "https://")) or not storage.is_dir(source))


def source_names(sources: Sequence[str]) -> list[str]:
    """A name for each source: the last part of its URL, or as many parts as distinguish them.

    Example:
        >>> source_names(["/data/a/shards", "/data/b/shards"])
        ['a/shards', 'b/shards']
    """
    urls = [shard_files(url)[0].name if storage.is_pipe(url) else storage.absolute(url) for url in sources]
    parts = [[part for part in url.removesuffix(".tar").split("/") if part] for url in urls]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names

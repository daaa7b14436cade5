"""The files of one set: its text files, its shards, and digests of them."""

from __future__ import annotations

import functools

from winnow.evaluate.protocols.base import EvalSet, load_kind
from winnow.evaluate.sets import packed
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.io import storage

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
MAX_TEXT_BYTES = 64 << 20
MAX_SHARDS = 100_000


def open_set(task: Task, url: str) -> EvalSet:
    """Read the text files of a set, after unpacking a packed one.

    Raises TaskError naming the file that is missing or broken, or does not agree with the task.
    """
    kind, url = load_kind(task.kind), packed.layout(url)
    tars = split_tars(url)
    return EvalSet(task, url, kind, kind.open(task, url), tars)


def read_lines(path: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones at the end. Raises TaskError."""
    if not storage.exists(path):
        raise TaskError("no such file", where=path)
    if storage.size_of(path) > MAX_TEXT_BYTES:
        raise TaskError(f"is larger than {MAX_TEXT_BYTES >> 20} MiB", where=path)
    try:
        lines = [line.strip() for line in storage.read_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise TaskError(f"is not UTF-8 (byte {error.start})", where=path) from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of a set, in label order, and its prompt templates. Raises TaskError naming the file at fault."""
    names_url, templates_url = storage.join(url, CLASSNAMES), storage.join(url, TEMPLATES)
    classnames, templates = read_lines(names_url), read_lines(templates_url)
    if len(classnames) < 2:
        raise TaskError("fewer than two class names", where=names_url)
    if "" in classnames:
        raise TaskError("the class name is empty", where=f"{names_url}:{classnames.index('') + 1}")
    if not templates:
        raise TaskError("holds no template", where=templates_url)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            what = f'the template "{template}" has no {{c}} for the class name'
            raise TaskError(what, where=f"{templates_url}:{number}")
    return tuple(classnames), tuple(templates)


def split_tars(url: str, split: str = "test") -> tuple[str, ...]:
    """URLs of the shards of a split, in order. Raises TaskError when one is missing."""
    url = packed.layout(url)
    path = storage.join(url, split, "nshards.txt")
    lines = read_lines(path)
    if len(lines) != 1 or not lines[0].isdecimal() or not 0 < int(lines[0]) <= MAX_SHARDS:
        raise TaskError(f"should hold the number of {split} shards", where=path)
    tars = tuple(storage.join(url, split, f"{number}.tar") for number in range(int(lines[0])))
    for tar in tars:
        if not storage.exists(tar):
            raise TaskError("no such file", where=tar, do=f"nshards.txt counts {len(tars)} shards.")
        if storage.is_local(tar) and storage.is_dir(tar):
            raise TaskError("is a folder", where=tar)
    return tars


def data_digest(url: str, split: str = "test") -> str:
    """Digest of a split of a set: of the content of its text files and shards where they are local, of the store's
    version tokens where they are not. An unreadable file has a digest, too; reading it raises the error."""
    files = [name for name in storage.list_names(url) if name.endswith((".txt", ".json", ".jsonl"))]
    inner = storage.list_names(storage.join(url, split))
    files += [f"{split}/{name}" for name in inner if name.endswith((".txt", ".tar"))] + packed.files(url)

    def digest(name: str) -> str:
        try:
            return file_digest(storage.join(url, name))
        except OSError as error:
            return f"unreadable: {error.strerror}"

    return storage.digest_json({name: digest(name) for name in files})


def file_digest(url: str) -> str:
    """Digest of a file's content where it is local, else the store's version token."""
    token = storage.version_token(url)
    return _content_digest(url, token) if storage.is_local(url) else token


@functools.lru_cache(maxsize=4096)
def _content_digest(url: str, token: str) -> str:
    """The token is there so that a file that changed is read again."""
    return storage.digest_file(url)

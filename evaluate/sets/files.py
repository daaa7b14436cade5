"""The files of one set: its text files, its shards, and digests of them."""

from __future__ import annotations

import functools

from winnow.evaluate.protocols.base import EvalSet, load_kind
from winnow.evaluate.sets import packed
from winnow.evaluate.tasks.task import Task, TaskError
from winnow.infra.io import storage
from winnow.infra.io.text import TextError, read_text, text_lines

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
MAX_SHARDS = 100_000
MAX_LINES = 1_000_000
MAX_PROMPTS, MAX_PROMPT_CHARACTERS = 4_000_000, 256 << 20  # of a set; ImageNet-21k with 80 templates has 1.7 million


def open_set(task: Task, url: str) -> EvalSet:
    """Read the text files of a set, after unpacking a packed one.

    Raises TaskError naming the file that is missing or broken, or does not agree with the task.
    """
    kind, url = load_kind(task.kind), packed.layout(url)
    tars = split_tars(url)
    return EvalSet(task, url, kind, kind.open(task, url), tars)


def read_lines(path: str) -> list[str]:
    """The lines of a text file, stripped. Raises TaskError."""
    if not storage.exists(path):
        raise TaskError("no such file", where=path)
    try:
        text = read_text(path)
    except TextError as error:
        raise TaskError(error.what, where=path) from None
    if text.count("\n") + text.count("\r") > 2 * MAX_LINES:
        raise TaskError(f"has more than {MAX_LINES:,} lines", where=path)
    return [line.strip() for line in text_lines(text)]


def class_names(url: str, classes: int | None) -> list[str]:
    """The class names of a set, in label order. Raises TaskError.

    A line may be empty, as the fourth of the six in the published list of CLEVR's distances: the class then has an
    empty name, as in CLIP_benchmark since 1.6.0. (1.4.0, which DataComp's requirements name, drops the line, so that
    every later label gets the name after its own.) Empty lines at the end are classes only as far as `classes`, the
    task's number, has room for them.
    """
    path = storage.join(url, CLASSNAMES)
    names = read_lines(path)
    while names and not names[-1] and len(names) > (classes or 0):
        names.pop()
    if len(names) < 2 or not any(names):
        raise TaskError("fewer than two class names", where=path)
    return names


def read_classes(url: str, classes: int | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of a set, as `class_names` gives them, and its prompt templates. Empty lines between templates
    are left out, as in CLIP_benchmark 1.4.0. Raises TaskError naming the file at fault."""
    path = storage.join(url, TEMPLATES)
    names, templates = class_names(url, classes), []
    for number, template in enumerate(read_lines(path), start=1):
        if template and "{c}" not in template:
            raise TaskError(f'the template "{template}" has no {{c}} for the class name', where=f"{path}:{number}")
        templates += [template] if template else []
    if not templates:
        raise TaskError("holds no template", where=path)
    characters = sum(map(len, templates)) * len(names) + "".join(templates).count("{c}") * sum(map(len, names))
    if len(names) * len(templates) > MAX_PROMPTS or characters > MAX_PROMPT_CHARACTERS:
        what = f"{len(templates):,} templates for {len(names):,} class names make too many or too long prompts"
        raise TaskError(what, where=path)
    return tuple(names), tuple(templates)


def split_tars(url: str, split: str = "test") -> tuple[str, ...]:
    """URLs of the shards of a split, in order. Raises TaskError when one is missing."""
    url = packed.layout(url)
    path = storage.join(url, split, "nshards.txt")
    lines = [line for line in read_lines(path) if line]
    if len(lines) != 1 or not lines[0].isdecimal() or not 0 < int(lines[0][:9]) <= MAX_SHARDS:
        raise TaskError(f"should hold the number of {split} shards", where=path)
    tars = tuple(storage.join(url, split, f"{number}.tar") for number in range(int(lines[0])))
    for tar in tars:
        if not storage.exists(tar):
            raise TaskError("no such file", where=tar, do=f"nshards.txt counts {len(tars)} shards.")
        if storage.is_local(tar) and storage.is_dir(tar):
            raise TaskError("is a folder", where=tar)
    return tars


def ignored_tars(url: str, split: str = "test") -> list[str]:
    """Names of the shards of a split that are not read, as in CLIP_benchmark: those beyond the number in `nshards.txt`.
    Raises TaskError."""
    read = {storage.name_of(tar) for tar in split_tars(url, split)}
    names = storage.list_names(storage.join(packed.layout(url), split))
    return [name for name in names if name.endswith(".tar") and not name.startswith(".") and name not in read]


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

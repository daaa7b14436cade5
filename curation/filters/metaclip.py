"""MetaCLIP: balance captions over a list of metadata entries."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from winnow.curation.columns.table import View
from winnow.curation.filters.base import Filter, Positive, Scope, State
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.params import params
from winnow.infra.pool.uids import decode_uids, hash_unit

# The authors' `spacing`: punctuation marks are separate words, and white space is a space.
_SPACING = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`"} | dict.fromkeys("\t\n\r", " "))


@params
class MetaClip(Filter):
    """Keep a caption when one of its metadata entries is drawn, each with probability t / max(count, t).

    Xu et al. 2023 (MetaCLIP), section 3 and algorithm 1. A caption matches an entry when the entry, with a space on
    either side, is a substring of the caption, with a space on either side, around each of `, . ; : ? ! `` ` `` and for
    each tab and line break; case counts. `count` is the number of captions that match an entry. Entries of a caption
    are drawn independently; a caption without an entry is dropped. The draw is the hash of uid, entry and seed instead
    of a random number, so it depends on nothing else.

    Args:
        metadata: UTF-8 file with one entry per line; empty and repeated lines are ignored.
        t: the limit of an entry (the paper: 20,000 for 400 M pairs, 170,000 for 2.5 B).
        seed: of the draw.
        of: `pool` or `survivors`: which captions are counted.
    """

    metadata: str
    t: Positive = 20_000
    seed: int = 0
    of: Scope = "pool"

    name: ClassVar[str] = "metaclip"
    paper: ClassVar[str] = "Xu et al. 2023 (MetaCLIP)"
    example: ClassVar[dict[str, Any]] = {"metadata": "entries.txt"}
    files: ClassVar[tuple[str, ...]] = ("metadata",)

    def columns(self) -> tuple[str, ...]:
        return ("uid", "text")

    def fit(self, view: View) -> State:
        matcher = Matcher.read(self.metadata)
        counts = np.zeros(len(matcher.entries), np.int64)
        matched = total = 0
        for batch in view.batches(("text",)):
            rows, entries = matcher.match(batch["text"])
            counts += np.bincount(entries, minlength=len(counts))
            matched += len(np.unique(rows))
            total += batch.num_rows
        return {"counts": counts, "matched": np.array(matched), "total": np.array(total)}

    def mask(self, batch: pa.Table, state: State) -> np.ndarray:
        matcher = Matcher.read(self.metadata)
        rows, entries = matcher.match(batch["text"])
        uids = decode_uids(batch["uid"])[rows]
        uids["f1"] ^= matcher.marks[entries]
        drawn = hash_unit(uids, self.seed, "metaclip") < self.t / np.maximum(state["counts"], self.t)[entries]
        mask = np.zeros(batch.num_rows, dtype=bool)
        mask[rows[drawn]] = True
        return mask

    def report(self, state: State) -> dict[str, Any]:
        counts = state["counts"]
        tail = int(((counts > 0) & (counts < self.t)).sum())
        return {
            "unmatched": int(state["total"] - state["matched"]),
            "entries": {"all": len(counts), "met": int((counts > 0).sum()), "tail": tail},
        }


class Matcher:
    """Finds the entries in captions.

    Between spaces an entry is a run of words. So a caption is split at its spaces, and each run that starts with the
    first word of an entry is looked up. The matches are those of a substring search, each once.

    Args:
        entries: distinct, none empty.
    """

    def __init__(self, entries: list[str]) -> None:
        self.entries = entries
        self.number = {entry: i for i, entry in enumerate(entries)}
        self.marks = np.array(
            [int.from_bytes(hashlib.blake2b(entry.encode(), digest_size=8).digest(), "little") for entry in entries],
            dtype=np.uint64,
        )
        lengths: dict[str, set[int]] = {}
        for entry in entries:
            words = entry.split(" ")
            lengths.setdefault(words[0], set()).add(len(words))
        self.lengths = {word: tuple(sorted(found)) for word, found in lengths.items()}

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def read(path: str) -> Matcher:
        """Raises WinnowError when there is no such file, or nothing in it."""
        try:
            lines = storage.read_bytes(path).decode().split("\n")
        except UnicodeDecodeError:
            raise WinnowError("is not UTF-8", where=path) from None
        entries = list(dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip()))
        if not entries:
            raise WinnowError("holds no metadata entry", where=path, do="Write one entry per line.")
        return Matcher(entries)

    def find(self, text: str) -> set[int]:
        """Indices of the entries in a caption."""
        words = f" {text} ".translate(_SPACING).split(" ")
        lengths, number, end = self.lengths, self.number, len(words) - 1
        found = set()
        for i in range(1, end):
            for length in lengths.get(words[i], ()):
                if i + length <= end:
                    entry = number.get(words[i] if length == 1 else " ".join(words[i : i + length]))
                    if entry is not None:
                        found.add(entry)
        return found

    def match(self, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """(row, entry) of all matches in a column of captions; int64, shape [matches]."""
        found = [sorted(self.find(text)) if text is not None else [] for text in column.to_pylist()]
        rows = np.repeat(np.arange(len(found)), [len(entries) for entries in found])
        return rows, np.array([entry for entries in found for entry in entries], dtype=np.int64)

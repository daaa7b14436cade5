"""Whether the caption names something that ImageNet-21k shows (Gadre et al. 2023, "Text-based filtering")."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from winnow.curation.measures import wordnet
from winnow.curation.measures.base import Measure, Samples
from winnow.infra.errors import WinnowError
from winnow.infra.io import storage
from winnow.infra.io.content import content_digest
from winnow.infra.params import params

MAX_WORDS = 500_000  # in the cache, about 50 MB
MAX_BYTES = 64 << 20


@params
class Entity(Measure):
    """`entity.in21k`: bool, whether a word of the caption is an ImageNet-21k class; null without a caption.

    The rule is DataComp's (Gadre et al. 2023, section 3.2 and the appendix on text-based filtering). The words are
    `text.split()`, with punctuation. Only the first synset of each word in WordNet 3.0 is used (`WordNet.first`, of any
    part of speech). Its byte offset must be one of ImageNet-21k's, which are nouns. So an offset that a verb, adjective
    or adverb shares with a listed noun matches too, as in DataComp.

    Args:
        dictionary: folder of WordNet 3.0's dictionary files; None to search for it
            (`winnow.curation.measures.wordnet.candidate_folders`).
        synsets: text file with one synset per line, such as n01440764; None for ImageNet-21k's 21,843, which come with
            timm.
    """

    dictionary: str | None = None
    synsets: str | None = None

    name: ClassVar[str] = "entity"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    summary: ClassVar[str] = "whether a word's first WordNet synset is an ImageNet-21k class"

    def params(self) -> dict[str, Any]:
        dictionary = wordnet.load(wordnet.find(self.dictionary))
        return {"dictionary": dictionary.digest[:16], "synsets": content_digest(_list_url(self.synsets))[:16]}

    def schema(self) -> pa.Schema:
        return pa.schema([("in21k", pa.bool_())])

    def compute(self, samples: Samples) -> pa.Table:
        texts = samples.table["text"].to_pylist()
        words = [text.split() if text is not None else [] for text in texts]
        named = _lexicon(wordnet.find(self.dictionary), _list_url(self.synsets)).named(words)
        values = [None if text is None else found for text, found in zip(texts, named, strict=True)]
        return pa.table([pa.array(values, pa.bool_())], schema=self.schema())


class Lexicon:
    """Which words name a synset of the given offsets; each distinct word is looked up once."""

    def __init__(self, dictionary: wordnet.WordNet, offsets: frozenset[int]) -> None:
        self.dictionary, self.offsets = dictionary, offsets
        self._yes: set[str] = set()
        self._no: set[str] = set()

    def named(self, captions: list[list[str]]) -> list[bool]:
        """For each caption, given as its words, whether one of them names a listed synset."""
        if len(self._yes) + len(self._no) > MAX_WORDS:
            self._yes.clear()
            self._no.clear()
        for word in set().union(*captions) - self._no - self._yes:
            (self._yes if self.dictionary.first(word) in self.offsets else self._no).add(word)
        return [not self._yes.isdisjoint(words) for words in captions]


def read_synsets(url: str) -> frozenset[int]:
    """The offsets in a list of synsets (such as n01440764, one per line; empty lines are ignored).

    Raises:
        WinnowError: a line is not a synset, or there are no synsets.
    """
    if storage.size_of(url) > MAX_BYTES:
        raise WinnowError("is too large for a list of synsets", where=url)
    offsets = set()
    for number, line in enumerate(storage.read_bytes(url).decode("utf-8", "replace").splitlines(), 1):
        word = line.strip()
        if not word:
            continue
        if not (word[0].isalpha() and word[1:].isdecimal() and word.isascii()):
            raise WinnowError(f'"{word[:40]}" is not a synset such as n01440764', where=f"{url}, line {number}")
        offsets.add(int(word[1:]))
    if not offsets:
        raise WinnowError("lists no synset", where=url)
    return frozenset(offsets)


def _list_url(path: str | None) -> str:
    if path is not None:
        if not storage.exists(path):
            raise WinnowError("no such list of synsets", where=path)
        return path
    spec = importlib.util.find_spec("timm")  # without importing it
    shipped = Path(spec.origin if spec and spec.origin else "").parent / "data/_info/imagenet21k_goog_synsets.txt"
    if not shipped.is_file():
        what = "ImageNet-21k's list of synsets comes with timm, which is not installed"
        raise WinnowError(what, do="Install timm, or give the measure `entity` a list as `synsets`.")
    return str(shipped)


@functools.lru_cache(maxsize=2)
def _lexicon(dictionary: str, synsets: str) -> Lexicon:
    return Lexicon(wordnet.load(dictionary), read_synsets(synsets))

"""The first synset of a word in WordNet 3.0 (Fellbaum 1998), read from the dictionary files.

The dictionary's `index.POS` files list for each lemma its synsets, most frequent sense first, by byte offset (wndb(5));
`POS.exc` lists irregular forms; other inflected forms lose their ending by the rules of morphy(7).

NLTK is not used, because from 3.9 on it no longer applies these rules repeatedly and so finds other first synsets than
DataComp's filter did with NLTK 3.8 (the test in tests/curation/test_wordnet.py compares them).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

ORDER = ("noun", "verb", "adj", "adv")
# Endings and their replacements, in the order in which they are tried (morphy(7), "Rules of Detachment").
DETACHMENT: dict[str, tuple[tuple[str, str], ...]] = {
    "noun": (
        ("s", ""),
        ("ses", "s"),
        ("ves", "f"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}
FILES = (*(f"index.{pos}" for pos in ORDER), *(f"{pos}.exc" for pos in ORDER))
MAX_BYTES = 64 << 20  # index.noun, the largest, has 4.8 MB


class WordNet:
    """First synsets as NLTK 3.8, the release that DataComp used, returns them: `wordnet.synsets(word)[0].offset()`.

    A word is lower-cased. Nouns, verbs, adjectives (including satellites) and adverbs are tried in this order. In each,
    the candidates are the word itself and then its forms: those in the exception list if it has the word, otherwise the
    results of the rules of detachment; if none is a lemma, the rules are applied to the results again.

    Args:
        folder: with the eight FILES, or NLTK's `wordnet.zip`.
        repeat: whether to apply the rules again; NLTK does not from 3.9 on.

    Raises:
        WinnowError: a file is missing, too large or malformed, or belongs to another version than 3.0.
    """

    def __init__(self, folder: str, repeat: bool = True) -> None:
        self.repeat = repeat
        self._lemmas: dict[str, dict[str, int]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        state = hashlib.sha256()
        for pos in ORDER:
            index, exceptions = _read(folder, f"index.{pos}"), _read(folder, f"{pos}.exc")
            state.update(b"%d %d " % (len(index), len(exceptions)) + index + exceptions)
            self._lemmas[pos] = _parse_index(index, f"{folder}/index.{pos}")
            lines = (line.split() for line in exceptions.decode("utf-8", "replace").splitlines())
            self._exceptions[pos] = {terms[0]: terms[1:] for terms in lines if terms}
        self.digest = state.hexdigest()

    def first(self, word: str) -> int | None:
        """Offset of the first synset in the data file of its part of speech; None for a word that is not in WordNet."""
        word = word.lower()
        bases = ((pos, self._base(word, pos)) for pos in ORDER)
        return next((self._lemmas[pos][lemma] for pos, lemma in bases if lemma is not None), None)

    def _base(self, word: str, pos: str) -> str | None:
        lemmas, exceptions = self._lemmas[pos], self._exceptions[pos]
        if word in lemmas:
            return word
        forms = exceptions[word] if word in exceptions else _detach([word], pos)
        found = next((form for form in forms if form in lemmas), None)
        if word in exceptions or not self.repeat:
            return found
        while found is None and forms:
            forms = _detach(forms, pos)
            found = next((form for form in forms if form in lemmas), None)
        return found


def _detach(forms: list[str], pos: str) -> list[str]:
    rules = DETACHMENT[pos]
    return [form[: len(form) - len(old)] + new for form in forms for old, new in rules if form.endswith(old)]


def _parse_index(data: bytes, where: str) -> dict[str, int]:
    """Lemma to the offset of its first synset."""
    text = data.decode("utf-8", "replace")
    version = re.search(r"WordNet (\d+(?:\.\d+)*) Copyright", text[:4096])
    if version is None or version[1] != "3.0":
        found = f"is of WordNet {version[1]}" if version else "does not say that it is of WordNet 3.0"
        raise WinnowError(found, where=where, do="ImageNet's synsets are offsets in WordNet 3.0; give its dictionary.")
    lemmas = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(" ") or not line:
            continue
        # lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset [synset_offset...]
        fields = line.split()
        try:
            synsets, pointers = int(fields[2]), int(fields[3])
            if synsets < 1 or pointers < 0 or len(fields) != 6 + pointers + synsets:
                raise ValueError
            lemmas[fields[0]] = int(fields[6 + pointers])
        except (ValueError, IndexError):
            raise WinnowError("is not a line of a WordNet index", where=f"{where}, line {number}") from None
    return lemmas


def _read(folder: str, name: str) -> bytes:
    if folder.endswith(".zip"):
        try:
            with zipfile.ZipFile(folder) as archive:
                member = f"{Path(folder).stem}/{name}"
                _bound(archive.getinfo(member).file_size, f"{folder}/{name}")
                return archive.read(member)
        except (KeyError, zipfile.BadZipFile, OSError) as error:
            raise WinnowError(f"{name} cannot be read from it ({error})", where=folder) from None
    url = storage.join(folder, name)
    if not storage.exists(url):
        raise WinnowError(f"has no {name}", where=folder, do="Give the folder of WordNet's dictionary files.")
    _bound(storage.size_of(url), url)
    return storage.read_bytes(url)


def _bound(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise WinnowError(f"has {size:,} bytes, too many for a WordNet file", where=where)


def candidate_folders() -> Iterator[str]:
    """Where a dictionary may be: WNSEARCHDIR, WNHOME and WORDNET, Debian's folder, NLTK's data folders."""
    for variable in ("WNSEARCHDIR", "WNHOME", "WORDNET"):
        if os.environ.get(variable):
            yield from (os.environ[variable], storage.join(os.environ[variable], "dict"))
    yield "/usr/share/wordnet"
    homes = [path for path in os.environ.get("NLTK_DATA", "").split(os.pathsep) if path]
    homes.append(str(Path("~/nltk_data").expanduser()))
    homes += [str(Path(sys.prefix, *parts)) for parts in (("nltk_data",), ("share", "nltk_data"), ("lib", "nltk_data"))]
    homes += ["/usr/share/nltk_data", "/usr/local/share/nltk_data", "/usr/lib/nltk_data", "/usr/local/lib/nltk_data"]
    for home in homes:
        yield storage.join(home, "corpora", "wordnet")
        yield storage.join(home, "corpora", "wordnet.zip")


def find(path: str | None = None) -> str:
    """The folder (or zip) of the dictionary: the given one, else the first of `candidate_folders` that has one.

    Raises:
        WinnowError: there is none.
    """
    if path is not None:
        if path.endswith(".zip") or storage.exists(storage.join(path, "index.noun")):
            return path
        inner = storage.join(path, "dict")
        if storage.exists(storage.join(inner, "index.noun")):
            return inner
        raise WinnowError("has no index.noun", where=path, do="Give the folder of WordNet's dictionary files.")
    for folder in candidate_folders():
        if storage.exists(folder if folder.endswith(".zip") else storage.join(folder, "index.noun")):
            return folder
    do = "Install the package `wordnet-base` (Debian, Ubuntu) or NLTK's `wordnet`, or give `entity` its `dictionary`."
    raise WinnowError("WordNet's dictionary is not installed", do=do)


@functools.lru_cache(maxsize=2)
def load(folder: str) -> WordNet:
    """The dictionary in a folder, read once per process."""
    return WordNet(folder)

"""First synsets and the entity measure: by hand on a made-up dictionary, and against NLTK on the real one."""

import itertools
import random
import shutil
import zipfile

import pyarrow as pa
import pytest

import winnow.curation.measures.entity
from tests.curation.dictionary import write_dictionary
from winnow.curation.measures import wordnet
from winnow.curation.measures.base import Samples
from winnow.curation.measures.entity import Entity, Lexicon, read_synsets
from winnow.curation.measures.wordnet import ORDER, WordNet
from winnow.infra.errors import WinnowError

FIRST = {
    "dog": 100,  # the first of two senses, and a noun before a verb
    "DOGS": 100,
    "churches": 110,
    "wolves": 120,  # an exception
    "calves": 121,  # ves -> f
    "foxes": 130,
    "babies": 140,
    "firemen": 150,
    "lenses": 160,  # the exception, not len + ses
    "lens": 160,  # itself before its forms
    "axes": 180,  # the exception's forms in their order
    "roses": 330,  # the exception is no lemma, and an exception takes no rules; so the verb
    "glasses": 196,  # itself before its exception
    "run": 170,
    "ran": 300,
    "baking": 310,  # ing -> e before ing -> nothing
    "baked": 310,
    "eating": 320,
    "loves": 340,
    "finer": 400,
    "biggest": None,  # est -> nothing gives "bigg"
    "bigger": 410,
    "better": 500,  # the adjective's exception is no lemma; the adverb's is
    "best": 500,
    "quick": 100,
    "quicklys": None,  # adverbs have no rules
    "ice_cream": 195,
    "dogss": 100,  # the rules twice
    "dog,": None,
    "": None,
    "s": None,
    "日本": None,
}


@pytest.mark.parametrize("word", FIRST)
def test_first_synset_by_hand(word, tiny_wordnet):
    assert WordNet(str(tiny_wordnet)).first(word) == FIRST[word]


def test_rules_are_repeated_only_on_request(tiny_wordnet):
    assert WordNet(str(tiny_wordnet), repeat=False).first("dogss") is None


def real_dictionary(monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR")
    try:
        return wordnet.find()
    except WinnowError:
        pytest.skip("WordNet's dictionary is not installed (Debian's wordnet-base, or NLTK's wordnet)")


def test_first_synset_is_nltks(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk", reason="NLTK is not installed")
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    found = real_dictionary(monkeypatch)
    if found.endswith(".zip"):
        zipfile.ZipFile(found).extractall(tmp_path)
        found = str(tmp_path / "wordnet")
    folder = tmp_path / "corpora"
    shutil.copytree(found, folder)
    if not (folder / "lexnames").exists():  # Debian leaves it out; only Synset.lexname wants it
        (folder / "lexnames").write_text("".join(f"{i:02d}\tname.{i}\t1\n" for i in range(45)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(WordNetCorpusReader, "map_wn", lambda self, version="wordnet": None)  # of other languages
    with pytest.warns(UserWarning, match="multilingual"):
        reader = WordNetCorpusReader(str(folder), None)
    ours = WordNet(found, repeat=tuple(map(int, nltk.__version__.split(".")[:2])) < (3, 9))

    rng = random.Random(0)
    lemmas = [lemma for pos in ORDER for lemma in ours._lemmas[pos]]
    words = rng.sample(lemmas, 3000) + [word for pos in ORDER for word in ours._exceptions[pos]]
    for ending in ("s", "es", "ed", "ing", "er", "est", "men", "ies", "ss", "sing", "ves", ","):
        words += [lemma + ending for lemma in rng.sample(lemmas, 300)]
        words += [lemma[:-1].upper() + ending for lemma in rng.sample(lemmas, 300)]
    words += ["".join(rng.choice("aeioustrngdm") for _ in range(rng.randint(1, 6))) for _ in range(4000)]
    for word in words:
        found = reader.synsets(word)
        assert ours.first(word) == (found[0].offset() if found else None), word


def test_all_of_imagenets_synsets_are_in_the_dictionary(monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    data = wordnet._read(real_dictionary(monkeypatch), "data.noun").decode()
    offsets = {int(line[:8]) for line in data.splitlines() if not line.startswith(" ")}
    listed = read_synsets(winnow.curation.measures.entity._list_url(None))
    assert len(listed) == 21_843 and listed <= offsets


TEXTS = [
    "a photo of two dogs",
    "dogs, wolves!",  # punctuation stays with its word
    "Wolves",
    "a quick one",  # an adjective with the offset of a listed noun
    "they ran",
    "no\tsuch\u00a0fox",
    "",
    None,
    "   ",
    "I ATE the babies\nand calves",
]


@pytest.fixture
def synsets(tmp_path):
    path = tmp_path / "synsets.txt"
    path.write_text("n00000100\nn00000120\n\nn00000130\nn00000320")
    return str(path)


def plainly(text, dictionary, listed):
    """DataComp's rule."""
    for word in text.split():
        offset = dictionary.first(word)
        if offset is not None and offset in listed:
            return True
    return False


def test_entity_is_datacomps_rule(tiny_wordnet, synsets, monkeypatch):
    dictionary = WordNet(str(tiny_wordnet))
    expected = [None if text is None else plainly(text, dictionary, {100, 120, 130, 320}) for text in TEXTS]
    assert expected == [True, False, True, True, False, True, False, None, False, True]
    measure = Entity(str(tiny_wordnet), synsets)
    samples = Samples(pa.table({"text": TEXTS}), [])
    assert measure.compute(samples)["in21k"].to_pylist() == expected
    lexicon = Lexicon(dictionary, frozenset({100, 120, 130, 320}))
    monkeypatch.setattr(winnow.curation.measures.entity, "MAX_WORDS", 2)  # forgets between batches
    for _, (text, value) in itertools.product(range(2), zip(TEXTS, expected, strict=True)):
        assert lexicon.named([text.split() if text else []]) == [bool(value)]


def test_entity_is_identified_by_content(tiny_wordnet, tmp_path, synsets):
    other = write_dictionary(tmp_path / "elsewhere" / "dict")
    assert Entity(str(tiny_wordnet), synsets).id == Entity(str(other.parent), synsets).id
    (tmp_path / "more.txt").write_text("n00000100\n")
    assert Entity(str(other), str(tmp_path / "more.txt")).id != Entity(str(other), synsets).id
    with (other / "noun.exc").open("a") as file:
        file.write("oxen ox\n")
    wordnet.load.cache_clear()
    assert Entity(str(other), synsets).id != Entity(str(tiny_wordnet), synsets).id


def test_the_zip_of_nltk_can_be_read(tiny_wordnet, tmp_path):
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for path in tiny_wordnet.iterdir():
            archive.write(path, f"wordnet/{path.name}")
    read = WordNet(wordnet.find(str(tmp_path / "wordnet.zip")))
    assert read.first("wolves") == 120 and read.digest == WordNet(str(tiny_wordnet)).digest
    with pytest.raises(WinnowError, match=r"index\.noun cannot be read"):
        zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
        WordNet(str(tmp_path / "empty.zip"))


def test_missing_files_are_reported(tmp_path, monkeypatch, tiny_wordnet):
    with pytest.raises(WinnowError, match=r"has no index\.noun"):
        wordnet.find(str(tmp_path))
    monkeypatch.setattr(wordnet, "candidate_folders", lambda: iter([str(tmp_path)]))
    with pytest.raises(WinnowError, match=r"not installed.*wordnet-base"):
        Entity().params()
    with pytest.raises(WinnowError, match="no such list of synsets"):
        Entity(str(tiny_wordnet), str(tmp_path / "none.txt")).params()


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(WinnowError, match=r"is of WordNet 3\.1"):
        WordNet(str(write_dictionary(tmp_path / "later", version="3.1")))
    broken = write_dictionary(tmp_path / "broken")
    (broken / "adv.exc").unlink()
    with pytest.raises(WinnowError, match=r"has no adv\.exc"):
        WordNet(str(broken))
    broken = write_dictionary(tmp_path / "cut")
    text = (broken / "index.verb").read_text().splitlines()
    (broken / "index.verb").write_text("\n".join([*text[:4], text[4][:-12]]))
    with pytest.raises(WinnowError, match=r"index\.verb, line 5: is not a line"):
        WordNet(str(broken))
    (tmp_path / "bad.txt").write_text("n01440764\ntench\n")
    with pytest.raises(WinnowError, match=r'line 2: "tench" is not a synset'):
        read_synsets(str(tmp_path / "bad.txt"))
    (tmp_path / "nothing.txt").write_text("\n")
    with pytest.raises(WinnowError, match="lists no synset"):
        read_synsets(str(tmp_path / "nothing.txt"))

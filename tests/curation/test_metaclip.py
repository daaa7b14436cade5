"""MetaCLIP's balancing against substring search and algorithm 1 written plainly."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, kept, uids
from winnow.curation.algebra.parse import fingerprint
from winnow.curation.filters.metaclip import Matcher, MetaClip
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError, build
from winnow.infra.pool.uids import decode_uids, encode_uids

ENTRIES = [
    "dog", "golden dog", "dog park", "a", "new york", "york", "U.S", "rock 'n' roll", "e . g", "end", "Cat",
    "two  spaces", "x", "x x", "日本",
]  # fmt: skip
TEXTS = [
    "a golden dog park",
    "dogs are not a dog,but: dog",
    "New york\tnew york\nnew\ryork",
    "the U.S. and the e.g. of rock 'n' roll",
    "end",
    " end ",
    "cat",
    "Cat!",
    "two  spaces and two spaces",
    "x x x",
    "日本",
    "日本語",
    "",
    "nothing to be found",
    None,
]


def spaced(text):
    """As the authors' code puts spaces."""
    text = f" {text} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, f" {mark} ")
    for mark in ["\t", "\n", "\r"]:
        text = text.replace(mark, " ")
    return text


def matches(text):
    return [i for i, entry in enumerate(ENTRIES) if text is not None and f" {entry} " in spaced(text)]


def test_matches_are_those_of_substring_search():
    matcher = Matcher(ENTRIES)
    rows, entries = matcher.match(pa.chunked_array([TEXTS]))
    expected = [(row, entry) for row, text in enumerate(TEXTS) for entry in matches(text)]
    assert list(zip(rows.tolist(), entries.tolist(), strict=True)) == expected
    assert len({entry for _, entry in expected}) >= len(ENTRIES) - 1
    rng = np.random.default_rng(0)
    pieces = [*"abx ,.\t", "dog", "park", "golden", "new", "york", "  ", "end"]
    texts = ["".join(rng.choice(pieces, 12)) for _ in range(2000)]
    assert [sorted(matcher.find(text)) for text in texts] == [matches(text) for text in texts]


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "entries.txt"
    path.write_text("\n".join([*ENTRIES, "", ENTRIES[0]]) + "\n", encoding="utf-8")
    return str(path)


def captions(n, rng):
    words = ["dog", "dog", "dog", "york", "new york", "Cat", "nothing", "U.S"]
    return [" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(n)]


def test_balancing_is_algorithm_1(metadata):
    """Each entry beyond t keeps a caption with probability t / count; the head is thinned, the tail kept whole."""
    n, t = 6000, 300
    texts = captions(n, np.random.default_rng(1))
    table = pa.table({"uid": uids(n), "text": texts})
    found = [matches(text) for text in texts]
    counts = np.zeros(len(ENTRIES), int)
    for entries in found:
        counts[entries] += 1
    probability = t / np.maximum(counts, t)
    node = MetaClip(metadata=metadata, t=t)
    state = node.fit(Columns(table.slice(0, 1500), table.slice(1500)))
    assert state["counts"].tolist() == counts.tolist()
    mask = node.mask(table, state)
    assert not mask[[not entries for entries in found]].any()  # what matches nothing is dropped
    # Captions with the same entries are kept with 1 - prod(1 - p), independently.
    for kind in {tuple(entries) for entries in found} - {()}:
        rows = np.array([tuple(entries) == kind for entries in found])
        p = 1 - np.prod(1 - probability[list(kind)])
        sem = 5 * np.sqrt(rows.sum() * p * (1 - p)) + 1e-9
        assert abs(mask[rows].sum() - rows.sum() * p) <= sem, kind
    met, tail = int((counts > 0).sum()), int(((counts > 0) & (counts < t)).sum())
    assert node.report(state) == {
        "unmatched": sum(not entries for entries in found),
        "entries": {"all": len(ENTRIES), "met": met, "tail": tail},
    }
    assert kept(MetaClip(metadata=metadata, t=n), table).tolist() == [bool(entries) for entries in found]


def test_the_draw_depends_on_uid_entry_and_seed_alone(metadata):
    texts = captions(3000, np.random.default_rng(2))
    table = pa.table({"uid": uids(3000), "text": texts})
    node = MetaClip(metadata=metadata, t=100)
    state = node.fit(Columns(table))
    mask = node.mask(table, state)
    order = np.random.default_rng(3).permutation(3000)
    assert node.mask(table.take(pa.array(order)), state).tolist() == mask[order].tolist()
    assert MetaClip(metadata=metadata, t=100, seed=1).mask(table, state).tolist() != mask.tolist()
    # More is kept when t rises, and nothing that was is lost.
    assert not (mask & ~MetaClip(metadata=metadata, t=200).mask(table, state)).any()
    assert table["uid"].to_pylist() == encode_uids(decode_uids(table["uid"]))  # left as they were


def test_the_metadata_is_identified_by_content(metadata, tmp_path):
    other = tmp_path / "copy.txt"
    other.write_bytes((tmp_path / "entries.txt").read_bytes())
    assert fingerprint(MetaClip(metadata=metadata)) == fingerprint(MetaClip(metadata=str(other)))
    other.write_text("dog\n")
    assert fingerprint(MetaClip(metadata=metadata)) != fingerprint(MetaClip(metadata=str(other)))


def test_refused(tmp_path):
    with pytest.raises(ParameterError, match="t must be at least 1, not 0"):
        build(MetaClip, {"metadata": "x", "t": 0}, "metaclip")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(WinnowError, match="no metadata entry"):
        Matcher.read(str(tmp_path / "empty"))
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(WinnowError, match="not UTF-8"):
        Matcher.read(str(tmp_path / "latin"))
    with pytest.raises(WinnowError, match="no such file"):
        Matcher.read(str(tmp_path / "none"))

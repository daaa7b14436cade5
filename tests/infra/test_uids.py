import hashlib

import numpy as np
import pyarrow as pa
import pytest

from winnow.infra.errors import WinnowError
from winnow.infra.pool.uids import (
    decode_uids,
    derived_uid,
    encode_uids,
    hash_unit,
    is_member,
    load_subset,
    save_subset,
    sort_uids,
    uid_column,
)


def some_uids(n: int, seed: int = 0) -> list[str]:
    return [hashlib.md5(f"{seed}/{i}".encode()).hexdigest() for i in range(n)]


def as_datacomp(uids: list[str]) -> np.ndarray:
    """DataComp's own conversion, one at a time."""
    return np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], dtype="u8,u8")


def test_decoding_is_datacomps():
    uids = some_uids(1000)
    assert np.array_equal(decode_uids(pa.array(uids)), as_datacomp(uids))
    chunked = pa.chunked_array([uids[:3], uids[3:500], uids[500:]])
    assert np.array_equal(decode_uids(chunked.slice(7, 900)), as_datacomp(uids[7:907]))
    assert encode_uids(as_datacomp(uids)) == uids


@pytest.mark.parametrize(("uid", "words"), [("ab", "32 characters"), ("z" * 32, "not hexadecimal"), (None, "null")])
def test_what_is_no_uid_is_refused(uid, words):
    with pytest.raises(WinnowError, match=words):
        decode_uids(pa.array([*some_uids(2), uid]))


def test_sorting_is_numpys():
    uids = as_datacomp([uid[:15] + "0" + uid[16:] for uid in some_uids(300)] + ["0" * 16 + "f" * 16, "0" * 32])
    uids["f0"][:50] = 7
    assert np.array_equal(sort_uids(uids), np.sort(uids))


def test_membership_against_a_set():
    uids = as_datacomp(some_uids(400))
    uids["f0"][:40] = uids["f0"][0]  # many that share their first half
    subset = sort_uids(np.concatenate([uids[10:200:3], as_datacomp(some_uids(50, seed=1))]))
    selected = {tuple(uid) for uid in subset.tolist()}
    assert is_member(uids, subset).tolist() == [tuple(uid) in selected for uid in uids.tolist()]
    assert not is_member(uids, subset[:0]).any()


def test_subset_file_is_the_sorted_array(tmp_path):
    uids = as_datacomp(some_uids(100))
    save_subset(str(tmp_path / "subset.npy"), uids)
    assert np.array_equal(np.load(tmp_path / "subset.npy"), np.sort(uids))
    assert np.array_equal(load_subset(str(tmp_path / "subset.npy")), np.sort(uids))
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(WinnowError, match="u8,u8"):
        load_subset(str(tmp_path / "other.npy"))


def test_hash_is_uniform_and_its_own_for_each_seed():
    uids = as_datacomp(some_uids(20000))
    first, second = hash_unit(uids, 0), hash_unit(uids, 1)
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom: p < 1e-4
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    order = np.random.default_rng(0).permutation(len(uids))
    assert np.array_equal(hash_unit(uids[order], 0), first[order])
    # uids that differ in one half only
    pairs = np.zeros(1000, dtype="u8,u8")
    pairs["f1"] = np.arange(1000)
    assert len(np.unique(hash_unit(pairs, 0))) == 1000


def test_derived_uid_depends_on_where_the_parts_end():
    assert derived_uid("ab", "c") != derived_uid("a", "bc")
    assert derived_uid("ab", "c") == hashlib.sha256(b"ab\0c").hexdigest()[:32]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_uids_as_a_column(n):
    uids = np.random.default_rng(0).integers(0, 1 << 63, (n, 2), dtype=np.uint64).view("u8,u8")[:, 0]
    assert uid_column(uids).to_pylist() == encode_uids(uids)

"""Fractions, budgets and weighted scores, against plain sorting."""

import math

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, kept, uids
from winnow.curation.algebra.fit import fit_tree
from winnow.curation.algebra.funnel import TreeEvaluator
from winnow.curation.algebra.parse import parse
from winnow.curation.columns.quantile import nth_largest
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.filters.random_fraction import RandomFraction
from winnow.curation.filters.score import Score, percentile
from winnow.infra.errors import UsageError


def plain_nth(values, rank):
    """The value at a rank in descending order; NaN is below all others."""
    ordered = sorted((-math.inf if math.isnan(v) else v for v in values), reverse=True)
    return ordered[rank] if rank < len(ordered) else -math.inf


STREAMS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "float32": lambda rng, n: rng.normal(size=n).astype(np.float32),
    "half precision": lambda rng, n: rng.normal(size=n).astype(np.float16),
    "ties": lambda rng, n: np.round(rng.normal(size=n), 1),
    "all equal": lambda rng, n: np.full(n, 0.25),
    "equal but one": lambda rng, n: np.r_[np.full(n - 1, -3.0), 7.0],
    "signs and zeros": lambda rng, n: rng.choice([-0.0, 0.0, -1e-310, 1e-310, -5.0], n),
    "missing": lambda rng, n: np.where(rng.random(n) < 0.4, np.nan, rng.normal(size=n)),
    "all missing": lambda rng, n: np.full(n, np.nan),
    "infinite": lambda rng, n: rng.choice([np.inf, -np.inf, 1.0], n),
    "rising": lambda rng, n: np.sort(rng.normal(size=n)),  # the first block predicts nothing
    "falling": lambda rng, n: np.sort(rng.normal(size=n))[::-1],
    "close together": lambda rng, n: 1 + rng.integers(0, 50, n) * np.finfo(float).eps,
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("block", [1, 64, 100_000])
def test_nth_largest_equals_sorting(kind, block):
    values = STREAMS[kind](np.random.default_rng(0), 1000)
    parts = np.split(values, [0, 1, 300, 301, 700])
    for rank in (0, 1, 299, 500, 998, 999, 1000):
        found, n = nth_largest(lambda: iter(parts), lambda n, rank=rank: rank, block=block)
        assert n == 1000 and found == plain_nth(values.tolist(), rank), rank


def test_nth_largest_of_an_empty_stream():
    assert nth_largest(lambda: iter([]), lambda n: 0) == (-math.inf, 0)


def table(n=500, seed=0, digits=2):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=n), digits)
    scores[rng.random(n) < 0.1] = np.nan
    return pa.table(
        {
            "uid": uids(n),
            "clip.score": scores,
            "caption.words": rng.integers(1, 9, n),
            "clip_b32_similarity_score": np.round(rng.normal(size=n), 1),
        }
    )


@pytest.mark.parametrize("budget", [1, 7, 200, 449])
def test_a_budget_keeps_the_best_and_breaks_ties_by_uid(budget):
    data = table()
    rows = [(score, uid) for score, uid in zip(data["clip.score"].to_pylist(), data["uid"].to_pylist(), strict=True)]
    best = sorted((row for row in rows if not math.isnan(row[0])), key=lambda row: (-row[0], row[1]))[:budget]
    mask = kept(ClipScore(keep=budget), data)
    assert mask.sum() == min(budget, len(best))
    assert {uid for uid, keep in zip(data["uid"].to_pylist(), mask, strict=True) if keep} == {uid for _, uid in best}


def test_a_budget_beyond_the_pool_keeps_every_score():
    data = table()
    present = ~np.isnan(data["clip.score"].to_numpy())
    assert kept(ClipScore(keep=10_000), data).tolist() == present.tolist()


def scored(tree, data):
    node = parse(tree)
    view = Columns(data.slice(0, 200), data.slice(200))
    view.pool = view.columns_url = None
    return TreeEvaluator(node, fit_tree(node, view, lambda item, seen: item.fit(seen))).mask(data)


def test_fractions_of_the_pool_and_of_the_survivors(monkeypatch):
    data = table()
    words, scores = data["caption.words"].to_numpy(), data["clip.score"].to_numpy()

    class Survivors(Columns):
        """As winnow.curation.algebra.fit.Survivors, over tables in memory."""

        def __init__(self, pool, columns_url, targets, node, states):
            evaluator = TreeEvaluator(node, list(states))
            super().__init__(
                *(part.filter(pa.array(evaluator.mask(part))) for part in (data.slice(0, 200), data.slice(200)))
            )

    monkeypatch.setattr("winnow.curation.algebra.fit.Survivors", Survivors)
    long = {"score": {"caption.words": 1.0, "fraction": 0.5}}
    before = scored(long, data)
    assert 0 < before.sum() < len(words)
    for of, scope in (("pool", np.ones(len(words), bool)), ("survivors", before)):
        mask = scored({"all": [long, {"clip_score": {"fraction": 0.3, "of": of}}]}, data)
        among = scores[scope]
        threshold = plain_nth(among.tolist(), int(len(among) * 0.3))
        assert mask.tolist() == (before & (scores >= threshold)).tolist(), of
    # members of an `any` do not affect each other
    mask = scored({"any": [long, {"clip_score": {"fraction": 0.3, "of": "survivors"}}]}, data)
    assert mask.tolist() == (before | (scores >= plain_nth(scores.tolist(), int(len(scores) * 0.3)))).tolist()


def plain_percentile(value, values):
    values = [v for v in values if not math.isnan(v)]
    return (sum(v < value for v in values) + sum(v == value for v in values) / 2) / len(values)


def test_weighted_scores_are_sums_of_percentiles():
    data = table(200)
    node = Score({"clip": 0.5, "caption.words": -2, "b32": 1}, fraction=0.25)
    columns = {"clip.score": 0.5, "caption.words": -2, "clip_b32_similarity_score": 1}
    assert set(node.columns()) == set(columns)
    plain = []
    for row in data.to_pylist():
        parts = [w * plain_percentile(row[c], data[c].to_pylist()) for c, w in columns.items()]
        plain.append(math.nan if math.isnan(row["clip.score"]) else sum(parts))
    state = node.fit(Columns(data.slice(0, 70), data.slice(70)))
    assert np.allclose(node.total(data, state), plain, equal_nan=True)
    threshold = plain_nth(node.total(data, state).tolist(), 50)
    assert node.mask(data, state).tolist() == [not math.isnan(p) and p >= threshold - 1e-12 for p in plain]


def test_a_single_score_selects_as_the_score_itself():
    data = table(300, digits=9)
    assert kept(Score({"clip": 3.0}, fraction=0.2), data).tolist() == kept(ClipScore(fraction=0.2), data).tolist()
    fewest = kept(Score({"clip": -1}, keep=40), data)
    order = np.argsort(data["clip.score"].to_numpy())[:40]
    assert sorted(np.flatnonzero(fewest)) == sorted(order)


def test_percentiles_of_scores_outside_the_pool():
    assert percentile(np.array([0.0, 1.5, 2.0, 9.0]), np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [0, 0.25, 0.5, 1]


def test_ranks_of_a_large_pool_use_a_sample(monkeypatch):
    data = table(2000, digits=9)
    whole = Score({"clip": 1.0}, fraction=0.5).fit(Columns(data))
    monkeypatch.setattr("winnow.curation.filters.score.RANKED", 500)
    node = Score({"clip": 1.0}, fraction=0.5)
    state = node.fit(Columns(data))
    drawn = state["sorted clip.score"]
    assert 350 < len(drawn) < 550 and set(drawn) < set(whole["sorted clip.score"])
    agree = node.mask(data, state) == Score({"clip": 1.0}, fraction=0.5).mask(data, whole)
    assert agree.mean() > 0.99  # the cut is by the same order, whatever the ranks are drawn from


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"clip": 1}, "either a fraction, a threshold or keep"),
        ({"clip": 1, "fraction": 0.1, "keep": 3}, "not fraction and keep"),
        ({"fraction": 0.1}, "no weights"),
        ({"clip": "much", "fraction": 0.1}, "clip must be a number, not 'much'"),
        ({"clip": 0, "fraction": 0.1}, "all weights are 0"),
        ({"clip": 1, "fraction": 1.5}, "fraction must be at most 1, not 1.5"),
        ({"clip": 1, "threshold": 0.3, "of": "survivors"}, "a threshold is the same for all"),
        ({"clip": 1, "fraction": 0.3, "of": "survivor"}, 'Did you mean "survivors"'),
        ({"clip": 1, "keep": 2.5}, "keep must be a whole number, not 2.5"),
        ({"clip": 1, "keep": 0}, "keep must be at least 1, not 0"),
    ],
)
def test_wrong_scores_are_refused(params, words):
    with pytest.raises(UsageError, match=words):
        parse({"score": params})


def test_random_fractions_are_nested():
    data = table(3000)
    small, large = kept(RandomFraction(0.2), data), kept(RandomFraction(0.5), data)
    assert not (small & ~large).any() and abs(large.mean() - 0.5) < 5 * 0.5 / 3000**0.5

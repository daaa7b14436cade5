"""Filters against their definitions written plainly, one sample at a time."""

import math

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, embeddings, sphere
from winnow.curation.filters import FILTERS
from winnow.curation.filters.basic import Basic
from winnow.curation.filters.clip_score import ClipScore
from winnow.curation.filters.image_cluster import ImageCluster
from winnow.curation.measures.base import Samples
from winnow.curation.measures.caption import Caption
from winnow.curation.measures.language import Language
from winnow.curation.search.centroids import assign
from winnow.curation.search.kmeans import train_centroids
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError, build


def datacomp_threshold(scores, fraction):
    """DataComp's rule: of all scores in descending order, the one at int(n * fraction)."""
    ordered = sorted(scores, reverse=True)
    rank = int(len(scores) * fraction)
    return ordered[rank] if rank < len(ordered) else -math.inf


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.999, 1.0])
def test_fraction_is_datacomps_quantile(fraction):
    scores = np.round(np.random.default_rng(0).normal(size=997), 2)  # with ties
    threshold = datacomp_threshold(scores.tolist(), fraction)
    table = pa.table({"clip.score": scores.astype(np.float64)})
    node = ClipScore(fraction=fraction)
    kept = node.mask(table, node.fit(Columns(table.slice(0, 400), table.slice(400))))
    assert kept.tolist() == [score >= threshold for score in scores.tolist()]
    if fraction == 1.0:
        assert kept.all()


def test_missing_scores_never_pass_and_count_in_the_pool():
    table = pa.table({"clip.score": pa.array([0.5, None, float("nan"), 0.1, 0.9, None])})
    node = ClipScore(fraction=0.5)  # rank 3 of (0.9, 0.5, 0.1, missing, …) is a missing score, so every score passes
    assert node.mask(table, node.fit(Columns(table))).tolist() == [True, False, False, True, True, False]
    node = ClipScore(fraction=0.34)  # rank 2: 0.1
    assert node.mask(table, node.fit(Columns(table))).tolist() == [True, False, False, True, True, False]
    node = ClipScore(fraction=0.2)  # rank 1: 0.5
    assert node.mask(table, node.fit(Columns(table))).tolist() == [True, False, False, False, True, False]
    assert ClipScore(threshold=-9).mask(table, {"threshold": np.array(-9.0)}).sum() == 3


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"fraction": 0.3, "threshold": 0.2},
        {"fraction": 0},
        {"fraction": 1.5},
        {"fraction": 0.1, "model": "clip.b16"},
    ],
)
def test_clip_score_refuses(params):
    with pytest.raises(ParameterError):
        build(ClipScore, params, "clip_score")


def test_clip_score_reads_datacomps_columns():
    assert ClipScore(fraction=0.3, model="l14").columns() == ("clip_l14_similarity_score",)
    assert ClipScore(fraction=0.3, model="b32").columns() == ("clip_b32_similarity_score",)


TEXTS = [
    "a dog on the beach",
    "two  words",
    " one two three ",
    "",
    "   ",
    "a\tb\nc d",
    "non\u00a0breaking space here",
    "seven\x1cthings\x1dsplit\x1eby\x1fseparators",
    "日本 語 の 文",
    "a b c",
    "emoji 🐟 counts once",
    "\u2003em\u2003space\u2003",
    "zero\u200bwidth is no space",
]


def test_caption_counts_are_pythons():
    table = Caption().compute(Samples(pa.table({"text": pa.array(TEXTS)}), []))
    assert table["words"].to_pylist() == [len(text.split()) for text in TEXTS]
    assert table["characters"].to_pylist() == [len(text) for text in TEXTS]


def test_languages_of_plain_sentences():
    texts = {
        "The children are playing football in the garden behind the house.": "en",
        "Die Kinder spielen hinter dem Haus im Garten Fußball.": "de",
        "Les enfants jouent au football dans le jardin\nderrière la maison.": "fr",
        "Дети играют в футбол в саду за домом.": "ru",
        "子供たちは家の裏の庭でサッカーをしています。": "ja",
    }
    table = Language().compute(Samples(pa.table({"text": pa.array([*texts, None])}), []))
    assert table["code"].to_pylist() == [*texts.values(), None]
    assert all(0.3 < p <= 1.01 for p in table["probability"].to_pylist()[:-1])


def test_basic_is_datacomps():
    rng = np.random.default_rng(1)
    n = 500
    rows = {
        "caption.words": rng.integers(0, 6, n),
        "caption.characters": rng.integers(0, 12, n),
        "original_width": rng.choice([100, 199, 200, 300, 600, 601, 900], n),
        "original_height": rng.choice([100, 199, 200, 300, 600, 601, 900], n),
        "language.code": rng.choice(["en", "de", "zh"], n),
    }
    table = pa.table(rows)
    expected = [
        row["language.code"] == "en"
        and row["caption.words"] > 2
        and row["caption.characters"] > 5
        and min(row["original_width"], row["original_height"]) >= 200
        and max(row["original_width"], row["original_height"]) / min(row["original_width"], row["original_height"]) <= 3
        for row in table.to_pylist()
    ]
    assert 0 < sum(expected) < n
    assert Basic().mask(table, {}).tolist() == expected
    assert "language.code" not in Basic(language=None).columns()


def test_basic_keeps_nothing_of_unknown_size_or_language():
    table = pa.table(
        {
            "caption.words": [9, 9, 9],
            "caption.characters": [50, 50, 50],
            "original_width": pa.array([None, 0, 300], pa.int32()),
            "original_height": pa.array([300, 0, 300], pa.int32()),
            "language.code": pa.array(["en", "en", None]),
        }
    )
    assert Basic().mask(table, {}).tolist() == [False, False, False]


def test_image_cluster_keeps_the_clusters_of_the_targets():
    rng = np.random.default_rng(2)
    centers = np.eye(8)[:5]
    label = rng.integers(0, 5, 400)
    pool = centers[label] + 0.05 * rng.normal(size=(400, 8))
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    wanted = centers[[1, 1, 3]] + 0.05 * rng.normal(size=(3, 8))
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    table = pa.table({"clip.image": embeddings(pool)})
    target = Columns(pa.table({"clip.image": embeddings(wanted)}))
    node = ImageCluster(target="t", clusters=5)
    state = node.fit(Columns(table.slice(0, 150), table.slice(150), targets={"t": target}))
    assert node.mask(table, state).tolist() == [int(i) in (1, 3) for i in label]
    # the definition, by brute force on the centroids found
    centroids = state["centroids"]
    hit = {int(np.argmax(centroids @ v)) for v in wanted.astype(np.float16).astype(np.float32)}
    near = np.argmax(pool.astype(np.float16).astype(np.float32) @ centroids.T, axis=1)
    assert node.mask(table, state).tolist() == [int(i) in hit for i in near]
    two = ImageCluster(target="t", clusters=5, min_hits=2)
    assert two.mask(table, state).tolist() == [int(i) == 1 for i in label]


def test_image_cluster_drops_samples_without_embedding_and_refuses_too_many_clusters():
    rng = np.random.default_rng(3)
    vectors = sphere(rng, 6, 4)
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.astype(np.float16).ravel()), 4, mask=pa.array([False, True] * 3)
    )
    table = pa.table({"clip.image": column})
    view = Columns(table, targets={"t": Columns(pa.table({"clip.image": embeddings(vectors)}))})
    node = ImageCluster(target=("t",), clusters=3)
    assert node.mask(table, node.fit(view)).tolist() == [True, False] * 3
    with pytest.raises(WinnowError, match="3 samples cannot make 4 clusters"):
        ImageCluster(target="t", clusters=4).fit(view)
    empty = Columns(table, targets={"t": Columns(table.slice(0, 0))})
    with pytest.raises(WinnowError, match="no usable image"):
        node.fit(empty)


def test_kmeans_is_the_same_twice_and_beats_random_centroids():
    rng = np.random.default_rng(4)
    vectors = sphere(rng, 600, 6).astype(np.float32)
    first, second = train_centroids(vectors, 12, seed=1), train_centroids(vectors, 12, seed=1)
    assert np.array_equal(first, second)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    fit = (vectors @ first.T).max(axis=1).mean()
    chance = (vectors @ sphere(rng, 12, 6).T.astype(np.float32)).max(axis=1).mean()
    assert fit > chance
    assert np.array_equal(assign(vectors, first, batch=37), np.argmax(vectors @ first.T, axis=1))


@pytest.mark.parametrize("name", FILTERS.names())
def test_registered_filters_hold_the_contract(name):
    kind = FILTERS.load(name)
    assert kind.name == name and kind.paper and kind.__doc__
    example = dict(kind.example) or {"image_cluster": {"target": "t"}}.get(name, {})
    node = kind(**example)
    assert set(node.numeric()) <= set(node.columns())
    assert hash(node) == hash(kind(**example))

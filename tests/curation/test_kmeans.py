"""k-means and the search among its centroids, against brute force."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curation.tables import Columns, embeddings
from tests.curation.tables import sphere as unit_vectors
from winnow.curation.filters.image_cluster import ImageCluster
from winnow.curation.search.centroids import NearestCentroid, assign, fitted_state, nearest_centroid_of
from winnow.curation.search.kmeans import sample_size, sample_vectors, train_centroids
from winnow.infra.errors import WinnowError
from winnow.infra.params import ParameterError, build


def sphere(rng, n, d):
    return unit_vectors(rng, n, d).astype(np.float32)


def numbered(n):
    """Row i at the angle i pi / n of the unit circle."""
    angles = np.arange(n) * np.pi / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rows_of(vectors, n):
    """The inverse of `numbered`."""
    x, y = np.asarray(vectors, np.float64).T
    return np.round(np.arctan2(y, x) * n / np.pi).astype(int)


def test_the_sample_is_uniform_without_replacement_and_of_the_stated_size():
    table = pa.table({"x": embeddings(numbered(600))})
    counts = np.zeros(600)
    for seed in range(200):
        view = Columns(table.slice(0, 250), table.slice(250, 1), table.slice(251))
        rows = rows_of(sample_vectors(view, "x", 4, 60, seed), 600)
        assert len(rows) == 60 and np.all(np.diff(rows) > 0)
        counts[rows] += 1
    # binomial(200, 0.1): standard deviation 4.2; 600 of them stay within five
    assert counts.sum() == 200 * 60 and np.abs(counts - 20).max() < 5 * 4.3
    assert np.array_equal(
        sample_vectors(Columns(table), "x", 4, 600, 0), table["x"].chunk(0).flatten().to_numpy().reshape(-1, 2)
    )


def test_the_sample_has_only_finite_embeddings():
    vectors = numbered(10)
    vectors[3, 1] = np.inf
    table = pa.table({"x": embeddings(vectors, pa.array([i == 5 for i in range(10)]))})
    assert rows_of(sample_vectors(Columns(table), "x", 2, None, 0), 10).tolist() == [0, 1, 2, 4, 6, 7, 8, 9]


def test_the_sample_is_bounded_in_bytes():
    assert sample_size(10, 768, None) == 2560
    assert sample_size(100_000, 768, None) * 768 * 4 <= 8 << 30
    assert sample_size(10_000_000, 768, None) == 10_000_000  # a vector a centroid at least
    assert sample_size(10, 768, 50) == 50


def test_a_coarse_search_reports_its_recall():
    rng = np.random.default_rng(0)
    centroids = sphere(rng, 3000, 24)
    vectors = sphere(rng, 1000, 24)
    truth = np.argmax(vectors @ centroids.T, axis=1)
    assert np.array_equal(NearestCentroid(centroids, "exact")(vectors), truth)
    coarse = NearestCentroid(centroids, "coarse")
    coarse.tune(vectors)
    found = coarse(vectors, batch=77)
    assert coarse.recall == pytest.approx(np.mean(found == truth)) and 0.99 <= coarse.recall <= 1
    # what is stored searches the same way
    again = nearest_centroid_of(fitted_state(coarse, np.ones(3000, bool)))
    assert again is not coarse and again.probes == coarse.probes
    assert np.array_equal(again(vectors), found)
    one = NearestCentroid(centroids, "coarse", probes=1)
    assert np.mean(one(vectors) == truth) < 0.9  # so the recall above is not for nothing
    assert np.array_equal(assign(vectors, centroids), truth)


def test_auto_is_exact_up_to_the_documented_size(monkeypatch):
    monkeypatch.setattr("winnow.curation.search.centroids.EXACT", 50)
    monkeypatch.setattr("winnow.curation.search.centroids.has_gpu", lambda: False)
    rng = np.random.default_rng(1)
    assert NearestCentroid(sphere(rng, 50, 4)).exact and not NearestCentroid(sphere(rng, 51, 4)).exact


def test_coarse_training_is_nearly_as_good_as_exact():
    rng = np.random.default_rng(2)
    vectors = sphere(rng, 3000, 8)
    fits = {}
    for search in ("exact", "coarse"):
        centroids = train_centroids(vectors, 60, search=search)
        assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
        assert np.array_equal(centroids, train_centroids(vectors, 60, search=search))
        fits[search] = (vectors @ centroids.T).max(axis=1).mean()
    chance = (vectors @ sphere(rng, 60, 8).T).max(axis=1).mean()
    assert fits["coarse"] - chance > 0.95 * (fits["exact"] - chance) > 0


def test_image_cluster_refuses_before_fitting():
    rng = np.random.default_rng(3)
    table = pa.table({"clip.image": embeddings(sphere(rng, 6, 4))})
    view = Columns(table, targets={"t": Columns(table), "empty": Columns(table.slice(0, 0))})
    ImageCluster(target="t", clusters=6).check(view)
    with pytest.raises(WinnowError, match=r"6 samples cannot make 7 clusters.*at most 6"):
        ImageCluster(target="t", clusters=7).check(view)
    with pytest.raises(WinnowError, match="target set is empty"):
        ImageCluster(target="empty", clusters=2).check(view)
    with pytest.raises(ParameterError, match=r"'coars'.*Did you mean \"coarse\""):
        build(ImageCluster, {"target": "t", "search": "coars"}, "image_cluster")
    with pytest.raises(ParameterError, match="sample of 5 cannot make 6"):
        build(ImageCluster, {"target": "t", "clusters": 6, "sample": 5}, "image_cluster")


def test_image_cluster_reports_its_recall():
    rng = np.random.default_rng(4)
    table = pa.table({"l14_img": embeddings(sphere(rng, 500, 6))})
    target = pa.table({"l14_img": embeddings(sphere(rng, 20, 6))})
    view = Columns(table, targets={"t": Columns(target)})
    for search in ("exact", "coarse"):
        node = ImageCluster(target="t", clusters=40, column="l14_img", search=search)
        state = node.fit(view)
        vectors = table["l14_img"].chunk(0).flatten().to_numpy().reshape(-1, 6).astype(np.float32)
        wanted = target["l14_img"].chunk(0).flatten().to_numpy().reshape(-1, 6).astype(np.float32)
        hit = set(np.argmax(wanted @ state["centroids"].T, axis=1).tolist())
        truth = [int(i) in hit for i in np.argmax(vectors @ state["centroids"].T, axis=1)]
        facts = node.report(state)
        assert np.mean(node.mask(table, state) == truth) >= facts["recall of the search"] - 0.05
        assert facts["clusters"] == 40 and abs(facts["clusters with a target"] - len(hit)) <= 1

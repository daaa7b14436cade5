"""Metrics against scikit-learn, brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn import metrics as sk

from winnow.evaluate import metrics

RNG = np.random.default_rng(7)


def brute_rank(scores: np.ndarray, right: int) -> int:
    """Where `right` comes when sorted by falling score, then by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i)).index(right)


@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
def test_ranks_and_accuracy(levels: int) -> None:
    scores = RNG.integers(levels, size=(200, 12)).astype(np.float32)
    labels = RNG.integers(12, size=200)
    ranks = metrics.label_ranks(scores, labels)
    assert ranks.tolist() == [brute_rank(row, label) for row, label in zip(scores, labels, strict=True)]
    assert np.array_equal(metrics.predictions(scores) == labels, ranks == 0)
    assert metrics.accuracy(ranks, 5) == np.mean([r < 5 for r in ranks])


def test_what_cannot_be_compared_is_never_right() -> None:
    scores = np.array([[math.nan, 1.0], [0.0, math.nan], [math.nan, math.nan], [2.0, 1.0]])
    assert metrics.label_ranks(scores, np.array([0, 0, 0, 0])).tolist() == [1, 1, 1, 0]


def test_against_scikit_learn() -> None:
    scores = RNG.normal(size=(500, 9))
    labels = RNG.choice([0, 1, 2, 4, 5, 7], size=500)  # classes 3, 6 and 8 are absent
    predicted = metrics.predictions(scores)
    ranks = metrics.label_ranks(scores, labels)
    assert metrics.accuracy(ranks, 1) == pytest.approx(sk.accuracy_score(labels, predicted))
    assert metrics.accuracy(ranks, 5) == pytest.approx(sk.top_k_accuracy_score(labels, scores, k=5, labels=range(9)))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = sk.balanced_accuracy_score(labels, predicted)
    assert metrics.mean_per_class_recall(labels, predicted) == pytest.approx(balanced)
    f1 = sk.f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert metrics.macro_f1(labels, predicted) == pytest.approx(f1)
    selected, truth = RNG.random(12) < 0.5, RNG.random(12) < 0.5
    assert metrics.jaccard(selected, truth) == pytest.approx(sk.jaccard_score(truth, selected))


def test_worst_group() -> None:
    correct = np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    assert metrics.worst_group_accuracy(correct, np.array([0, 0, 2, 2, 5, 5])) == 0.0
    assert metrics.worst_group_accuracy(correct, np.array([0, 0, 2, 2, 0, 2])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize("decimals", [0, 6])  # rounded embeddings: many ties
def test_retrieval_against_brute_force(block: int, decimals: int) -> None:
    counts = [1, 5, 2, 3, 1, 4, 2]
    owner = np.repeat(np.arange(len(counts)), counts)
    images = RNG.normal(size=(len(counts), 4)).round(decimals)
    captions = RNG.normal(size=(len(owner), 4)).round(decimals)
    text, image = metrics.retrieval_ranks(images, captions, owner, block=block)
    scores = images @ captions.T
    for k in (1, 2, 5):
        for i, row in enumerate(scores):
            first = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
            assert (text[i] < k) == any(owner[j] == i for j in first)
        for j, column in enumerate(scores.T):
            first = sorted(range(len(column)), key=lambda i: (-column[i], i))[:k]
            assert (image[j] < k) == (owner[j] in first)


def test_bootstrap_agrees_with_closed_forms() -> None:
    # With classes of equal size, mean per-class recall is nearly a mean of independent shares.
    labels = np.repeat(np.arange(4), 2000)
    predicted = np.where(RNG.random(8000) < np.array([0.2, 0.5, 0.7, 0.9])[labels], labels, 4)
    recalls = np.array([np.mean(predicted[labels == c] == c) for c in range(4)])
    closed = math.sqrt(np.sum(recalls * (1 - recalls) / 2000)) / 4
    assert metrics.mean_per_class_recall_stderr(labels, predicted) == pytest.approx(closed, rel=0.1)
    # With one caption an image, recall is a plain share.
    hits = RNG.random(3000) < 0.3
    text, image, _ = metrics.recall_stderr(hits, hits, np.arange(3000))
    assert text == pytest.approx(metrics.binomial_stderr(hits.mean(), 3000), rel=0.1)
    assert image == text
    # Five captions that always agree are worth one.
    _, image, _ = metrics.recall_stderr(hits, np.repeat(hits, 5), np.repeat(np.arange(3000), 5))
    assert image == text


def test_macro_f1_bootstrap_against_plain_resampling() -> None:
    labels = RNG.integers(3, size=300)
    predicted = np.where(RNG.random(300) < 0.6, labels, RNG.integers(3, size=300))
    draws = [RNG.integers(300, size=300) for _ in range(1000)]
    plain = np.std([sk.f1_score(labels[d], predicted[d], average="macro") for d in draws], ddof=1)
    assert metrics.macro_f1_stderr(labels, predicted) == pytest.approx(plain, rel=0.12)
    assert metrics.macro_f1_stderr(labels, predicted) == metrics.macro_f1_stderr(labels, predicted)


def test_groups_by_hand() -> None:
    correct = np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    assert metrics.group_accuracies(correct, np.array([0, 0, 2, 2, 2, 5])) == {
        0: (0.5, 2),
        2: (pytest.approx(2 / 3), 3),
        5: (0.0, 1),
    }


def test_first_takes_the_lower_index_of_equals() -> None:
    assert metrics.first(np.array([1.0, 3.0, 3.0, 0.0, 3.0]), 2).tolist() == [False, True, True, False, False]
    scores = RNG.normal(size=12)
    assert set(np.flatnonzero(metrics.first(scores, 4))) == set(np.argsort(scores)[-4:])


def test_average_precision_against_scikit_learn() -> None:
    scores, targets = RNG.normal(size=(300, 7)), RNG.random((300, 7)) < 0.2
    expected = sk.average_precision_score(targets, scores, average="macro")
    assert metrics.average_precision(scores, targets) == pytest.approx(expected)
    targets[:, 3] = False  # a class that no image has counts as 0, as in CLIP_benchmark
    expected = sum(sk.average_precision_score(targets[:, c], scores[:, c]) for c in range(7) if c != 3) / 7
    assert metrics.average_precision(scores, targets) == pytest.approx(expected)


def test_bootstraps_against_plain_resampling() -> None:
    n = 240
    groups = RNG.choice([0, 1, 4], p=[0.5, 0.3, 0.2], size=n)
    correct = RNG.random(n) < np.array([0.5, 0.4, 0, 0, 0.45])[groups]
    scores = RNG.normal(size=(n, 4))
    targets = scores + RNG.normal(size=(n, 4)) > 1
    values = RNG.choice([0.0, 0.25, 0.5, 1.0], size=n)
    draws = [RNG.integers(n, size=n) for _ in range(600)]
    worst = [min(correct[d][groups[d] == g].mean() for g in set(groups[d])) for d in draws]
    assert metrics.worst_group_stderr(correct, groups) == pytest.approx(np.std(worst, ddof=1), rel=0.12)
    precision = [sk.average_precision_score(targets[d], scores[d], average="macro") for d in draws]
    assert metrics.average_precision_stderr(scores, targets) == pytest.approx(np.std(precision, ddof=1), rel=0.12)
    assert metrics.mean_stderr(values) == pytest.approx(values.std() / math.sqrt(n), rel=0.1)
    assert metrics.mean_stderr(values) == metrics.mean_stderr(values)
    # With one group the worst is the accuracy.
    fraction = correct.mean()
    closed = metrics.binomial_stderr(fraction, n)
    assert metrics.worst_group_stderr(correct, np.zeros(n, int)) == pytest.approx(closed, rel=0.1)


def test_frechet_distance_is_heusel_et_als() -> None:
    """Against the formula with scipy's matrix root, torchmetrics', and closed forms."""
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(200, 6)) + 1
    (mu1, cov1), (mu2, cov2) = metrics.moments(a), metrics.moments(b)
    np.testing.assert_allclose(cov1, (a - mu1).T @ (a - mu1) / 299)
    plain = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    found = metrics.frechet_distance(mu1, cov1, mu2, cov2)
    assert found == pytest.approx(plain, rel=1e-9)
    assert found == pytest.approx(float(_compute_fid(*map(torch.from_numpy, (mu1, cov1, mu2, cov2)))), rel=1e-6)
    assert found == pytest.approx(metrics.frechet_distance(mu2, cov2, mu1, cov1))
    assert metrics.frechet_distance(mu1, cov1, mu1, cov1) == pytest.approx(0, abs=1e-6)
    # Diagonal covariances commute: Σ (σ₁ − σ₂)².
    found = metrics.frechet_distance(np.zeros(2), np.diag([4.0, 9.0]), np.ones(2), np.diag([1.0, 0.0]))
    assert found == pytest.approx(2 + 1 + 9)

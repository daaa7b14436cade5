"""Probes and neighbours on features: against scikit-learn, brute force and the formulas written plainly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from tests.drawing import COLORS
from tests.evaluate.sets import classification_samples, image_of, open_found, write_classification, write_config
from winnow.evaluate.protocols import PROTOCOLS, linear, logistic, sgd
from winnow.evaluate.protocols import fine_tune as finetune
from winnow.evaluate.protocols.base import IMAGES, EvalSet, Features, Split, load_protocol
from winnow.evaluate.protocols.few_labels import few_labels
from winnow.evaluate.protocols.knn import votes
from winnow.evaluate.sets.layout import find_tasks
from winnow.evaluate.sets.shards import Wanted, read_part, split_into_parts
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.io.images import decode_image
from winnow.infra.pool.sample import Sample
from winnow.pretrain.encoder import load_encoder

TRAINED = [name for name in PROTOCOLS.names() if "train" in load_protocol(name).needs]


def clusters(n: int, dim: int, classes: int, seed: int = 0, noise: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around class means, which share a large mean as embeddings do; and labels."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).normal(size=(classes, dim)) + 3
    labels = rng.integers(classes, size=n)
    x = means[labels] + noise * rng.normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 0.1, 1.0, 1e4])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    x, y = clusters(150, 6, 4)
    w, b = logistic.fit(logistic.to_torch(x, "cpu"), torch.as_tensor(y), 4, l2, tolerance=1e-9)
    reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=50_000).fit(x.astype(float), y)
    # The softmax is the same when every class's weights are shifted alike.
    np.testing.assert_allclose(w - w.mean(dim=0), reference.coef_ - reference.coef_.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(b - b.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3)
    # At the tolerance that is used the scores are those, too.
    ours = logistic.logits_of(
        logistic.fit(logistic.to_torch(x, "cpu"), torch.as_tensor(y), 4, l2), logistic.to_torch(x, "cpu")
    )
    assert (ours.argmax(axis=1) == reference.predict(x)).mean() > 0.99


@pytest.mark.parametrize("rank", [3, 20])
def test_more_dimensions_than_samples(rank: int) -> None:
    """Features that fill a part of their space only, as few samples do: scikit-learn's weights in all of it."""
    x, y = clusters(12, 20, 3)
    x[:, rank:] = x[:, :1]
    w, b = logistic.fit(logistic.to_torch(x, "cpu"), torch.as_tensor(y), 3, 0.1, tolerance=1e-9)
    reference = LogisticRegression(C=10, tol=1e-10, max_iter=50_000).fit(x.astype(float), y)
    np.testing.assert_allclose(w, reference.coef_ - reference.coef_.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(b - b.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3)


def test_identical_features_give_the_frequency_of_each_class() -> None:
    x = torch.full((4, 3), 0.5, dtype=torch.float64)
    w, b = logistic.fit(x, torch.tensor([0, 0, 0, 1]), 2, 1.0, tolerance=1e-9)
    assert not w.any()
    np.testing.assert_allclose(torch.softmax(b, dim=0), [0.75, 0.25], atol=1e-6)


def test_two_classes_are_the_binomial_regression() -> None:
    """l2/2 (|w0|² + |w1|²) with w1 = -w0 = v/2 is l2/4 |v|², and scikit-learn's penalty |v|²/(2C)."""
    x, y = clusters(80, 5, 2)
    w, b = logistic.fit(logistic.to_torch(x, "cpu"), torch.as_tensor(y), 2, 0.5, tolerance=1e-9)
    reference = LogisticRegression(C=2 / 0.5, tol=1e-10, max_iter=50_000).fit(x.astype(float), y)
    np.testing.assert_allclose(w[1] - w[0], reference.coef_[0], atol=1e-3)
    np.testing.assert_allclose(b[1] - b[0], reference.intercept_[0], atol=1e-3)


def test_where_a_fit_starts_does_not_matter_and_an_absent_class_is_never_predicted() -> None:
    x, y = clusters(100, 5, 3)
    xs, ys = logistic.to_torch(x, "cpu"), torch.as_tensor(y)
    start = (torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    plain, warm = logistic.fit(xs, ys, 5, 0.1, tolerance=1e-9), logistic.fit(xs, ys, 5, 0.1, start, tolerance=1e-9)
    np.testing.assert_allclose(plain[0], warm[0], atol=1e-3)
    assert logistic.logits_of(plain, xs).argmax(axis=1).max() == 2


@pytest.mark.parametrize("peak", [-6.0, -5.875, -3.2, 0.0, 0.125, 2.6, 5.9, 6.0])
def test_sweep_finds_the_peak_of_the_96_values(peak: float) -> None:
    looked = []

    def score(l2: float) -> float:
        looked.append(l2)
        return -abs(np.log10(l2) - peak)

    grid = np.arange(-6, 6 + 1e-9, 1 / 8)
    best = np.log10(linear.sweep(score))
    assert abs(best - peak) == pytest.approx(np.abs(grid - peak).min())
    assert len(looked) == len(set(looked)) <= 15


def test_split_labels_takes_a_fifth_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, 5], [50, 10, 2, 1])
    local, held = linear.split_labels(labels)
    assert sorted([*local, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=6).tolist() == [10, 2, 1, 0, 0, 0]
    assert (linear.split_labels(labels)[1] == held).all()


def test_probe_is_the_best_of_scikit_learns_on_validation() -> None:
    x, y = clusters(240, 6, 3, seed=1, noise=6)
    vx, vy = clusters(80, 6, 3, seed=2, noise=6)
    tx, _ = clusters(50, 6, 3, seed=3, noise=6)
    exponents = []

    def accuracy(exponent: float) -> float:
        model = LogisticRegression(C=10.0**-exponent, tol=1e-10, max_iter=50_000).fit(x.astype(float), y)
        return float((model.predict(vx) == vy).mean())

    # The search of the paper, written out: seven, then both sides of the best by 1, 1/2, 1/4, 1/8.
    exponents = {e: accuracy(e) for e in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
    for step in (1, 1 / 2, 1 / 4, 1 / 8):
        best = max(exponents, key=lambda e: (exponents[e], e))
        exponents |= {e: accuracy(e) for e in (best - step, best + step) if -6 <= e <= 6}
    best = max(exponents, key=lambda e: (exponents[e], e))
    both = np.concatenate([x, vx]).astype(float)
    final = LogisticRegression(C=10.0**-best, tol=1e-10, max_iter=50_000).fit(both, np.concatenate([y, vy]))
    scores = linear.probe(Split(x, y, lambda _: []), Split(vx, vy, lambda _: []), tx, 3, "cpu")
    expected = final.decision_function(tx)
    np.testing.assert_allclose(
        scores - scores.mean(axis=1)[:, None], expected - expected.mean(axis=1)[:, None], atol=0.02
    )


def test_a_validation_split_of_one_class_chooses_nothing() -> None:
    """Any strength is as good on it; the classes are separated all the same."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 30)
    images = np.float32(np.eye(4)[labels] + rng.normal(scale=0.3, size=(120, 4)))
    train, val = (Split(images[batch], labels[batch], list) for batch in (slice(0, None, 2), slice(1, 9, 2)))
    assert len(np.unique(val.labels)) == 1
    right = linear.probe(train, val, images, 4, "cpu").argmax(axis=1) == labels
    assert right.mean() > 0.9


def test_votes_by_brute_force() -> None:
    train, labels = clusters(60, 4, 5, seed=1)
    test, _ = clusters(20, 4, 5, seed=2)
    for k in (3, 60, 200):
        got = votes(test, train, labels, 5, k=k, temperature=0.07)
        for row, image in enumerate(test):
            cosines = [float(image @ other) for other in train]
            near = sorted(range(60), key=lambda i: -cosines[i])[:k]
            plain = [sum(np.exp(cosines[i] / 0.07) for i in near if labels[i] == c) for c in range(5)]
            np.testing.assert_allclose(got[row], plain, rtol=1e-4)


def test_few_labels_are_balanced() -> None:
    labels = np.repeat([0, 1, 2], [500, 400, 3])
    batch = few_labels(labels, 0.1, seed=0)
    assert np.bincount(labels[batch]).tolist() == [30, 30, 3]  # 903 · 0.1 / 3
    assert len(few_labels(labels, 0.001, seed=0)) == 3
    assert (few_labels(labels, 0.1, 0) == batch).all() and (few_labels(labels, 0.1, 1) != batch).any()


def test_sgd_is_the_update_rule(monkeypatch) -> None:
    """v = 0.9 v + g; w = w - rate v; the rate a tenth after 60 % and again after 80 % of the steps."""
    monkeypatch.setattr(sgd, "MIN_STEPS", 10)
    monkeypatch.setattr(sgd, "EPOCHS", 1)
    monkeypatch.setattr(sgd, "BATCH", 16)
    x, y = clusters(40, 3, 3)
    w, b = sgd.fit_sgd(logistic.to_torch(x, "cpu"), torch.as_tensor(y), 3, seed=4, rate=2.0)
    rng, order = np.random.default_rng(4), []
    theta, v = np.zeros((4, 3)), np.zeros((4, 3))
    full = np.concatenate([x.astype(float), np.ones((40, 1))], axis=1)
    for step in range(10):
        if not order:
            order = np.array_split(rng.permutation(40), 3)
        rows = order.pop()
        p = np.exp(full[rows] @ theta)
        p /= p.sum(axis=1, keepdims=True)
        v = 0.9 * v + full[rows].T @ (p - np.eye(3)[y[rows]]) / len(rows)
        theta = theta - 2.0 * 0.1 ** ((step >= 6) + (step >= 8)) * v
    np.testing.assert_allclose(np.concatenate([w.T, b[None]]), theta, atol=1e-9)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> EvalSet:
    folder = tmp_path_factory.mktemp("data")
    write_classification(folder, n=12)
    return open_found(find_tasks(str(folder))[0])


def split_of(n: int, first: int) -> Split:
    """Images of colours, with a clear embedding of the colour."""
    samples = classification_samples(n, first=first)
    labels = np.array([int(s["members"]["cls"]) for s in samples])
    images = np.eye(6)[labels] + 0.1 * np.random.default_rng(first).normal(size=(n, 6))
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
    return Split(images, labels, lambda indices: [Sample(members=samples[i]["members"]) for i in indices])


@pytest.mark.parametrize("name", TRAINED)
def test_every_protocol_separates_colours(name: str, spec: str, colors: EvalSet) -> None:
    train, test = split_of(120, 0), split_of(30, 5000)
    features = Features(
        images=test.images,
        labels=test.labels,
        encode_texts=lambda _: pytest.fail("no text is embedded"),
        splits={"train": train, "test": test},
        encoder=lambda: load_encoder(spec, device="cpu"),
        seed=1,
    )
    kind = load_protocol(name).run
    rows = {row.metric: row for row in kind(features, colors)}
    assert rows["acc1"].n == 30 and set(rows) == {"acc1", "acc5", "mean_per_class_recall"}
    assert rows["acc1"].value > (0.6 if name.startswith("finetune") else 0.95), name
    blind = Split(train.images, np.zeros_like(train.labels), train.samples)
    with pytest.raises(TaskError, match="train: holds fewer than two classes"):
        kind(Features(test.images, test.labels, lambda _: [], splits={"train": blind, "test": test}), colors)


def test_scores_are_scikit_learns(colors: EvalSet) -> None:
    """The rows of a protocol against scikit-learn's metrics on the same scores."""
    train, labels = clusters(90, 6, len(COLORS), seed=5, noise=4)
    test, truth = clusters(50, 6, len(COLORS), seed=6, noise=4)
    splits = {"train": Split(train, labels, lambda _: [])}
    kind = load_protocol("knn").run
    rows = {r.metric: r.value for r in kind(Features(test, truth, lambda _: [], splits=splits), colors)}
    scores = votes(test, train, labels, len(COLORS))
    for k in (1, 5):
        assert rows[f"acc{k}"] == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=range(len(COLORS))))
    assert rows["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(axis=1)))


def test_fine_tuning_leaves_the_encoder_as_it_was(spec: str) -> None:
    encoder = load_encoder(spec, device="cpu")
    train, test = split_of(24, 0), split_of(6, 5000)
    image_bytes = torch.stack([encoder.preprocess(image) for image in decoded(test)])
    before = encoder.encode_images(image_bytes)
    tower = encoder.image_tower()
    raw = tower(image_bytes).detach()
    np.testing.assert_allclose(raw / raw.norm(dim=1, keepdim=True), before, atol=1e-6)
    model = finetune.tune(tower, encoder.dim, 6, train, np.arange(24), encoder.preprocess, epochs=1, seed=0)
    assert (tower(image_bytes) - raw).abs().max() > 1e-4  # the whole encoder moved, not the classifier alone
    np.testing.assert_array_equal(encoder.encode_images(image_bytes), before)
    assert finetune.scores_of(model, test, encoder.preprocess).shape == (6, 6)


def decoded(split: Split) -> list:
    return [sample.image() for sample in split.samples(range(len(split.labels)))]


def test_a_probe_on_raw_pixels_of_real_digits(real_data: Path) -> None:
    """The probe on MNIST's pixels is as good as the best that scikit-learn finds for the test digits themselves."""

    def read(split: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        raws = [
            raw
            for part in split_into_parts(str(real_data / "eval" / "wds_mnist_test"), split)
            for raw in read_part(part, Wanted(IMAGES, ("cls",)))
        ]
        images = [decode_image(image_of(raw)).convert("L").resize((10, 10)) for raw in raws[:limit]]
        labels = np.array([int(raw.members["cls"]) for raw in raws[:limit]])
        return np.stack([np.asarray(image) / 255 for image in images]).reshape(-1, 100).astype(np.float32), labels

    (x, y), (tx, ty) = read("train", 600), read("test", 400)
    scores = linear.probe(Split(x, y, lambda _: []), None, tx, 10, "cpu")
    best = max(LogisticRegression(C=c, max_iter=500).fit(x, y).score(tx, ty) for c in (0.03, 0.3))
    assert best > 0.7
    assert (scores.argmax(axis=1) == ty).mean() > best - 0.03

"""Metrics: pure functions of scores and labels.

Scores rank candidates from high to low; of equal scores the candidate with the lower index comes first. So a metric is
a function of its inputs alone and does not depend on a library's sorting routine. Where no scores are equal, the
metrics are those of CLIP_benchmark and scikit-learn.

Standard errors: `binomial_stderr` for a fraction of independent samples, otherwise the bootstrap over images with a
fixed seed (Efron & Tibshirani 1993, ch. 6).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many candidates rank before the right one.

    For `scores` float [n, candidates] and `labels` int [n], the index of the right candidate: int64 [n]; 0 when the
    right one is first. NaN ranks before it.
    """
    true_scores = scores[np.arange(len(labels)), labels][:, None]
    behind = np.arange(scores.shape[1])[None, :] > labels[:, None]
    ranks: np.ndarray = scores.shape[1] - 1 - ((scores < true_scores) | ((scores == true_scores) & behind)).sum(axis=1)
    return ranks


def accuracy(ranks: np.ndarray, k: int = 1) -> float:
    """Fraction of samples whose right candidate is among the first k. `ranks` as `label_ranks` gives them, int [n]."""
    return float(np.mean(ranks < k))


def predictions(scores: np.ndarray) -> np.ndarray:
    """The first candidate of each sample, int64 [n]; the lowest index among equal scores. `scores` [n, candidates]."""
    return scores.argmax(axis=1)


def mean_per_class_recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of the fraction of their samples predicted right. int [n] each."""
    total = np.bincount(labels)
    right = np.bincount(labels[labels == predicted], minlength=len(total))
    return float(np.mean(right[total > 0] / total[total > 0]))


def macro_f1(labels: np.ndarray, predicted: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Mean of F1 over the classes that occur in `labels` (as WILDS computes it for iWildCam). int [n] each; `counts`
    says how often each counts."""
    counts = np.ones(len(labels)) if counts is None else counts
    size, same = int(max(labels.max(), predicted.max())) + 1, labels == predicted
    total, said = np.bincount(labels, counts, size), np.bincount(predicted, counts, size)
    right, here = np.bincount(labels[same], counts[same], size), total > 0
    return float(np.mean(2 * right[here] / (total[here] + said[here])))


def worst_group_accuracy(correct: np.ndarray, groups: np.ndarray) -> float:
    """The lowest accuracy of any group that has samples. `correct` bool [n], `groups` int [n]."""
    return min(value for value, _ in group_accuracies(correct, groups).values())


def group_accuracies(correct: np.ndarray, groups: np.ndarray) -> dict[int, tuple[float, int]]:
    """Accuracy and number of samples of each group that has any. `correct` bool [n], `groups` int [n], at least 0."""
    total = np.bincount(groups)
    right = np.bincount(groups, weights=correct.astype(float))
    return {int(group): (float(right[group] / total[group]), int(total[group])) for group in np.flatnonzero(total)}


def first(scores: np.ndarray, k: int) -> np.ndarray:
    """Whether each candidate is among the first k: bool [candidates] for `scores` float [candidates]."""
    selected = np.zeros(len(scores), dtype=bool)
    selected[np.argsort(-scores, kind="stable")[:k]] = True
    return selected


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes of the average precision of each: the mean, over the images that have the class, of the
    fraction of such images down to that one, in descending order of score; 0 for a class that none has, as in
    CLIP_benchmark. `scores` float [n, classes], `targets` bool likewise."""
    return float(_precisions(np.ones((1, len(scores))), _sorted_targets(scores, targets))[0])


def _sorted_targets(scores: np.ndarray, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class the order of the images, and whether each has the class."""
    orders = np.argsort(-scores, axis=0, kind="stable").T
    return [(order, targets[order, number]) for number, order in enumerate(orders)]


def _precisions(counts: np.ndarray, classes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """`average_precision` [draws] with each image counted so many times, float [draws, n]."""
    total = np.zeros(len(counts))
    for order, truth in classes:
        weights = counts[:, order]
        hits = weights * truth
        precision = np.cumsum(hits, axis=1) / np.maximum(np.cumsum(weights, axis=1), 1)
        total += (hits * precision).sum(axis=1) / np.maximum(hits.sum(axis=1), 1)
    return total / len(classes)


def jaccard(selected: np.ndarray, truth: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets given as bool [n]; 1 when both are empty."""
    union = np.sum(selected | truth)
    return float(np.sum(selected & truth) / union) if union else 1.0


def retrieval_ranks(
    images: np.ndarray, captions: np.ndarray, owner: np.ndarray, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the right answers in both directions, by inner product, `block` queries at a time.

    `images` are float [n, dim], `captions` float [m, dim]; `owner`, int [m], ascending, is the image of each caption;
    each image has one. Returns (int64 [n]: captions of other images before the first caption of the image, int64 [m]:
    images before the image of the caption).
    """
    starts = np.searchsorted(owner, np.arange(len(images)))
    ends = np.searchsorted(owner, np.arange(len(images)), side="right")
    text_ranks = np.empty(len(images), dtype=np.int64)
    for low in range(0, len(images), block):
        scores = images[low : low + block] @ captions.T
        spans = zip(starts[low : low + block], ends[low : low + block], strict=True)
        best = [start + int(np.argmax(row[start:end])) for row, (start, end) in zip(scores, spans, strict=True)]
        text_ranks[low : low + block] = label_ranks(scores, np.array(best))
    image_ranks = np.empty(len(captions), dtype=np.int64)
    for low in range(0, len(captions), block):
        scores = captions[low : low + block] @ images.T
        image_ranks[low : low + block] = label_ranks(scores, owner[low : low + block])
    return text_ranks, image_ranks


def binomial_stderr(fraction: float, n: int) -> float:
    """sqrt(p (1 - p) / n)."""
    return float(np.sqrt(fraction * (1 - fraction) / n))


def bootstrap_stderr(
    statistic: Callable[[np.ndarray], np.ndarray], cells: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Bootstrap standard error of a statistic that depends on how many samples fall in each cell.

    Drawing n samples with replacement gives cell counts that are multinomial with the observed frequencies, so the
    counts are drawn directly. `statistic` takes counts [resamples, cells] to values [resamples], nan where undefined;
    `cells` are the observed counts, int [cells].
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(int(cells.sum()), cells / cells.sum(), size=resamples)
    return float(np.nanstd(statistic(counts), ddof=1))


def mean_per_class_recall_stderr(labels: np.ndarray, predicted: np.ndarray, seed: int = 0) -> float:
    """Bootstrap standard error of `mean_per_class_recall`."""
    return _accuracies_stderr(labels == predicted, labels, lambda recalls: np.nanmean(recalls, axis=1), seed)


def worst_group_stderr(correct: np.ndarray, groups: np.ndarray, seed: int = 0) -> float:
    """Bootstrap standard error of `worst_group_accuracy`; in a draw, too, only groups that have samples count."""
    return _accuracies_stderr(correct, groups, lambda accuracies: np.nanmin(accuracies, axis=1), seed)


def _accuracies_stderr(
    correct: np.ndarray, groups: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int
) -> float:
    """Of a statistic of the accuracies [resamples, groups], which are nan for a group that is not drawn."""
    numbers, index = np.unique(groups, return_inverse=True)
    size = len(numbers)
    right, total = np.bincount(index[correct], minlength=size), np.bincount(index, minlength=size)

    def of_counts(counts: np.ndarray) -> np.ndarray:
        hit, n = counts[:, :size], counts[:, :size] + counts[:, size:]
        return statistic(np.where(n > 0, hit / np.maximum(n, 1), np.nan))

    return bootstrap_stderr(of_counts, np.concatenate([right, total - right]), seed)


def macro_f1_stderr(labels: np.ndarray, predicted: np.ndarray, seed: int = 0) -> float:
    """Bootstrap standard error of `macro_f1`; cells are the pairs of label and prediction that occur."""
    size = int(max(labels.max(), predicted.max())) + 1
    pairs, cells = np.unique(labels.astype(np.int64) * size + predicted, return_counts=True)
    return bootstrap_stderr(
        lambda draws: np.array([macro_f1(pairs // size, pairs % size, counts) for counts in draws]), cells, seed
    )


def recall_stderr(
    text_hits: np.ndarray, image_hits: np.ndarray, owner: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap standard errors of recall in text retrieval, in image retrieval, and of their mean.

    Images are drawn with their captions, because the captions of one image are not independent. `text_hits` are bool
    [n], one an image; `image_hits` bool [m], one a caption; `owner` int [m], the image of each caption.
    """
    n = len(text_hits)
    captions = np.bincount(owner, minlength=n).astype(float)
    found = np.bincount(owner, weights=image_hits.astype(float), minlength=n)
    rng = np.random.default_rng(seed)
    text, image = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(n, size=n)
        text[i] = text_hits[drawn].mean()
        image[i] = found[drawn].sum() / captions[drawn].sum()
    return float(text.std(ddof=1)), float(image.std(ddof=1)), float(((text + image) / 2).std(ddof=1))


def mean_stderr(values: np.ndarray, seed: int = 0) -> float:
    """Bootstrap standard error of the mean of independent values, float [n]."""
    levels, cells = np.unique(values, return_counts=True)
    return bootstrap_stderr(lambda counts: counts @ levels / counts.sum(axis=1), cells, seed)


def average_precision_stderr(scores: np.ndarray, targets: np.ndarray, seed: int = 0, block: int = 16) -> float:
    """Bootstrap standard error of `average_precision`, drawing images, `block` draws at a time."""
    rng, n, classes = np.random.default_rng(seed), len(scores), _sorted_targets(scores, targets)
    values = []
    for low in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - low)
        values.append(_precisions(rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float), classes))
    return float(np.concatenate(values).std(ddof=1))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """`frechet_distance` between two sets of features, float [n, d] and [m, d]."""
    return frechet_distance(*moments(a), *moments(b))


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), squared as FID is; μ [d], Σ [d, d].

    Heusel et al. 2017, equation 6. The trace of the root is that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric, so that no
    complex numbers arise.
    """
    values, vectors = np.linalg.eigh(np.asarray(cov1, np.float64))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = root @ np.asarray(cov2, np.float64) @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d], float64, of features [n, d]."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))

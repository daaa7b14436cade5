"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import SEED, Features, Row
from winnow.evaluate.sets.layout import EvalSet

TEXTS_AT_ONCE = 4096


def class_weights(features: Features, test_set: EvalSet) -> np.ndarray:
    """A class's weight: the mean of its normalised prompt embeddings, normalised again. float32 [classes, dim]."""
    if features.class_weights is not None:
        return features.class_weights
    return prompt_weights(features.encode_texts, [test_set.prompts(name) for name in test_set.classnames])


def prompt_weights(encode_texts: Callable[[list[str]], np.ndarray], prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """`class_weights` of the classes with these prompts, at least one each."""
    step = max(1, TEXTS_AT_ONCE // max(len(texts) for texts in prompts))
    weights = []
    for low in range(0, len(prompts), step):
        batch = prompts[low : low + step]
        embeddings = encode_texts([prompt for texts in batch for prompt in texts])
        counts = np.array([len(texts) for texts in batch])
        sums = np.add.reduceat(embeddings, np.cumsum(counts) - counts, axis=0)
        weights.append(sums / counts[:, None].astype(sums.dtype))
    mean = np.concatenate(weights)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zeroshot(features: Features, test_set: EvalSet) -> list[Row]:
    """`classification_rows` of the inner products with the classes' weights."""
    return classification_rows(features.images @ class_weights(features, test_set).T, features, test_set)


def classification_rows(scores: np.ndarray, features: Features, test_set: EvalSet) -> list[Row]:
    """acc1, acc5 (from five classes up) and mean per-class recall; macro F1 where it is the task's main metric;
    accuracy by group where the task has groups. Images whose label is -1 do not count.

    Args:
        scores: float [n, classes], the higher the likelier.
        features: of the test set, for its labels.
        test_set: for its classes and its main metric.
    """
    counted = features.labels >= 0
    scores, labels = scores[counted], features.labels[counted]
    n = len(labels)
    ranks, predicted = metrics.label_ranks(scores, labels), metrics.predictions(scores)
    rows = []
    for k in (1, 5):
        if k == 1 or len(test_set.classnames) >= 5:
            fraction = metrics.accuracy(ranks, k)
            rows.append(Row(f"acc{k}", fraction, n, metrics.binomial_stderr(fraction, n)))
    rows.append(
        Row(
            "mean_per_class_recall",
            metrics.mean_per_class_recall(labels, predicted),
            n,
            metrics.mean_per_class_recall_stderr(labels, predicted, SEED),
        )
    )
    if test_set.task.metric == "F1-macro_all":
        f1 = metrics.macro_f1(labels, predicted)
        rows.append(Row("F1-macro_all", f1, n, metrics.macro_f1_stderr(labels, predicted, SEED)))
    task = test_set.task
    if task.group_by and not np.isnan(features.metadata).any():
        metadata = features.metadata[counted].astype(np.int64)
        for field in task.group_by:
            groups = metadata[:, task.metadata.index(field)]
            rows += group_rows(task.group_metric, field, ranks < task.top, groups, task.worst_metric(field))
    return rows


def group_rows(metric: str, field: str, correct: np.ndarray, groups: np.ndarray, worst: str) -> list[Row]:
    """Accuracy in each group that has samples, "acc_region:3", and the lowest of them; as WILDS names them.

    Args:
        metric, field: of the name.
        correct: bool [n].
        groups: int [n], at least 0.
        worst: name of the lowest.
    """
    rows = [
        Row(f"{metric}_{field}:{group}", fraction, size, metrics.binomial_stderr(fraction, size))
        for group, (fraction, size) in metrics.group_accuracies(correct, groups).items()
    ]
    lowest = metrics.worst_group_accuracy(correct, groups)
    return [*rows, Row(worst, lowest, len(groups), metrics.worst_group_stderr(correct, groups, SEED))]

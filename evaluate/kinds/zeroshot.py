"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

import numpy as np

from evaluate import metrics
from evaluate.data import EvalSet
from evaluate.kinds import SEED, Features, Row

TEXTS_AT_ONCE = 4096


def class_weights(features: Features, test_set: EvalSet) -> np.ndarray:
    """A class's weight: the mean of its normalised prompt embeddings, normalised again. float32 [classes, dim]."""
    per_class = len(test_set.templates)
    step = max(1, TEXTS_AT_ONCE // per_class)
    weights = []
    for low in range(0, len(test_set.classnames), step):
        names = test_set.classnames[low : low + step]
        embeddings = features.encode_texts([prompt for name in names for prompt in test_set.prompts(name)])
        weights.append(embeddings.reshape(len(names), per_class, -1).mean(axis=1))
    mean = np.concatenate(weights)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def zeroshot(features: Features, test_set: EvalSet) -> list[Row]:
    """acc1, acc5 (from five classes up) and mean per-class recall; macro F1 where it is the task's main metric."""
    scores = features.images @ class_weights(features, test_set).T
    labels, n = features.labels, len(features.labels)
    ranks, predicted = metrics.label_ranks(scores, labels), metrics.predictions(scores)
    rows = []
    for k in (1, 5):
        if k == 1 or len(test_set.classnames) >= 5:
            share = metrics.accuracy(ranks, k)
            rows.append(Row(f"acc{k}", share, n, metrics.binomial_stderr(share, n)))
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
    return rows

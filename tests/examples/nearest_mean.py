"""Nearest class mean: the class whose training images have the nearest mean (Snell et al. 2017, equation 1)."""

from __future__ import annotations

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Features, Protocol, Row
from winnow.evaluate.protocols.zeroshot import classification_rows


def nearest_mean(features: Features, test_set: EvalSet) -> list[Row]:
    train = features.splits["train"]
    classes = range(len(test_set.classnames))
    means = np.stack([train.images[train.labels == label].mean(axis=0) for label in classes])
    scores = features.images @ means.T - (means**2).sum(axis=1) / 2
    return classification_rows(scores, features, test_set)


NEAREST_MEAN = Protocol(
    "nearest_mean", kinds=frozenset({"zeroshot_classification"}), run=nearest_mean, needs=frozenset({"train"})
)

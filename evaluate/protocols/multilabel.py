"""Zero-shot classification of images with several labels, CLIP_benchmark's `dataset_type.txt` = "multilabel": a
sample's `KEY.npy` holds a 1 for each class that it has, else 0."""

from __future__ import annotations

from winnow.evaluate import metrics
from winnow.evaluate.protocols.base import SEED, Features, Row
from winnow.evaluate.protocols.zeroshot import class_weights
from winnow.evaluate.sets.layout import EvalSet


def multilabel(features: Features, test_set: EvalSet) -> list[Row]:
    """`mean_average_precision` over the classes."""
    scores, targets = features.images @ class_weights(features, test_set).T, features.metadata > 0
    value = metrics.average_precision(scores, targets)
    error = metrics.average_precision_stderr(scores, targets, SEED)
    return [Row("mean_average_precision", value, len(scores), error)]

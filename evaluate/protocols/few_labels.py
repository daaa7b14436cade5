"""The linear probe with 1 % and 10 % of the labels, the same number from each class.

Chen et al. 2020 (SimCLR), section 6 and appendix B.5, samples in this way and fine-tunes
(`winnow.evaluate.protocols.fine_tune`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Features, Protocol, Row, Split
from winnow.evaluate.protocols.linear import probe, train_split
from winnow.evaluate.protocols.zeroshot import classification_rows

SEEDS = (0, 1, 2)


def few_labels(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices of a class-balanced part of a train split: int64, ascending.

    Each class that occurs gives the same number of samples, `fraction` of the split divided by the number of classes,
    rounded; but at least one and at most all that it has. With unequal classes that is less than `fraction` of all.
    """
    present = np.unique(labels)
    each = max(1, round(fraction * len(labels) / len(present)))
    rng = np.random.default_rng(seed)
    selected = [rng.permutation(np.flatnonzero(labels == label))[:each] for label in present]
    return np.sort(np.concatenate(selected))


def linear_few(features: Features, test_set: EvalSet, fraction: float) -> list[Row]:
    """The test set's scores by the probe on a part of the train split drawn from the seed.

    No other label is used: the strength is chosen on a fifth of that part, or is 1 where that is empty.
    """
    train = train_split(features, test_set)
    indices = few_labels(train.labels, fraction, features.seed)
    part = Split(train.images[indices], train.labels[indices], train.samples)
    scores = probe(part, None, features.images, len(test_set.classnames), features.device)
    return classification_rows(scores, features, test_set)


def few_labels_protocol(name: str, run: Callable[..., list[Row]], fraction: float, *needs: str) -> Protocol:
    """A protocol of classification that takes a fraction of the labels, drawn from each of `SEEDS`."""
    run = functools.partial(run, fraction=fraction)
    return Protocol(name, frozenset({"zeroshot_classification"}), run, frozenset({"train", *needs}), SEEDS)


LINEAR_1PCT = few_labels_protocol("linear_1pct", linear_few, 0.01)
LINEAR_10PCT = few_labels_protocol("linear_10pct", linear_few, 0.1)

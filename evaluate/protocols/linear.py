"""The linear probe: logistic regression on frozen features, the L2 strength swept on a validation split.

Radford et al. 2021 (CLIP), appendix A.3: L-BFGS with at most 1,000 iterations; the strength out of 96 values spaced
logarithmically from 1e-6 to 1e6, found by a search that starts with seven of them and halves the interval around the
best until it knows 8 a decade; the final classifier is trained on train and validation together. Deviations: the
features are the encoder's L2-normalised embeddings, where CLIP took those before the projection; for sets without a
validation split it is a fifth of each class of the train split, and a fit starts from that of the nearest strength.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Features, Protocol, Row, Split
from winnow.evaluate.protocols.zeroshot import classification_rows
from winnow.evaluate.tasks.task import TaskError
from winnow.infra.io import storage

if TYPE_CHECKING:
    import torch

    from winnow.evaluate.protocols.logistic import Weights

START = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # exponents of 10
FINEST = 1 / 8  # decades
VALIDATION = 0.2  # of the train split, where a set has no validation split
FALLBACK_L2 = 1.0  # where there is nothing to validate on


def sweep(score: Callable[[float], float]) -> float:
    """The strength in [1e-6, 1e6] with the highest validation score, by the search of CLIP's appendix A.3; the largest
    of equals."""
    scores: dict[float, float] = {}

    def look(exponents: list[float]) -> float:
        # From the strongest down: each fit then starts near its solution.
        for exponent in sorted(exponents, reverse=True):
            if exponent not in scores and START[0] <= exponent <= START[-1]:
                scores[exponent] = score(10.0**exponent)
        return max(scores, key=lambda exponent: (scores[exponent], exponent))

    best, step = look(list(START)), START[1] - START[0]
    while step > FINEST:
        step /= 2
        best = look([best - step, best + step])
    return float(10.0**best)


def split_labels(labels: np.ndarray, fraction: float = VALIDATION, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to validate on, int64, ascending; split class by class, the same each time.

    Every class keeps a sample to train on. Those with two or more give at least one to validation.
    """
    rng = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        held.append(indices[: min(len(indices) - 1, max(1, round(fraction * len(indices))))])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def best_l2(x: torch.Tensor, y: torch.Tensor, held_x: torch.Tensor, held_y: torch.Tensor, classes: int) -> float:
    """The strength with which a classifier trained on (x, y) has the highest accuracy on the held-out samples."""
    from winnow.evaluate.protocols.logistic import accuracy, fit, principal

    fits: dict[float, Weights] = {}
    known = principal(x)

    def score(l2: float) -> float:
        near = min(fits, key=lambda other: abs(np.log(other / l2)), default=None)
        fits[l2] = fit(x, y, classes, l2, None if near is None else fits[near], known)
        return accuracy(fits[l2], held_x, held_y)

    return sweep(score)


def probe(train: Split, val: Split | None, test_images: np.ndarray, classes: int, device: str) -> np.ndarray:
    """Sweep, train on everything, and score the test images, float32 [n, dim]: float [n, classes].

    The strength is chosen on `val`; where that is None or holds one class alone, on a part of the rest.
    """
    import torch

    from winnow.evaluate.protocols.logistic import fit, logits_of, to_torch

    splits = [train] if val is None else [train, val]
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    if val is None or len(np.unique(val.labels)) < 2:
        train_part, held = split_labels(labels)
    else:
        train_part, held = np.split(np.arange(len(labels)), [len(train.labels)])
    x = to_torch(images, device)
    y = torch.as_tensor(labels, device=x.device)
    l2 = best_l2(x[train_part], y[train_part], x[held], y[held], classes) if len(held) else FALLBACK_L2
    return logits_of(fit(x, y, classes, l2), to_torch(test_images, device))


def train_split(features: Features, test_set: EvalSet) -> Split:
    """The split to learn from. Raises TaskError when it holds one class alone."""
    train = features.splits["train"]
    if len(np.unique(train.labels)) < 2:
        raise TaskError("holds fewer than two classes", where=storage.join(test_set.url, "train"))
    return train


def train_and_val(features: Features, test_set: EvalSet) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the train split and, where there is one, the validation split. Raises as `train_split`."""
    splits = [train_split(features, test_set), *([features.splits["val"]] if "val" in features.splits else [])]
    return np.concatenate([split.images for split in splits]), np.concatenate([split.labels for split in splits])


def linear_probe(features: Features, test_set: EvalSet) -> list[Row]:
    """The test set's scores by the probe."""
    train = train_split(features, test_set)
    scores = probe(train, features.splits.get("val"), features.images, len(test_set.classnames), features.device)
    return classification_rows(scores, features, test_set)


LINEAR_PROBE = Protocol(
    "linear_probe", kinds=frozenset({"zeroshot_classification"}), run=linear_probe, needs=frozenset({"train"})
)

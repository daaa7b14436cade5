"""Weighted k-nearest neighbours on frozen features.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4: the k = 200
train images with the highest cosine vote for their class with the weight exp(cosine / 0.07). Here k is at most the
size of the train split.
"""

from __future__ import annotations

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Features, Protocol, Row
from winnow.evaluate.protocols.linear import train_and_val
from winnow.evaluate.protocols.zeroshot import classification_rows

K = 200
TEMPERATURE = 0.07
_BLOCK = 1024  # test images at once


def votes(
    test: np.ndarray,
    train: np.ndarray,
    labels: np.ndarray,
    classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
) -> np.ndarray:
    """The votes of the k nearest train images for each class, float64 [n, classes].

    `test` is float32 [n, d] and `train` float32 [m, d], both L2-normalised; `labels` int64 [m] are those of `train`.
    """
    import torch

    from winnow.evaluate.protocols.logistic import torch_device

    on = torch_device(device)
    bank, owner = torch.as_tensor(train, device=on), torch.as_tensor(labels, device=on)
    found = []
    for low in range(0, len(test), _BLOCK):
        cosines = torch.as_tensor(test[low : low + _BLOCK], device=on) @ bank.T
        nearest, indices = cosines.topk(min(k, len(train)), dim=1)
        weights = (nearest.double() / temperature).exp()
        scores = torch.zeros(len(nearest), classes, dtype=torch.float64, device=on)
        found.append(scores.scatter_add_(1, owner[indices], weights).cpu().numpy())
    return np.concatenate(found)


def knn(features: Features, test_set: EvalSet) -> list[Row]:
    """The test set's scores by the votes; the validation split, where there is one, votes too."""
    images, labels = train_and_val(features, test_set)
    scores = votes(features.images, images, labels, len(test_set.classnames), device=features.device)
    return classification_rows(scores, features, test_set)


KNN = Protocol("knn", kinds=frozenset({"zeroshot_classification"}), run=knn, needs=frozenset({"train"}))

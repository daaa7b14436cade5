"""The linear classifier of self-supervised learning's evaluations, by stochastic gradient descent on frozen features.

He et al. 2020 (MoCo), section 4.1: learning rate 30 at batch 256, divided by ten after 60 and 80 of 100 epochs,
momentum 0.9, no weight decay. Deviations: the features are those of the whole image, L2-normalised, and not of
random crops; small sets take at least `MIN_STEPS` steps, because the schedule is ImageNet's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from winnow.evaluate.protocols.base import EvalSet, Features, Protocol, Row
from winnow.evaluate.protocols.linear import train_and_val
from winnow.evaluate.protocols.zeroshot import classification_rows

if TYPE_CHECKING:
    import torch

    from winnow.evaluate.protocols.logistic import Weights

EPOCHS = 100
BATCH = 256
RATE = 30.0
MOMENTUM = 0.9
MILESTONES = (0.6, 0.8)  # of all steps
MIN_STEPS = 1000


def fit_sgd(x: torch.Tensor, y: torch.Tensor, classes: int, seed: int = 0, rate: float = RATE) -> Weights:
    """A linear classifier (W [classes, d], b [classes]) of x [n, d] with the labels y int64 [n].

    The order of each epoch is drawn from `seed`.
    """
    import torch
    import torch.nn.functional as F

    from winnow.evaluate.protocols.logistic import threads_for

    layer = torch.nn.Linear(x.shape[1], classes, dtype=x.dtype, device=x.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM)
    per_epoch = -(-len(x) // BATCH)
    steps = max(MIN_STEPS, EPOCHS * per_epoch)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(steps * at) for at in MILESTONES])
    rng = np.random.default_rng(seed)
    order: list[np.ndarray] = []
    with threads_for(x[:BATCH], classes):
        for _ in range(steps):
            if not order:
                order = np.array_split(rng.permutation(len(x)), per_epoch)
            indices = torch.as_tensor(order.pop(), device=x.device)
            loss = F.cross_entropy(layer(x[indices]), y[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return layer.weight.detach(), layer.bias.detach()


def linear_sgd(features: Features, test_set: EvalSet) -> list[Row]:
    """The test set's scores by the classifier, which also learns from the validation split, where there is one."""
    import torch

    from winnow.evaluate.protocols.logistic import logits_of, to_torch

    images, labels = train_and_val(features, test_set)
    x = to_torch(images, features.device)
    y = torch.as_tensor(labels, device=x.device)
    weights = fit_sgd(x, y, len(test_set.classnames), features.seed)
    return classification_rows(logits_of(weights, to_torch(features.images, features.device)), features, test_set)


LINEAR_SGD = Protocol(
    "linear_sgd", kinds=frozenset({"zeroshot_classification"}), run=linear_sgd, needs=frozenset({"train"})
)

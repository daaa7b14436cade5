"""The linear probe: logistic regression on frozen features, the L2 strength swept on a validation split.

Radford et al. 2021 (CLIP), appendix A.3: L-BFGS with at most 1,000 iterations; the strength out of 96 values spaced
logarithmically from 1e-6 to 1e6, found by a search that starts with seven of them and halves the interval around the
best until it knows 8 a decade; the final classifier is trained on train and validation together. Deviations: the
features are the encoder's L2-normalised embeddings, where CLIP took those before the projection; sets without a
validation split have a fifth of each class of the train split for it, and a fit starts from that of the nearest
strength.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from winnow.evaluate.protocols.base import Features, Row, Split
from winnow.evaluate.protocols.zeroshot import classification_rows
from winnow.evaluate.sets.layout import EvalSet, TaskError
from winnow.infra.io import storage

START = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # exponents of 10
FINEST = 1 / 8  # decades
MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # of the largest entry of the gradient of the mean loss, in variables of like curvature
VALIDATION = 0.2  # of the train split, where a set has no validation split
SMALL = 20_000_000  # multiplications of a step
FALLBACK_L2 = 1.0  # where there is nothing to validate on

Weights = tuple[torch.Tensor, torch.Tensor]


def torch_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def to_torch(images: np.ndarray, device: str) -> torch.Tensor:
    """Features to fit on: float64 on the CPU, where the result then hardly depends on the number of threads, else
    float32."""
    on = torch_device(device)
    return torch.as_tensor(images).to(on, torch.float64 if on.type == "cpu" else torch.float32)


@dataclass(frozen=True)
class Principal:
    """Features in the coordinates of their principal axes.

    Attributes:
        x: [n, r], of mean 0; what their r axes leave out of them is rounding.
        mean: [d].
        axes: [d, r], orthonormal columns.
        variance: [r], of x.
    """

    x: torch.Tensor
    mean: torch.Tensor
    axes: torch.Tensor
    variance: torch.Tensor


def principal(x: torch.Tensor) -> Principal:
    """Of features [n, d]; at most min(n, d) axes."""
    n, dim = x.shape
    mean = x.mean(dim=0)
    centred = x - mean
    if n < dim:
        _, size, rows = torch.linalg.svd(centred, full_matrices=False)
        variance, axes = size.square() / n, rows.T
    else:
        variance, axes = torch.linalg.eigh(centred.T @ centred / n)
    kept = variance > max(n, dim) * torch.finfo(x.dtype).eps * variance.max()
    axes = axes[:, kept].contiguous()
    return Principal(centred @ axes, mean, axes, variance[kept])


def fit(
    x: torch.Tensor,
    y: torch.Tensor,
    classes: int,
    l2: float,
    start: Weights | None = None,
    known: Principal | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Weights:
    """Multinomial logistic regression by L-BFGS (Nocedal & Wright 2006, algorithm 7.5) with a strong Wolfe search.

    Minimises the sum over samples of the cross-entropy of softmax(W x + b) plus l2 / 2 times the squared norm of W.
    That is scikit-learn's `LogisticRegression(C=1 / l2)` for three classes and more.

    Args:
        x: [n, d].
        y: int64 [n].
        classes: number of classes; those without a sample get little probability.
        l2: strength; above 0.
        start: where to start from; 0 where None.
        known: `principal(x)`, if it is.
        max_iterations: of L-BFGS.
        tolerance: stop when no entry of the gradient is larger (see `TOLERANCE`).

    Returns:
        (W [classes, d], b [classes]), of x's type and on its device.
    """
    n = len(x)
    # L-BFGS works on a shifted, turned and scaled problem with the same solution, whose curvature at W = 0 is the same
    # in all directions: embeddings share a large mean and vary far more along some directions than along others. Along
    # those that no sample has, the solution is 0.
    turned = known or principal(x)
    scale_w, scale_b = (l2 / n + turned.variance / classes) ** -0.5, classes**0.5
    rank = len(turned.variance)
    theta = torch.zeros(classes, rank + 1, dtype=x.dtype, device=x.device)
    if start is not None:
        theta[:, :rank] = start[0] @ turned.axes / scale_w
        theta[:, rank] = (start[1] + start[0] @ turned.mean) / scale_b
    theta.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        w = theta[:, :rank] * scale_w
        loss = F.cross_entropy(F.linear(turned.x, w, theta[:, rank] * scale_b), y) + l2 / (2 * n) * w.square().sum()
        loss.backward()
        return loss

    with threads_for(x, classes):
        optimiser.step(closure)
    with torch.no_grad():
        w = (theta[:, :rank] * scale_w) @ turned.axes.T
        return w, theta[:, rank] * scale_b - w @ turned.mean


@contextlib.contextmanager
def threads_for(x: torch.Tensor, classes: int) -> Iterator[None]:
    """One CPU thread for steps too small to share out, where waiting for each other takes longer than the work."""
    before = torch.get_num_threads()
    if x.shape[0] * x.shape[1] * classes < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def logits_of(weights: Weights, x: torch.Tensor) -> np.ndarray:
    """Scores [n, classes] of the classes."""
    scores: np.ndarray = F.linear(x, *weights).cpu().numpy()
    return scores


def sweep(score: Callable[[float], float]) -> float:
    """The strength with the highest score on validation, by the search of CLIP's appendix A.3; the largest of equals.

    Args:
        score: of a strength, 10 to the power of an exponent in [-6, 6].
    """
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
    """Cut a train split in two, class by class; the same samples each time.

    Every class keeps a sample to train on. Those with two or more give at least one to validation.

    Returns:
        (places of those to train on, places of those to validate on), int64, ascending.
    """
    rng = np.random.default_rng(seed)
    held: list[np.ndarray] = []
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        held.append(indices[: min(len(indices) - 1, max(1, round(fraction * len(indices))))])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def best_l2(x: torch.Tensor, y: torch.Tensor, held_x: torch.Tensor, held_y: torch.Tensor, classes: int) -> float:
    """The strength with which a classifier trained on (x, y) has the highest accuracy on the held-out samples."""
    fits: dict[float, Weights] = {}
    known = principal(x)

    def score(l2: float) -> float:
        near = min(fits, key=lambda other: abs(np.log(other / l2)), default=None)
        fits[l2] = fit(x, y, classes, l2, None if near is None else fits[near], known)
        return float((F.linear(held_x, *fits[l2]).argmax(dim=1) == held_y).double().mean())

    return sweep(score)


def probe(train: Split, val: Split | None, test_images: np.ndarray, classes: int, device: str) -> np.ndarray:
    """Sweep, train on everything, and score the test set: float [n, classes].

    Args:
        train: to learn from.
        val: to choose the strength on; None, or where it holds one class alone, to carve it from what there is.
        test_images: float32 [n, dim].
        classes: number of classes.
        device: "auto", "cpu", "cuda".
    """
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


def linear_probe(features: Features, test_set: EvalSet) -> list[Row]:
    """The test set's figures by the probe."""
    train = train_split(features, test_set)
    classes = len(test_set.classnames)
    scores = probe(train, features.splits.get("val"), features.images, classes, features.device)
    return classification_rows(scores, features, test_set)

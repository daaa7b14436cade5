"""Multinomial logistic regression by L-BFGS, for the linear probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # of the largest entry of the gradient of the mean loss, in variables of like curvature
SMALL = 20_000_000  # multiplications of a step

Weights = tuple[torch.Tensor, torch.Tensor]


def torch_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def to_torch(images: np.ndarray, device: str) -> torch.Tensor:
    """Features to fit on: float64 on the CPU, where the result then hardly depends on the number of threads, else
    float32."""
    on = torch_device(device)
    return torch.as_tensor(images).to(on, torch.float64 if on.type == "cpu" else torch.float32)


class Principal(NamedTuple):
    """Features in the coordinates of their r principal axes; what these leave out is rounding."""

    x: torch.Tensor  # [n, r], of mean 0
    mean: torch.Tensor  # [d]
    axes: torch.Tensor  # [d, r], orthonormal columns
    variance: torch.Tensor  # [r], of x


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
        x, y: features [n, d] and labels int64 [n].
        classes: number of classes; those without a sample get little probability.
        l2: strength; above 0.
        start: where to start from; 0 where None.
        known: `principal(x)`, if it has been computed.
        tolerance: stop when no entry of the gradient is larger (see `TOLERANCE`).

    Returns:
        (W [classes, d], b [classes]), of x's dtype and on its device.
    """
    # L-BFGS works on a shifted, rotated and scaled problem with the same solution, whose curvature at W = 0 is the
    # same in all directions: embeddings share a large mean and vary far more along some directions than along others.
    # Along directions that no sample has, the solution is 0.
    rotated = known or principal(x)
    scale_w, scale_b = (l2 / len(x) + rotated.variance / classes) ** -0.5, classes**0.5
    rank = len(rotated.variance)
    theta = torch.zeros(classes, rank + 1, dtype=x.dtype, device=x.device)
    if start is not None:
        theta[:, :rank] = start[0] @ rotated.axes / scale_w
        theta[:, rank] = (start[1] + start[0] @ rotated.mean) / scale_b
    theta.requires_grad_(True)

    def loss() -> torch.Tensor:
        w = theta[:, :rank] * scale_w
        entropy = F.cross_entropy(F.linear(rotated.x, w, theta[:, rank] * scale_b), y)
        return entropy + l2 / (2 * len(x)) * w.square().sum()

    with threads_for(x, classes):
        _minimise(theta, loss, max_iterations, tolerance)
    with torch.no_grad():
        w = (theta[:, :rank] * scale_w) @ rotated.axes.T
        return w, theta[:, rank] * scale_b - w @ rotated.mean


def _minimise(theta: torch.Tensor, loss: Callable[[], torch.Tensor], max_iterations: int, tolerance: float) -> None:
    """Change theta in place to minimise a loss."""
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@contextlib.contextmanager
def threads_for(x: torch.Tensor, classes: int) -> Iterator[None]:
    """One CPU thread for small steps, where synchronising threads takes longer than the work."""
    before = torch.get_num_threads()
    if x.shape[0] * x.shape[1] * classes < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def logits_of(weights: Weights, x: torch.Tensor) -> np.ndarray:
    """Scores [n, classes] of the classes."""
    return np.asarray(F.linear(x, *weights).cpu())


def accuracy(weights: Weights, x: torch.Tensor, y: torch.Tensor) -> float:
    """Fraction of the samples x [n, d] whose label y int64 [n] has the highest score."""
    return float((F.linear(x, *weights).argmax(dim=1) == y).double().mean())

"""GradCache: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from winnow.pretrain.objectives.base import Objective


class CachedGradients:
    """The loss of a batch, and its gradient with respect to the rows of `embed` and to the parameters `loss` uses.

    Args:
        objective: with `embed` and `loss`.
        trained: its trained parameters.
        parts: of this process's batch, on `device`.
        autocast: context in which to compute.

    Attributes:
        losses: scalars for the log.
    """

    def __init__(
        self,
        objective: Objective,
        trained: list[nn.Parameter],
        parts: list[dict[str, torch.Tensor]],
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ) -> None:
        embedded = []
        self._states: list[list[torch.Tensor]] = []
        with torch.no_grad(), autocast():
            for part in parts:
                self._states.append(_random_state(device))
                embedded.append(objective.embed(part))
        rows = [torch.cat(column).detach().requires_grad_() for column in zip(*embedded, strict=True)]
        with autocast():
            losses = objective.loss(tuple(rows))
        grads = torch.autograd.grad(losses.total, [*rows, *trained], allow_unused=True, materialize_grads=False)
        self._rows = [
            (torch.zeros_like(row) if grad is None else grad).chunk(len(parts))
            for row, grad in zip(rows, grads, strict=False)
        ]
        by_parameter = zip(trained, grads[len(rows) :], strict=True)
        self._parameters = [(value, grad) for value, grad in by_parameter if grad is not None]
        self.losses = {name: value.detach() for name, value in losses.parts.items()}

    def of(self, number: int) -> tuple[list, list]:
        """Gradients of part `number`: by row, and (parameter, gradient). Puts the random generators back to their
        state when the part's features were computed."""
        _set_random_state(self._states[number])
        return [column[number] for column in self._rows], self._parameters if number == 0 else []


def surrogate(objective: Objective, part: dict[str, torch.Tensor], gradients: tuple[list, list]) -> Any:
    """A scalar whose gradient is that of the loss, by the chain rule through the rows."""
    rows, parameters = gradients
    pairs = [*zip(objective.embed(part), rows, strict=True), *parameters]
    return sum((value.float() * grad).sum() for value, grad in pairs)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])

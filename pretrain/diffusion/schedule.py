"""The amount of noise at each timestep, and what a network predicts.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Nichol & Dhariwal 2021, "Improved Denoising Diffusion
Probabilistic Models" (the cosine schedule); Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of
Diffusion Models" (v). Timesteps count from 0 here: `alpha_bar[t]` is the papers' ᾱ of t + 1.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε            (Ho et al., equation 4)
    v   = √ᾱ_t · ε   − √(1 − ᾱ_t) · x_0          (Salimans & Ho, appendix D)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

Prediction = Literal["epsilon", "v"]


def linear_betas(steps: int) -> np.ndarray:
    """β from 1e-4 to 0.02 (Ho et al., section 4); float64 [steps].

    The paper's are for 1000 steps; for another number they are scaled by 1000 / steps, as in Nichol & Dhariwal's code,
    so that the same amount of noise is reached.
    """
    scale = 1000 / steps
    return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps), 0.999)


def cosine_betas(steps: int, s: float = 0.008) -> np.ndarray:
    """β for which ᾱ is a squared cosine, at most 0.999 (Nichol & Dhariwal, equation 17); float64 [steps]."""

    def f(t: int) -> float:
        return math.cos((t / steps + s) / (1 + s) * math.pi / 2) ** 2

    return np.array([min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)])


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}


def alpha_bars(name: str, steps: int) -> np.ndarray:
    """ᾱ, the product of 1 − β so far; float64 [steps], falling."""
    return np.cumprod(1 - SCHEDULES[name](steps))


def noised(x0: torch.Tensor, epsilon: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_t, with a = √ᾱ and s = √(1 − ᾱ)."""
    return a * x0 + s * epsilon


def velocity(x0: torch.Tensor, epsilon: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """v."""
    return a * epsilon - s * x0


def parts(
    x: torch.Tensor, output: torch.Tensor, a: torch.Tensor, s: torch.Tensor, prediction: Prediction
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and ε that a network's output says x_t is made of."""
    if prediction == "v":
        return a * x - s * output, s * x + a * output
    return (x - s * output) / a, output


class Noise:
    """Standard normal noise, each image from its own generator, so that it does not depend on the others.

    Args:
        seeds: of the images, as NumPy takes them.
        shape: of one.
    """

    def __init__(self, seeds: Sequence[int | tuple[int, ...]], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self) -> torch.Tensor:
        """The next draw, float32 [n, …], on the CPU."""
        draws = [generator.standard_normal(self.shape, np.float32) for generator in self.generators]
        return torch.from_numpy(np.stack(draws))

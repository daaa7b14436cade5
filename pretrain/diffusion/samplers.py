"""From noise to images: ancestral sampling and DDIM, over any function that predicts x_0 and ε from x_t.

Ho et al. 2020, algorithm 2; Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16; Ho & Salimans
2022, "Classifier-Free Diffusion Guidance", equation 6. Both samplers can stride over the timesteps; ancestral sampling
then takes the β of the strided process (Nichol & Dhariwal 2021, equation 19).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

# (x_t [n, …], timestep) to (x_0, ε), each of the shape of x_t.
Denoiser = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
Draw = Callable[[], torch.Tensor]


def strided(timesteps: int, steps: int) -> list[int]:
    """`steps` of the `timesteps`, evenly spaced from the last to the first."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be from 1 to {timesteps}")
    if steps == 1:
        return [timesteps - 1]
    return [int(t) for t in np.linspace(0, timesteps - 1, steps).round()[::-1]]


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, w: float) -> torch.Tensor:
    """ε̄ = (w + 1) · ε(x, t, y) − w · ε(x, t). For v it gives the v̄ of ε̄, because v is linear in ε."""
    return (w + 1) * conditional - w * unconditional


def ancestral(
    denoise: Denoiser,
    alpha_bar: np.ndarray,
    x: torch.Tensor,
    draw: Draw,
    *,
    steps: int | None = None,
    variance: Literal["beta", "posterior"] = "beta",
    clip: float | None = 1.0,
) -> torch.Tensor:
    """Sample from the reverse process (Ho et al. 2020, algorithm 2).

    The mean is that of q(x_s | x_t, x_0) (equation 7). Without clipping it is line 4 of algorithm 2.

    Args:
        alpha_bar: of all timesteps, float64 [timesteps].
        x: noise to start from, [n, …].
        draw: returns new noise of the shape of x.
        steps: how many timesteps are visited; None for all.
        variance: σ² = β or β̃, the two choices of section 3.2.
        clip: x_0 is kept within ±clip, as in the paper's code; None leaves it.
    """
    times = strided(len(alpha_bar), steps or len(alpha_bar))
    for i, t in enumerate(times):
        ab, ab_next = float(alpha_bar[t]), _next(alpha_bar, times, i)
        alpha = ab / ab_next
        x0, _ = denoise(x, t)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = (math.sqrt(ab_next) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - ab_next) * x) / (1 - ab)
        if i == len(times) - 1:
            return mean
        sigma2 = 1 - alpha if variance == "beta" else (1 - alpha) * (1 - ab_next) / (1 - ab)
        x = mean + math.sqrt(sigma2) * draw()
    return x


def ddim(
    denoise: Denoiser,
    alpha_bar: np.ndarray,
    x: torch.Tensor,
    draw: Draw,
    *,
    steps: int = 50,
    eta: float = 0.0,
    clip: float | None = 1.0,
) -> torch.Tensor:
    """Sample by DDIM (Song et al. 2021, equation 12); eta 0 adds no noise, eta 1 is ancestral sampling with β̃.

    Args:
        denoise, alpha_bar, x, draw, steps: as for `ancestral`.
        eta: how much of equation 16's σ.
        clip: x_0 is kept within ±clip, and ε recomputed from it.
    """
    times = strided(len(alpha_bar), steps)
    for i, t in enumerate(times):
        ab, ab_next = float(alpha_bar[t]), _next(alpha_bar, times, i)
        x0, epsilon = denoise(x, t)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            epsilon = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        sigma = eta * math.sqrt((1 - ab_next) / (1 - ab)) * math.sqrt(1 - ab / ab_next)
        x = math.sqrt(ab_next) * x0 + math.sqrt(max(1 - ab_next - sigma**2, 0.0)) * epsilon
        if sigma > 0:
            x = x + sigma * draw()
    return x


def _next(alpha_bar: np.ndarray, times: list[int], i: int) -> float:
    """ᾱ of the timestep after times[i]; 1 for the image itself."""
    return float(alpha_bar[times[i + 1]]) if i + 1 < len(times) else 1.0

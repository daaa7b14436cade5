"""Schedules and samplers against the papers' formulas, closed forms, and diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from winnow.pretrain.diffusion.samplers import ancestral, ddim, guided, strided
from winnow.pretrain.diffusion.schedule import Noise, alpha_bars, noised, parts, velocity

MU, S = 0.4, 0.3


def test_linear_alpha_bar_is_ho_et_als() -> None:
    """Section 4: β from 1e-4 to 0.02 over 1000 steps."""
    product, expected = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(product)
    np.testing.assert_allclose(alpha_bars("linear", 1000), expected, rtol=1e-10)
    # As noisy at the end with fewer steps.
    assert math.log(alpha_bars("linear", 100)[-1]) == pytest.approx(math.log(expected[-1]), rel=0.1)


def test_cosine_alpha_bar_is_nichol_and_dhariwals() -> None:
    """Equation 17: f(t) / f(0), but for the clipping of β near the end."""
    bars, t = alpha_bars("cosine", 1000), np.arange(1, 1001)
    f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(bars[:-5], f[:-5], rtol=1e-9)
    assert bars[-1] == pytest.approx(bars[-2] * 0.001)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_what_is_predicted_gives_back_the_parts(name: str, prediction: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 5, 3, dtype=torch.float64, generator=rng)
    bar = torch.from_numpy(alpha_bars(name, 1000)[[0, 10, 300, 700, 990]])[:, None]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x = noised(x0, epsilon, a, s)
    v = velocity(x0, epsilon, a, s)
    found_x0, found_epsilon = parts(x, epsilon if prediction == "epsilon" else v, a, s, prediction)  # type: ignore[arg-type]
    torch.testing.assert_close(found_x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found_epsilon, epsilon, rtol=1e-8, atol=1e-8)
    # Salimans & Ho, appendix D: with the angle φ, v = cos(φ) ε − sin(φ) x, the derivative of z by φ.
    phi = torch.atan2(s, a)
    torch.testing.assert_close(v, torch.cos(phi) * epsilon - torch.sin(phi) * x0)


def test_guidance_is_ho_and_salimans_formula() -> None:
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    torch.testing.assert_close(guided(c, u, 2.0), 3 * c - 2 * u)
    torch.testing.assert_close(guided(c, u, 0.0), c)
    # Guiding v is guiding ε.
    a, s, x = 0.6, 0.8, torch.tensor([0.3, -0.2])
    epsilon = [s * x + a * v for v in (c, u)]
    torch.testing.assert_close(s * x + a * guided(c, u, 2.0), guided(*epsilon, 2.0))


def gaussian(bars: np.ndarray):  # type: ignore[no-untyped-def]
    """The best denoiser of data N(μ, s²): E[ε | x_t] = √(1 − ᾱ) (x_t − √ᾱ μ) / (ᾱ s² + 1 − ᾱ)."""

    def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        bar = bars[t]
        epsilon = math.sqrt(1 - bar) * (x - math.sqrt(bar) * MU) / (bar * S**2 + 1 - bar)
        return (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar), epsilon

    return denoise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "settings", "bias"),
    [
        (ddim, {"steps": 1000}, 0.01),
        (ddim, {"steps": 50}, 0.1),
        (ddim, {"steps": 100, "eta": 1.0}, 0.1),
        (ancestral, {"variance": "posterior"}, 0.01),
        (ancestral, {"variance": "beta"}, 0.01),
        (ancestral, {"steps": 200, "variance": "posterior"}, 0.06),
    ],
)
def test_samplers_draw_from_the_gaussian_that_the_model_knows(schedule, sampler, settings, bias) -> None:  # type: ignore[no-untyped-def]
    """Mean and deviation within four standard errors of n draws, and the bias of finitely many steps."""
    bars, n = alpha_bars(schedule, 1000), 20_000
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    x = sampler(gaussian(bars), bars, draw(), draw, clip=None, **settings)
    assert float(x.mean()) == pytest.approx(MU, abs=4 * S / math.sqrt(n) + 0.004)
    assert float(x.std()) == pytest.approx(S, abs=4 * S / math.sqrt(2 * n) + bias * S)


def nonlinear(bars: np.ndarray):  # type: ignore[no-untyped-def]
    def epsilon(x: torch.Tensor, t: int) -> torch.Tensor:
        return torch.tanh(x) * math.sqrt(1 - bars[t])

    def denoise(x: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        e = epsilon(x, t)
        return (x - math.sqrt(1 - bars[t]) * e) / math.sqrt(bars[t]), e

    return epsilon, denoise


@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_steps_are_diffusers(clip: float | None) -> None:
    bars = alpha_bars("linear", 1000)
    epsilon, denoise = nonlinear(bars)
    reference = DDIMScheduler(
        beta_schedule="linear", clip_sample=clip is not None, timestep_spacing="leading", set_alpha_to_one=True
    )
    reference.set_timesteps(1000)
    x = start = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in reference.timesteps.tolist():
        x = reference.step(epsilon(x, t), t, x, use_clipped_model_output=clip is not None).prev_sample
    ours = ddim(denoise, bars, start, lambda: start, steps=1000, clip=clip)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ancestral_steps_are_diffusers(variance: str) -> None:
    bars = alpha_bars("linear", 1000)
    epsilon, denoise = nonlinear(bars)
    names = {"beta": "fixed_large", "posterior": "fixed_small"}
    reference = DDPMScheduler(beta_schedule="linear", clip_sample=True, variance_type=names[variance])
    x = start = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    for t in range(999, -1, -1):
        x = reference.step(epsilon(x, t), t, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(5)

    def draw() -> torch.Tensor:
        return torch.randn(6, 1, generator=generator, dtype=torch.float64)

    ours = ancestral(denoise, bars, start, draw, variance=variance)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_ddim_with_all_its_noise_is_ancestral_sampling() -> None:
    """Song et al. 2021, section 4.1, for any stride."""
    bars = alpha_bars("cosine", 100)
    _, denoise = nonlinear(bars)
    out = []
    for sampler, settings in ((ddim, {"eta": 1.0}), (ancestral, {"variance": "posterior"})):
        generator = torch.Generator().manual_seed(3)

        def draw(generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(9, generator=generator, dtype=torch.float64)

        out.append(sampler(denoise, bars, draw(), draw, steps=17, clip=0.8, **settings))  # type: ignore[operator]
    torch.testing.assert_close(out[0], out[1])


def test_strides_hold_the_first_and_the_last_timestep() -> None:
    assert strided(10, 10) == list(range(9, -1, -1))
    assert strided(1000, 3) == [999, 500, 0] and strided(1000, 1) == [999]
    for steps in (2, 7, 50, 999):
        assert len(set(strided(1000, steps))) == steps
    with pytest.raises(ValueError, match="from 1 to 10"):
        strided(10, 11)


def test_noise_of_an_image_is_its_own() -> None:
    noise, other = Noise([3, 4], (2, 5)), Noise([4], (2, 5))
    first, again = noise(), noise()
    torch.testing.assert_close(other(), first[1:], rtol=0, atol=0)
    torch.testing.assert_close(other(), again[1:], rtol=0, atol=0)
    many = Noise(range(500), (200,))()
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1, abs=0.02)

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import ColorJitter

from winnow.pretrain.data.augment import Augmentation, Jitter, gaussian_blur, simclr_jitter

NONE = Jitter(0, 0, 0, 0)
QUIET = {"jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, "flip": 0.0}


def noise(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_views_depend_on_image_and_generator_alone() -> None:
    """On any number of threads, and whatever state the global generators are in."""
    augmentation = Augmentation(32, (0.08, 1.0), simclr_jitter(1.0))
    images = [noise(seed=i) for i in range(40)]

    def view(i: int) -> np.ndarray:
        return augmentation(images[i], np.random.default_rng((7, i)))

    serial = [view(i) for i in range(40)]
    torch.manual_seed(123)
    np.random.seed(5)
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(serial, pool.map(view, range(40)), strict=True):
            np.testing.assert_array_equal(one, other)
    assert all(view.shape == (3, 32, 32) and view.dtype == np.uint8 for view in serial)
    assert len({view.tobytes() for view in serial}) == 40


def test_each_change_has_its_probability() -> None:
    image, n = noise(), 600

    def fraction(changed, **probabilities: float) -> float:  # type: ignore[no-untyped-def]
        augmentation = Augmentation(24, (0.5, 1.0), Jitter(0.4, 0.4, 0.4, 0.1), **(QUIET | probabilities))
        plain = Augmentation(24, (0.5, 1.0), NONE, **QUIET)
        pairs = [[make(image, np.random.default_rng(seed)) for make in (augmentation, plain)] for seed in range(n)]
        return float(np.mean([changed(*pair) for pair in pairs]))

    def near(p: float):  # type: ignore[no-untyped-def]
        return pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)

    assert fraction(lambda a, b: (a == b[:, :, ::-1]).all(), flip=0.5) == near(0.5)
    assert fraction(lambda a, b: (a[0] == a[1]).all() and (a[1] == a[2]).all(), grey_p=0.2) == near(0.2)
    assert fraction(lambda a, b: (a != b).any(), jitter_p=0.8) == near(0.8)
    assert 0.38 < fraction(lambda a, b: (a != b).any(), blur_p=0.5) < 0.58  # the smallest sigmas change nothing
    assert fraction(lambda a, b: (a == b).all()) == 1.0


def test_colours_change_by_torchvisions_law() -> None:
    """The same means and spreads of brightness, contrast and saturation over many draws as its ColorJitter."""
    image = noise()
    ours = simclr_jitter(0.5)
    reference = ColorJitter(0.4, 0.4, 0.4, 0.1)
    torch.manual_seed(0)

    def statistics(view: Image.Image) -> list[float]:
        x = np.asarray(view, float)
        return [x.mean(), x.std(), x.std(axis=2).mean(), x[..., 0].mean() - x[..., 2].mean()]

    a = np.array([statistics(ours(image, np.random.default_rng(i))) for i in range(800)])
    b = np.array([statistics(reference(image)) for _ in range(800)])
    error = 4 * np.sqrt((a.var(0) + b.var(0)) / 800)
    assert (np.abs(a.mean(0) - b.mean(0)) < error).all()
    np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.15)


def test_brightness_is_uniform_around_one() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    means = np.array([np.asarray(Jitter(0.4, 0, 0, 0)(grey, np.random.default_rng(i))).mean() for i in range(500)])
    assert means.min() >= 59 and means.max() <= 141
    assert means.mean() == pytest.approx(100, abs=4 * 40 / 3**0.5 / 500**0.5)
    assert means.std() == pytest.approx(40 / 3**0.5, rel=0.1)  # of a uniform law
    dark = [np.asarray(Jitter(1.6, 0, 0, 0)(grey, np.random.default_rng(i))).min() for i in range(200)]
    assert min(dark) < 15  # factors below 0 are cut at 0


@pytest.mark.parametrize(("size", "width"), [(32, 3), (96, 9), (224, 23)])
def test_blur_is_the_gaussian_of_a_tenth_of_the_side(size: int, width: int) -> None:
    dot = np.zeros((3, size, size), np.uint8)
    dot[:, size // 2, size // 2] = 255
    offsets = np.arange(width) - width // 2
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    expected = np.zeros((size, size))
    at = slice(size // 2 - width // 2, size // 2 + width // 2 + 1)
    expected[at, at] = 255 * np.outer(kernel, kernel)
    for channel in gaussian_blur(dot, 1.5):
        np.testing.assert_allclose(channel, expected, atol=0.51)
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size + 8), dtype=np.uint8)
    reference = F.gaussian_blur(torch.from_numpy(pixels).float(), [width, width], [0.8, 0.8]).numpy()
    np.testing.assert_allclose(gaussian_blur(pixels, 0.8), reference, atol=0.51)

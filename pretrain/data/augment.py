"""Random augmentations of images, drawn from a NumPy generator.

The pixel operations are torchvision's; it draws from torch's global generator. Here every draw comes from the given
generator, so a view is a pure function of image and generator, in any number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.functional as F
from PIL import Image


@dataclass(frozen=True)
class Jitter:
    """Changes of colour, in random order (torchvision's ColorJitter).

    Attributes:
        brightness, contrast, saturation: factors are drawn from [max(0, 1 - x), 1 + x].
        hue: shifts are drawn from [-hue, hue], in turns of the colour circle; at most 0.5.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        around_one = [(max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)]
        amounts = [rng.uniform(low, high) for low, high in [*around_one, (-self.hue, self.hue)]]
        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for i in rng.permutation(4):
            image = changes[i](image, amounts[i])
        return image


def simclr_jitter(strength: float) -> Jitter:
    """Chen et al. 2020, appendix A: colour distortion of strength s."""
    return Jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)


@dataclass(frozen=True)
class Augmentation:
    """A random view of an image.

    Attributes:
        size: side of the view, pixels.
        area: fraction of the image that the crop takes, from and to; aspect ratio 3/4 to 4/3.
        flip: probability of a horizontal flip.
        jitter, jitter_p: change of colour, and its probability.
        grey_p: probability of losing all colour.
        blur_p: probability of a Gaussian blur.
    """

    size: int
    area: tuple[float, float]
    jitter: Jitter
    flip: float = 0.5
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """RGB image to uint8 [3, size, size]."""
        view = Image.fromarray(random_resized_crop(image, self.size, self.area, rng).transpose(1, 2, 0))
        if rng.random() < self.flip:
            view = F.hflip(view)
        if rng.random() < self.jitter_p:
            view = self.jitter(view, rng)
        if rng.random() < self.grey_p:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        pixels = np.ascontiguousarray(np.asarray(view).transpose(2, 0, 1))
        if rng.random() < self.blur_p:
            pixels = gaussian_blur(pixels, rng.uniform(0.1, 2.0))
        return pixels


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A random crop of `scale` of the area and of aspect ratio 3/4 to 4/3, resized; uint8 [3, size, size].

    torchvision's RandomResizedCrop with bicubic interpolation, which open_clip trains with, but drawn from `rng`.
    Normalisation is left to the device, where a whole batch takes one operation.
    """
    width, height = image.size
    ratio = (math.log(3 / 4), math.log(4 / 3))
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            break
    else:  # torchvision's fallback: the central crop of the nearest allowed aspect ratio
        w = min(width, max(1, round(height * 4 / 3)))
        h = min(height, max(1, round(width * 4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian kernel of 10 % of the side (an odd number, at least 3), edges mirrored.

    Chen et al. 2020, appendix A. Each axis is one product with a banded matrix: torchvision's convolution, to rounding,
    in a third of its time.

    Args:
        pixels: uint8 [3, H, W].
        sigma: pixels.
    """
    height, width = pixels.shape[1:]
    radius = max(1, min(height, width) // 10 // 2)
    down, across = _band(height, radius, sigma), _band(width, radius, sigma)
    blurred = down @ pixels.astype(np.float32) @ across.T
    return np.clip(np.rint(blurred), 0, 255).astype(np.uint8)


def _band(n: int, radius: int, sigma: float) -> np.ndarray:
    """The kernel centred on each of n positions; float32 [n, n]."""
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    at = np.abs(np.arange(n)[:, None] + offsets)
    at = np.where(at >= n, 2 * (n - 1) - at, at)
    band = np.zeros((n, n), np.float32)
    np.add.at(band, (np.arange(n)[:, None], at), (kernel / kernel.sum()).astype(np.float32))
    return band

"""Decoding images that strangers made: sizes are bounded before pixels are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

MAX_PIXELS = 100_000_000
MAX_ASPECT = 500  # longer side over shorter; what resizes the shorter side makes the longer as many times as large
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class ImageError(WinnowError):
    """An image that cannot be used; `what` is a short fixed phrase, fit for counting."""


def image_size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels out of the header, without decoding. Raises ImageError."""
    image = _open(data)
    return image.size


def decode_image(data: bytes, flatten: bool = True) -> Image.Image:
    """Decode to RGB.

    Args:
        data: encoded.
        flatten: lay what is transparent on white. False takes the colour that lies under it, as Pillow's
            `convert("RGB")` does.

    Raises:
        ImageError: the bytes are no whole image, or one too large or too thin.
    """
    image = _open(data)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError("image too thin")
    try:
        if not flatten:
            return image.convert("RGB")
        if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more on broken data
        raise ImageError("undecodable image") from error


def write_image(url: str, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    storage.write_bytes(url, data.getvalue())


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise ImageError("image too large") from None
    except Exception as error:
        raise ImageError("undecodable image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError("image too large")
    if width < 1 or height < 1:
        raise ImageError("undecodable image")
    return image

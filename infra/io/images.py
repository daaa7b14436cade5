"""Decoding untrusted images: sizes are checked before pixels are decoded."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

MAX_PIXELS = 100_000_000
MAX_ASPECT = 500  # longer side over shorter; resizing the shorter side to n makes the longer one up to 500 n
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension of a sample's image among those of its members; the first of EXTENSIONS, or None."""
    present = set(extensions)
    return next((ext for ext in EXTENSIONS if ext in present), None)


class ImageError(WinnowError):
    """An image that cannot be used; `what` is one of a few fixed phrases, so that they can be counted."""


def image_size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels out of the header, without decoding. Raises ImageError."""
    return _open(data).size


def decode_image(data: bytes, flatten: bool = True) -> Image.Image:
    """Decode to RGB. Raises ImageError when the image is damaged, too large or too thin.

    Transparent parts become white; without `flatten` they keep the stored colour, as Pillow's `convert("RGB")` does.
    """
    image = _open(data)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError("image too thin")
    try:
        transparent = image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info)
        if flatten and transparent:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
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
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("image too large")
    if min(image.size) < 1:
        raise ImageError("undecodable image")
    return image

"""Decoding untrusted images: sizes are checked before pixels are decoded.

Images are shown as open_clip and DataComp read them: the EXIF orientation is not applied, and of several frames or
pages the first counts. Only the formats in FORMATS are opened, whatever a file is called; Pillow would start
Ghostscript for an EPS.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image

from winnow.infra.errors import WinnowError
from winnow.infra.io import storage

MAX_PIXELS = 100_000_000
MAX_ASPECT = 500  # longer side over shorter; resizing the shorter side to n makes the longer one up to 500 n
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# What is opened, the frequent ones first, by Pillow's module for it. Extensions on the web are often wrong.
_PLUGINS = {
    "JPEG": "Jpeg", "PNG": "Png", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "TIFF": "Tiff", "AVIF": "Avif",
    "JPEG2000": "Jpeg2K", "PPM": "Ppm", "ICO": "Ico", "DIB": "Bmp",
}  # fmt: skip
for _name in _PLUGINS.values():
    with contextlib.suppress(ImportError):  # AVIF is new
        importlib.import_module(f"PIL.{_name}ImagePlugin")
FORMATS = tuple(name for name in _PLUGINS if name in Image.OPEN)
DECODING = 2  # raise when a file is decoded to other pixels
_GREY_STEP = {"1": 255, "L;2": 85, "L;4": 17}  # between grey levels, by Pillow's name of how a PNG stores them
_UNKNOWN_RANGE = "pixel values of unknown range"

# Of every image with broken metadata, at each decoding, and not thread-safe to silence there.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    """Decode to RGB, as it is stored: the EXIF orientation is not applied, since open_clip does not apply it either.

    Transparent parts become white, whether an alpha channel, a palette or a PNG's tRNS chunk says so; without `flatten`
    they keep the stored colour, as Pillow's `convert("RGB")` does. Of 16 (or 12) bits a channel the upper 8 are taken,
    and floating-point grey is multiplied by 255.

    Raises:
        ImageError: the image is damaged, too large or too thin, or its pixel values have no known range: floats beyond
            [0, 1], and grey of 32 bits or with a sign.
    """
    image = _open(data)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError("image too thin")
    try:
        if image.mode[0] in "IF":
            return _from_deep_grey(image, flatten)
        if flatten and image.has_transparency_data:
            _fit_transparent_color(image)
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more on broken data
        raise ImageError("undecodable image") from error


def _from_deep_grey(image: Image.Image, flatten: bool) -> Image.Image:
    """One channel of 16 or 32 bits or floats to RGB; Pillow's own conversion cuts off at 255."""
    bits = 12 if _stored(image) == "I;12" else 16
    inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    pixels = np.asarray(image)
    if image.mode == "F":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # nor NaN
            raise ImageError(_UNKNOWN_RANGE)
        grey = (pixels * 255 + 0.5).astype(np.uint8)
    elif image.mode == "I" and image.format != "PPM":  # whose values Pillow brings to 16 bits
        raise ImageError(_UNKNOWN_RANGE)
    else:
        grey = (pixels >> (bits - 8)).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if flatten and "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _fit_transparent_color(image: Image.Image) -> None:
    """Bring a PNG's transparent colour from the file's bits a channel to the 8 that Pillow decodes to."""
    color, stored = image.info.get("transparency"), _stored(image)
    if stored in _GREY_STEP and isinstance(color, int):
        image.info["transparency"] = color * _GREY_STEP[stored]
    elif stored == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _stored(image: Image.Image) -> str:
    """Pillow's name of how the file stores pixels ("L;4"), before they are loaded."""
    args = image.tile[0][3] if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    return str(args[0] if isinstance(args, tuple) else args)


def write_image(url: str, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    storage.write_bytes(url, data.getvalue())


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError("image too large") from None
    except Exception as error:
        raise ImageError("undecodable image") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("image too large")
    if min(image.size) < 1:
        raise ImageError("undecodable image")
    return image

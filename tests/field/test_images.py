"""Reports about images; tests/field/README.md names them.

Each unusual file is in a pool with a plain PNG of the pixels it should decode to. Winnow's measures of both must agree.
"""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.field.helpers import encode, index, measure, write_tar

SIZE = (80, 64)


def _scene():
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.linspace(0, 120, SIZE[1]), np.linspace(0, 120, SIZE[0]))[..., None]
    return np.clip(ramp * np.array([1.0, 0.7, 0.4]) + rng.integers(0, 15, (*SIZE[::-1], 3)), 0, 255).astype(np.uint8)


PIXELS = _scene()
SCENE = Image.fromarray(PIXELS)
GREY = np.asarray(SCENE.convert("L"))
ALPHA = np.full(GREY.shape, 255, np.uint8)
ALPHA[:20] = 0
ALPHA[20:30] = 100
BLUE = Image.new("RGB", SIZE, (0, 0, 255))
JPEG = encode(SCENE, "JPEG", quality=95)


def on_white(pixels, alpha):
    """Laid on white, by the formula of alpha compositing."""
    weight = alpha[..., None].astype(np.float64) / 255
    return Image.fromarray(np.floor(pixels * weight + 255 * (1 - weight) + 0.5).astype(np.uint8))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, color, rows, *more):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def png16(array):
    """A PNG of 16 bits a channel, which Pillow does not write in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return png(*array.shape[1::-1], 16, {3: 2, 4: 6}[array.shape[2]], rows)


def jpeg_with_xmp(packet):
    data = b"http://ns.adobe.com/xap/1.0/\0" + packet
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + JPEG[2:]


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    return encode(SCENE, "JPEG", quality=95, exif=exif)


def palette_alpha():
    """A palette PNG with an alpha for each entry, and what it shows."""
    image = SCENE.quantize(64)
    alphas = np.array([0] * 10 + [128] * 10 + [255] * 44, np.uint8)
    places = np.asarray(image)
    colors = np.array(image.getpalette()[: 64 * 3], np.uint8).reshape(64, 3)
    return encode(image, "PNG", transparency=alphas.tobytes()), on_white(colors[places], alphas[places])


def transparent_gif():
    """A GIF of 64 colours whose colour 7 is transparent, and what it shows."""
    image = SCENE.quantize(64)
    places = np.asarray(image)
    colors = np.array(image.getpalette()[: 64 * 3], np.uint8).reshape(64, 3)
    return encode(image, "GIF", transparency=7), on_white(colors[places], np.where(places == 7, 0, 255))


def decoded():
    """The JPEG's pixels."""
    return Image.open(io.BytesIO(JPEG)).convert("RGB")


QUANTIZED = SCENE.quantize(64)
RGBA = Image.fromarray(np.dstack([PIXELS, ALPHA]))
ON_WHITE = on_white(PIXELS, ALPHA)
# name: (file, extension in the tar, image that it shows)
SHOWN = {
    "EXIF twice": (encode(SCENE, "JPEG", quality=95, exif=b"Exif\0\0Exif\0\0II*\0\x08\0\0\0"), "jpg", decoded()),
    "EXIF empty": (encode(SCENE, "JPEG", quality=95, exif=b"Exif\0\0"), "jpg", decoded()),
    "EXIF cut in a PNG": (encode(SCENE, "PNG", exif=b"\0\x08\0\2\1\x12\0\3"), "png", SCENE),
    "XMP that is not UTF-8": (jpeg_with_xmp(b'<x tiff:Orientation="\xa8">'), "jpg", decoded()),
    "EXIF orientation, as open_clip reads it": (turned(), "jpg", decoded()),
    "progressive JPEG": (encode(SCENE, "JPEG", quality=95, progressive=True), "jpg", decoded()),
    "bytes after the end": (JPEG + b"<html>" * 100, "jpg", decoded()),
    "MPO": (encode(SCENE, "MPO", save_all=True, append_images=[BLUE.copy()], quality=95), "jpg", decoded()),
    "PNG called .jpg": (encode(SCENE, "PNG"), "jpg", SCENE),
    "WebP called .jpg": (encode(SCENE, "WEBP", lossless=True), "jpg", SCENE),
    "animated GIF": (
        encode(QUANTIZED, "GIF", save_all=True, append_images=[BLUE.copy()]),
        "gif",
        QUANTIZED.convert("RGB"),
    ),
    "animated WebP": (encode(SCENE, "WEBP", lossless=True, save_all=True, append_images=[BLUE.copy()]), "webp", SCENE),
    "animated PNG": (encode(SCENE, "PNG", save_all=True, append_images=[BLUE.copy()]), "png", SCENE),
    "TIFF of pages": (encode(SCENE, "TIFF", save_all=True, append_images=[BLUE.copy()]), "tif", SCENE),
    "transparent GIF": (transparent_gif()[0], "gif", transparent_gif()[1]),
    "palette with alphas": (palette_alpha()[0], "png", palette_alpha()[1]),
    "RGBA": (encode(RGBA, "PNG"), "png", ON_WHITE),
    "RGBA WebP": (encode(RGBA, "WEBP", lossless=True, exact=True), "webp", ON_WHITE),
    "grey with alpha": (
        encode(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"),
        "png",
        on_white(np.repeat(GREY[..., None], 3, 2), ALPHA),
    ),
    "16 bits of colour": (png16(PIXELS.astype(np.uint16) * 257), "png", SCENE),
    "16 bits of colour and alpha": (png16(np.dstack([PIXELS, ALPHA]).astype(np.uint16) * 257), "png", ON_WHITE),
    "one bit": (encode(Image.fromarray(GREY > 80), "PNG"), "png", Image.fromarray(np.uint8(255) * (GREY > 80))),
    "LZW TIFF": (encode(SCENE, "TIFF", compression="tiff_lzw"), "tiff", SCENE),
    "one pixel": (encode(Image.new("RGB", (1, 1), (9, 8, 7)), "BMP"), "bmp", Image.new("RGB", (1, 1), (9, 8, 7))),
}
_PNG = encode(SCENE, "PNG")
BROKEN = {
    "cut JPEG": (JPEG[:-900], "jpg"),
    "cut PNG": (_PNG[:-900], "png"),
    "PNG with a flipped bit": (_PNG[:2000] + bytes([_PNG[2000] ^ 4]) + _PNG[2001:], "png"),
    "cut WebP": (encode(SCENE, "WEBP", lossless=True)[:-900], "webp"),
    "HTML": (b"<html>404 Not Found</html>", "jpg"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "jpg"),
    "empty": (b"", "jpg"),
    "bomb": (png(30000, 30000, 1, 0, b"\0" * 3751 * 30), "png"),
    "2,000 times as wide as high": (encode(Image.new("RGB", (2000, 1)), "PNG"), "png"),
}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Measures of every file of SHOWN ("NAME"), of its plain PNG ("NAME, plain"), and of BROKEN."""
    folder, members = tmp_path_factory.mktemp("images"), []
    for i, (name, (data, ext, image)) in enumerate(SHOWN.items()):
        members += [(f"a{i:02}.{ext}", data), (f"a{i:02}.txt", name.encode())]
        members += [(f"b{i:02}.png", encode(image.convert("RGB"), "PNG")), (f"b{i:02}.txt", f"{name}, plain".encode())]
    for i, (name, (data, ext)) in enumerate(BROKEN.items()):
        members += [(f"c{i:02}.{ext}", data), (f"c{i:02}.txt", name.encode())]
    write_tar(folder / "shards" / "0.tar", members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about broken metadata
        index(folder / "shards", folder / "pool")
        return measure(folder / "pool", folder / "out", "quality,image_hash")


@pytest.mark.parametrize("name", SHOWN)
def test_an_unusual_file_is_decoded_to_what_it_shows(values, name):
    assert values[name]["entropy"] is not None
    assert values[name]["entropy"] == pytest.approx(values[f"{name}, plain"]["entropy"], abs=0.02)
    assert bin(values[name]["phash"] ^ values[f"{name}, plain"]["phash"]).count("1") <= 2


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_no_value_and_costs_no_other_sample(values, name):
    assert set(values.get(name, {}).values()) <= {None}


def test_a_cmyk_jpeg_is_not_inverted(tmp_path):
    ramp = Image.fromarray(np.repeat(np.tile(np.arange(0, 255, 4, dtype=np.uint8), (64, 1))[..., None], 3, 2))
    inverse = Image.fromarray(255 - np.asarray(ramp))
    shown = {"ramp": ramp.convert("CMYK"), "inverse": inverse}
    members = []
    for name, image in shown.items():
        kind = ("jpg", "JPEG") if image.mode == "CMYK" else ("png", "PNG")
        members += [(f"{name}.{kind[0]}", encode(image, kind[1])), (f"{name}.txt", name.encode())]
    members += [("plain.png", encode(ramp, "PNG")), ("plain.txt", b"plain")]
    write_tar(tmp_path / "shards" / "0.tar", members)
    index(tmp_path / "shards", tmp_path / "pool")
    hashes = {name: row["phash"] for name, row in measure(tmp_path / "pool", tmp_path / "out", "image_hash").items()}
    assert bin(hashes["ramp"] ^ hashes["plain"]).count("1") <= 8
    assert bin(hashes["ramp"] ^ hashes["inverse"]).count("1") >= 20


def test_what_lies_under_full_transparency_does_not_change_the_hash(tmp_path):
    members = []
    for name, hidden in (("white", 255), ("black", 0)):
        pixels = np.where(ALPHA[..., None] == 0, np.uint8(hidden), PIXELS)
        data = encode(Image.fromarray(np.dstack([pixels, ALPHA])), "PNG")
        members += [(f"{name}.png", data), (f"{name}.txt", name.encode())]
    members += [("plain.png", encode(ON_WHITE, "PNG")), ("plain.txt", b"plain")]
    write_tar(tmp_path / "shards" / "0.tar", members)
    index(tmp_path / "shards", tmp_path / "pool")
    values = measure(tmp_path / "pool", tmp_path / "out", "image_hash")
    assert values["white"] == values["black"] == values["plain"]

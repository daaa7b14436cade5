"""Decoding: every mode that Pillow writes, by values that are known without it."""

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.field.helpers import encode, index, measure, write_tar
from winnow.infra.io.images import FORMATS, ImageError, decode_image, image_size_of

RAMP = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
COLORS = np.dstack([RAMP, RAMP.T, 255 - RAMP // 2])
ALPHA = np.where(np.arange(64) < 20, 0, 255)[None].repeat(64, 0).astype(np.uint8)


def on_white(pixels, alpha=ALPHA):
    return np.where(alpha[..., None] == 0, 255, pixels)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def paletted(mode):
    image = Image.fromarray(RAMP, "L").convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(ALPHA))
    return image


PALETTE = np.dstack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)])
RGB = Image.fromarray(COLORS)
# Pillow's name of the mode: an image in it, what it shows by definition of the mode, and how far a conversion may be.
MODES = {
    "1": (Image.fromarray(RAMP > 100), grey(np.uint8(255) * (RAMP > 100)), 0),
    "L": (Image.fromarray(RAMP), grey(RAMP), 0),
    "LA": (Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]), on_white(grey(RAMP)), 0),
    "P": (paletted("P"), PALETTE, 0),
    "PA": (paletted("PA"), on_white(PALETTE), 0),
    "RGB": (RGB, COLORS, 0),
    "RGBA": (Image.fromarray(np.dstack([COLORS, ALPHA])), on_white(COLORS), 0),
    "RGBX": (RGB.convert("RGBX"), COLORS, 0),
    "CMYK": (Image.fromarray(np.dstack([255 - COLORS, 0 * RAMP]), "CMYK"), COLORS, 0),
    "YCbCr": (RGB.convert("YCbCr"), COLORS, 3),
    "LAB": (RGB.convert("LAB"), COLORS, 40),
    "I;16": (Image.fromarray(RAMP.astype(np.uint16) * 257), grey(RAMP), 0),
    "I;16B": (Image.frombytes("I;16B", (64, 64), (RAMP.astype(">u2") * 257).tobytes()), grey(RAMP), 0),
    "I": (Image.fromarray(RAMP.astype(np.int32) * 257), None, 0),
    "F": (Image.fromarray((RAMP / 255).astype(np.float32)), grey(RAMP), 0),
}
OPTIONS = {
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100},
    "JPEG": {"quality": 100, "subsampling": 0},
}
LOSSY = {"JPEG": 6, "AVIF": 6}


def written():
    """(format, mode, mode that is in the file) of all that Pillow writes and Winnow opens."""
    for kind in FORMATS:
        for mode, (image, _, _) in MODES.items():
            try:
                data = encode(image, kind, **OPTIONS.get(kind, {}))
            except (OSError, ValueError, KeyError):
                continue
            yield kind, mode, Image.open(io.BytesIO(data)).mode, data


WRITTEN = list(written())


def test_pillow_writes_what_is_meant_to_be_tested():
    found = {(kind, mode) for kind, mode, stored, _ in WRITTEN if mode == stored}
    assert found >= {("TIFF", mode) for mode in MODES} - {("TIFF", "RGBX")}
    assert found >= {("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    assert found >= {("JPEG", "CMYK"), ("JPEG2000", "I;16"), ("WEBP", "RGB"), ("GIF", "P"), ("PPM", "I"), ("BMP", "P")}


@pytest.mark.parametrize(("kind", "mode", "stored", "data"), WRITTEN, ids=[f"{k} {m}" for k, m, *_ in WRITTEN])
def test_every_mode_is_shown_as_it_is_meant(kind, mode, stored, data):
    _, truth, tolerance = MODES[mode]
    if mode == stored == "I" and kind == "TIFF":
        with pytest.raises(ImageError, match="pixel values of unknown range"):
            decode_image(data)
    elif mode == stored or (kind, mode) in {("PPM", "I"), ("PPM", "I;16")}:
        shown = np.asarray(decode_image(data)).astype(int)
        wanted = grey(RAMP) if truth is None else truth
        assert np.abs(shown - wanted).max() <= max(tolerance, LOSSY.get(kind, 0))
    elif stored in ("L", "RGB", "1", "P"):  # another mode was written: it is what Pillow makes of the file
        plain = Image.open(io.BytesIO(data))
        if not plain.has_transparency_data:
            assert np.array_equal(decode_image(data), plain.convert("RGB"))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels, depth, color, transparent):
    """A PNG of any depth with one transparent colour, by its specification; pixels [n, n] or [n, n, 3]."""
    size = pixels.shape[0]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(size, -1)]
    header = struct.pack(">IIBBBBB", size, size, depth, color, 0, 0, 0)
    key = struct.pack(f">{3 if color == 2 else 1}H", *np.atleast_1d(transparent))
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth_becomes_white(depth):
    levels = 1 << depth
    values = (np.arange(64 * 64).reshape(64, 64) * (levels // 256 or 1)) % levels
    for key in (0, levels - 1, int(values[3, 5])):
        shown = decode_image(png(values, depth, 0, key))
        whole = values >> 8 if depth == 16 else values * 255 // (levels - 1)
        assert np.array_equal(shown, grey(np.where(values == key, 255, whole)))
        assert np.array_equal(decode_image(png(values, depth, 0, key), flatten=False), grey(whole))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_becomes_white(depth):
    colors = COLORS.astype(int) * (257 if depth == 16 else 1)
    key = colors[10, 3]
    shown = np.asarray(decode_image(png(colors, depth, 2, key)))
    assert np.array_equal(shown, np.where((colors == key).all(-1, keepdims=True), 255, COLORS))
    assert (shown[10, 3] == 255).all()


def test_the_same_picture_with_alpha_and_with_a_transparent_colour():
    """RGBA, RGB and L files whose left half is transparent; black without it."""
    hole = np.where(ALPHA[..., None] == 0, 0, np.full((64, 64, 3), (200, 30, 30))).astype(np.uint8)
    files = [
        encode(Image.fromarray(np.dstack([hole, ALPHA])), "PNG"),
        encode(Image.fromarray(hole), "PNG", transparency=(0, 0, 0)),
        encode(Image.fromarray(hole[..., 0]), "PNG", transparency=0),
    ]
    for data in files:
        assert (np.asarray(decode_image(data))[:, :20] == 255).all()
        assert (np.asarray(decode_image(data, flatten=False))[:, :20] == 0).all()
    assert np.array_equal(decode_image(files[0]), decode_image(files[1]))


def test_a_grey_gif_has_a_transparent_colour_as_well():
    image = Image.fromarray(RAMP)
    image.putpalette([v for i in range(256) for v in (i, i, i)])
    data = encode(image, "GIF", transparency=9, optimize=False)
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert np.array_equal(decode_image(data), grey(np.where(RAMP == 9, 255, RAMP)))


def tiff(values, bits, photometric, sample=1):
    """An uncompressed TIFF of one channel, by its specification."""
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(int)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    size = values.shape[0]
    tags = [(256, size), (257, size), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, size)]
    tags += [(279, len(data)), (339, sample)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (tiff(RAMP.astype(np.uint16) * 16, 12, 1), RAMP),
        (tiff(RAMP.astype("<u2") * 257, 16, 0), 255 - RAMP),  # white is 0
        (tiff((RAMP / 255).astype("<f4"), 32, 1, 3), RAMP),
    ],
)
def test_tiffs_of_other_depths(data, shown):
    assert np.array_equal(decode_image(data), grey(shown))


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP.astype("<f4"), 32, 1, 3),
        tiff(np.where(RAMP > 3, 0.5, np.nan).astype("<f4"), 32, 1, 3),
        tiff(RAMP.astype("<u4"), 32, 1, 1),
        tiff(RAMP.astype("<i2"), 16, 1, 2),
    ],
)
def test_values_of_unknown_range_are_no_image(data):
    with pytest.raises(ImageError, match="pixel values of unknown range"):
        decode_image(data)


def test_the_ramps_of_a_pool_have_equal_measures_or_a_reason(tmp_path):
    """Grey in 8 and 16 bits and as floats."""
    ramp = np.random.default_rng(0).uniform(0, 1, (64, 64)) * np.linspace(0, 255, 64 * 64).reshape(64, 64)
    files = {
        "png, 8": ("png", ramp.astype(np.uint8)),
        "png, 16": ("png", (ramp * 257).astype(np.uint16)),
        "tiff, 16": ("tiff", (ramp * 257).astype(np.uint16)),
        "tiff, float": ("tiff", (ramp / 255).astype(np.float32)),
        "tiff, float of 0 to 255": ("tiff", ramp.astype(np.float32)),
    }
    members = []
    for i, (name, (ext, pixels)) in enumerate(files.items()):
        members += [(f"{i}.{ext}", encode(Image.fromarray(pixels), ext.upper())), (f"{i}.txt", name.encode())]
    write_tar(tmp_path / "shards" / "0.tar", members)
    index(tmp_path / "shards", tmp_path / "pool")
    values = measure(tmp_path / "pool", tmp_path / "out", "quality,image_hash")
    assert set(values.pop("tiff, float of 0 to 255").values()) == {None}
    first = values["png, 8"]
    for row in values.values():
        assert row["entropy"] == pytest.approx(first["entropy"], abs=0.02)
        assert bin(row["phash"] ^ first["phash"]).count("1") <= 2


def test_the_orientation_is_that_of_the_file():
    """As open_clip and DataComp read images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(RGB, "PNG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert np.array_equal(decode_image(data), COLORS)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICNS", "IM", "SGI"])
def test_other_formats_are_not_opened_whatever_the_file_is_called(kind):
    """Pillow would start Ghostscript for an EPS."""
    data = encode(RGB, kind)
    for read in (image_size_of, decode_image):
        with pytest.raises(ImageError, match="undecodable image"):
            read(data)


def test_broken_metadata_is_not_reported_to_the_terminal(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(
        encode(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\0\0\0\xff\0\0\0")
    )
    (tmp_path / "palette.png").write_bytes(encode(paletted("P"), "PNG", transparency=bytes(range(256))))
    code = "import sys; from winnow.infra.io.images import decode_image\n"
    code += "for path in sys.argv[1:]: print(decode_image(open(path, 'rb').read(), False).size)"
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        for path in tmp_path.iterdir():
            image = Image.open(path)
            image.getexif(), image.convert("RGB")
    assert reported
    done = subprocess.run([sys.executable, "-c", code, *tmp_path.iterdir()], capture_output=True, text=True, check=True)
    assert done.stdout.count("(64, 64)") == 2 and done.stderr == ""

"""The demo's images: objects of a kind, colour and pattern in front of a scene; and charts and pages.

Pillow draws on cached masks and textures, so one core draws well over a thousand images a second. All randomness comes
from the given `random.Random`: the same generator state gives the same image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (240, 132, 28),
    "yellow": (244, 212, 40),
    "green": (44, 150, 60),
    "blue": (40, 84, 210),
    "purple": (128, 52, 168),
    "pink": (246, 138, 180),
    "brown": (122, 74, 36),
    "black": (26, 26, 28),
    "white": (244, 244, 240),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SCENES = ("paper", "sunset", "noise", "grass", "night", "bricks", "sea", "wood")

_HABIT, _GRID, _VARIANTS = 0.75, 256, 12
MAX_SIDE = _TEXTURE = 160


def _ring(n: int, radius: float, turn: float = -90.0, centre: tuple[float, float] = (0.5, 0.5)) -> list:
    angles = [math.radians(turn + 360 * i / n) for i in range(n)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _star(points: int, inner: float) -> list:
    outer, dents = _ring(points, 0.5, centre=(0.5, 0.53)), _ring(points, inner, -90 + 180 / points, (0.5, 0.53))
    return [p for pair in zip(outer, dents, strict=True) for p in pair]


def _heart() -> list:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
    return [(0.5 + 0.03 * 16 * math.sin(t) ** 3, 0.46 - 0.03 * y) for t, y in zip(turns, heights, strict=True)]


# A silhouette is a list of strokes on the unit square: (figure, points, fill). Fill 0 cuts a hole.
_Stroke = tuple[str, list, int]
_KINDS: dict[str, list[_Stroke]] = {
    "circle": [("ellipse", [(0.04, 0.04), (0.96, 0.96)], 1)],
    "triangle": [("polygon", [(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)], 1)],
    "star": [("polygon", _star(5, 0.2), 1)],
    "heart": [("polygon", _heart(), 1)],
    "moon": [("ellipse", [(0.05, 0.03), (0.97, 0.97)], 1), ("ellipse", [(0.36, -0.02), (1.16, 0.8)], 0)],
    "house": [
        ("polygon", [(0.5, 0.02), (0.99, 0.46), (0.01, 0.46)], 1),
        ("polygon", [(0.13, 0.44), (0.87, 0.44), (0.87, 0.97), (0.13, 0.97)], 1),
        ("polygon", [(0.42, 0.64), (0.58, 0.64), (0.58, 0.97), (0.42, 0.97)], 0),
    ],
    "tree": [
        ("polygon", [(0.5, 0.0), (0.78, 0.38), (0.22, 0.38)], 1),
        ("polygon", [(0.5, 0.22), (0.88, 0.76), (0.12, 0.76)], 1),
        ("polygon", [(0.42, 0.74), (0.58, 0.74), (0.58, 1.0), (0.42, 1.0)], 1),
    ],
    "fish": [
        ("ellipse", [(0.02, 0.24), (0.76, 0.76)], 1),
        ("polygon", [(0.64, 0.5), (0.99, 0.2), (0.99, 0.8)], 1),
        ("ellipse", [(0.14, 0.38), (0.24, 0.48)], 0),
    ],
    "cat": [
        ("ellipse", [(0.08, 0.2), (0.92, 0.98)], 1),
        ("polygon", [(0.1, 0.02), (0.46, 0.28), (0.12, 0.56)], 1),
        ("polygon", [(0.9, 0.02), (0.54, 0.28), (0.88, 0.56)], 1),
        ("ellipse", [(0.26, 0.44), (0.4, 0.6)], 0),
        ("ellipse", [(0.6, 0.44), (0.74, 0.6)], 0),
        ("polygon", [(0.43, 0.68), (0.57, 0.68), (0.5, 0.78)], 0),
    ],
    "car": [
        ("polygon", [(0.01, 0.48), (0.99, 0.48), (0.99, 0.74), (0.01, 0.74)], 1),
        ("polygon", [(0.2, 0.5), (0.32, 0.24), (0.7, 0.24), (0.84, 0.5)], 1),
        ("polygon", [(0.36, 0.3), (0.48, 0.3), (0.48, 0.46), (0.3, 0.46)], 0),
        ("polygon", [(0.54, 0.3), (0.66, 0.3), (0.74, 0.46), (0.54, 0.46)], 0),
        ("ellipse", [(0.14, 0.62), (0.38, 0.86)], 1),
        ("ellipse", [(0.62, 0.62), (0.86, 0.86)], 1),
    ],
    "flower": [
        *[("ellipse", [(x - 0.18, y - 0.18), (x + 0.18, y + 0.18)], 1) for x, y in _ring(6, 0.31)],
        ("ellipse", [(0.37, 0.37), (0.63, 0.63)], 0),
    ],
    "boat": [
        ("polygon", [(0.02, 0.68), (0.98, 0.68), (0.8, 0.94), (0.2, 0.94)], 1),
        ("polygon", [(0.5, 0.03), (0.5, 0.62), (0.9, 0.62)], 1),
        ("polygon", [(0.45, 0.16), (0.45, 0.62), (0.14, 0.62)], 1),
    ],
}
KINDS = tuple(_KINDS)
# As in reality, most things have typical colours and scenes; the other draws are uniform.
_USUAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "circle": (("red", "white", "black"), ("wood", "noise")),
    "triangle": (("yellow", "red", "purple"), ("bricks", "paper")),
    "star": (("yellow", "white"), ("night", "paper")),
    "heart": (("red", "pink"), ("paper", "sunset")),
    "moon": (("white", "yellow"), ("night", "sunset")),
    "house": (("brown", "white", "red"), ("grass", "bricks")),
    "tree": (("green", "brown"), ("grass", "sunset")),
    "fish": (("orange", "blue"), ("sea",)),
    "cat": (("black", "orange", "brown"), ("wood", "noise")),
    "car": (("red", "blue", "black"), ("bricks", "noise")),
    "flower": (("pink", "purple", "yellow"), ("grass", "paper")),
    "boat": (("white", "brown", "red"), ("sea", "sunset")),
}


@functools.cache
def _mask(kind: str, size: int) -> Image.Image:
    """The silhouette of a kind, L, [size, size]."""
    image = Image.new("L", (_GRID, _GRID))
    draw = ImageDraw.Draw(image)
    for figure, points, fill in _KINDS[kind]:
        getattr(draw, figure)([(x * _GRID, y * _GRID) for x, y in points], fill=255 * fill)
    return image.resize((size, size), Image.Resampling.BOX)


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng([*b"/".join(str(part).encode() for part in parts)])


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


@functools.cache
def _pattern(pattern: str, variant: int) -> Image.Image:
    """Mask of the second colour, L, [160, 160]."""
    rng = _generator("pattern", pattern, variant)
    y, x = np.mgrid[:_TEXTURE, :_TEXTURE].astype(np.float64)
    turn = rng.uniform(0, np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period = rng.uniform(9, 15)
    if pattern == "striped":
        values = np.sin(2 * np.pi * u / period) * 400
    elif pattern == "dotted":
        du, dv = (u % period) / period - 0.5, (v % period) / period - 0.5
        values = (0.3 - np.hypot(du, dv)) * period * 250
    else:
        values = np.sin(2 * np.pi * u / period / 1.6) * np.sin(2 * np.pi * v / period / 1.6) * 900
    return _image(values + 128)


@functools.cache
def _texture(scene: str, variant: int) -> Image.Image:
    """A background to crop from, RGB, [160, 160]."""
    rng = _generator("scene", scene, variant)
    n = _TEXTURE
    y, x = np.mgrid[:n, :n] / n
    grain = rng.normal(0, 1, (n, n, 1))

    def blend(a: tuple, b: tuple, weight: np.ndarray) -> np.ndarray:
        weight = np.clip(weight, 0, 1)[:, :, None]
        return np.array(a) * (1 - weight) + np.array(b) * weight

    if scene == "paper":
        return _image(rng.uniform(175, 250) + rng.uniform(-12, 12, 3) + 3 * grain)
    if scene == "sunset":
        return _image(blend((90, 50, 130), (255, 170, 90), y * 1.1 + rng.uniform(-0.2, 0.2)) + 3 * grain)
    if scene == "noise":
        static = rng.normal(0, 1, (n, n, rng.choice([1, 3])))
        return _image(rng.uniform(90, 160) + rng.uniform(30, 60) * static + np.zeros(3))
    if scene == "grass":
        blades = np.cumsum(rng.normal(0, 1, (n, n)), axis=0)
        blades = (blades - np.roll(blades, 9, axis=0)) / 6
        return _image(blend((30, 90, 30), (120, 180, 70), 0.5 + 0.4 * blades))
    if scene == "night":
        sky = blend((8, 10, 36), (30, 34, 80), y + rng.uniform(-0.3, 0.3))
        return _image(np.where(rng.random((n, n, 1)) > 0.985, rng.uniform(150, 255, (n, n, 1)), sky))
    if scene == "bricks":
        height, width = rng.integers(9, 13), rng.integers(20, 28)
        rows, columns = np.mgrid[:n, :n]
        course = rows // height
        shift = columns + (course % 2) * (width // 2)
        joint = ((rows % height) < 2) | ((shift % width) < 2)
        tone = rng.normal(0, 14, (n, n))[course, shift // width]
        wall = np.array([150, 72, 56]) + tone[:, :, None] + 5 * grain
        return _image(np.where(joint[:, :, None], 190.0, wall))
    if scene == "sea":
        phase = rng.uniform(0, 6, 3)
        waves = np.sin(y * rng.uniform(60, 90) + 3 * np.sin(x * 9 + phase[0]) + phase[1])
        return _image(blend((20, 80, 140), (110, 190, 210), 0.45 + 0.35 * waves) + 4 * grain)
    rings = np.sin((x + 0.08 * np.sin(y * rng.uniform(4, 9) + rng.uniform(0, 6))) * rng.uniform(60, 110))
    return _image(blend((120, 78, 40), (190, 140, 90), 0.5 + 0.3 * rings) + 6 * grain)


@functools.cache
def _grain(variant: int) -> Image.Image:
    return _image(_generator("grain", variant).normal(128, 60, (_TEXTURE, _TEXTURE, 3)))


@dataclass(frozen=True)
class Thing:
    """An object: one of KINDS, COLOURS and PATTERNS. `scale` is its size as a fraction of the image's short side,
    (x, y) its centre as fractions of width and height."""

    kind: str
    colour: str
    pattern: str
    scale: float
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """The content of an image: one or two things in one of SCENES; `relation` is that of the first to the second."""

    things: tuple[Thing, ...]
    scene: str
    relation: str = ""


_RELATIONS = {"above": (0.5, 0.27, 0.5, 0.74), "below": (0.5, 0.74, 0.5, 0.27)}
_RELATIONS |= {"left of": (0.26, 0.5, 0.74, 0.5), "right of": (0.74, 0.5, 0.26, 0.5)}


def random_view(rng: Random, two: float = 0.2, **fixed: str) -> View:
    """Draw the content of an image. `fixed` may set kind, colour and pattern of the first thing, and the scene.
    `two` is the probability of a second thing."""

    def thing(x: float, y: float, scale: float, **fixed: str) -> Thing:
        kind = fixed.get("kind") or rng.choice(KINDS)
        usual = _USUAL[kind][0] if rng.random() < _HABIT else tuple(COLOURS)
        colour = fixed.get("colour") or rng.choice(usual)
        pattern = fixed.get("pattern") or (rng.choice(PATTERNS) if rng.random() < 0.5 else "plain")
        return Thing(kind, colour, pattern, scale, x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05))

    scene, relation = fixed.pop("scene", None), ""
    if rng.random() < two:
        relation = rng.choice(tuple(_RELATIONS))
        x0, y0, x1, y1 = _RELATIONS[relation]
        things = [thing(x0, y0, rng.uniform(0.36, 0.48), **fixed), thing(x1, y1, rng.uniform(0.36, 0.48))]
    else:
        things = [thing(rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55), rng.uniform(0.6, 0.95), **fixed)]
    usual = _USUAL[things[0].kind][1] if rng.random() < _HABIT else SCENES
    return View(tuple(things), scene or rng.choice(usual), relation)


def _shade(rng: Random, colour: Colour, sem: int) -> Colour:
    light = rng.randint(-sem, sem)
    red, green, blue = (min(255, max(0, value + light + rng.randint(-sem, sem))) for value in colour)
    return red, green, blue


def paint(rng: Random, view: View, width: int, height: int) -> Image.Image:
    """Paint a view. RGB, [height, width]; width and height at most MAX_SIDE."""
    variant = rng.randrange(_VARIANTS)
    left, top = rng.randint(0, _TEXTURE - width), rng.randint(0, _TEXTURE - height)
    if view.scene in ("sunset", "night"):  # the sky's colours run from top to bottom
        image = _texture(view.scene, variant).resize((width, height), Image.Resampling.BILINEAR)
    else:
        image = _texture(view.scene, variant).crop((left, top, left + width, top + height))
    for thing in view.things:
        _place(rng, image, thing)
    return _develop(rng, image)


def _place(rng: Random, image: Image.Image, thing: Thing) -> None:
    side = max(10, round(thing.scale * min(image.size)))
    source = 96 if side > 40 else 48
    turn, flip = math.radians(rng.uniform(-15, 15)), rng.choice((-1, 1))
    cos, sin = math.cos(turn) * source / side, math.sin(turn) * source / side
    middle = side / 2
    shift_x, shift_y = source / 2 - flip * (cos + sin) * middle, source / 2 - (cos - sin) * middle
    affine = (flip * cos, flip * sin, shift_x, -sin, cos, shift_y)
    mask = _mask(thing.kind, source).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    colour = _shade(rng, COLOURS[thing.colour], 16)
    fill = Image.new("RGB", (side, side), colour)
    if thing.pattern != "plain":
        light = sum(colour) > 330
        second = _shade(rng, (70, 70, 70) if light else (215, 215, 215), 20)
        at = rng.randint(0, _TEXTURE - side), rng.randint(0, _TEXTURE - side)
        pattern = _pattern(thing.pattern, rng.randrange(_VARIANTS)).crop((*at, at[0] + side, at[1] + side))
        fill.paste(second, (0, 0), pattern)
    image.paste(fill, (round(thing.x * image.width - middle), round(thing.y * image.height - middle)), mask)


def _develop(rng: Random, image: Image.Image) -> Image.Image:
    """Add the light, contrast, blur and grain of cameras and resizing."""
    gain, lift = rng.uniform(0.75, 1.2), rng.uniform(-18, 18)
    image = image.point([min(255, max(0, round(value * gain + lift))) for value in range(256)] * 3)
    finish = rng.random()
    if finish < 0.25:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.4, 1.1)))
    elif finish < 0.5:
        left, top = rng.randint(0, _TEXTURE - image.width), rng.randint(0, _TEXTURE - image.height)
        grain = _grain(rng.randrange(_VARIANTS)).crop((left, top, left + image.width, top + image.height))
        image = Image.blend(image, grain, rng.uniform(0.05, 0.2))
    return image


def _bars(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    n = rng.randint(4, 9)
    for i in range(n):
        top = height * rng.uniform(0.15, 0.85)
        draw.rectangle((width * (i + 0.2) / n, top, width * (i + 0.8) / n, height * 0.92), fill=_ink(rng))
    draw.line((2, height * 0.92, width - 2, height * 0.92), fill=(40, 40, 40))


def _lines(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for line in range(1, 6):
        draw.line((0, height * line / 6, width, height * line / 6), fill=(205, 205, 205))
    for _ in range(rng.randint(1, 3)):
        y, points = rng.uniform(0.3, 0.7), []
        for i in range(12):
            y = min(0.95, max(0.05, y + rng.uniform(-0.13, 0.13)))
            points.append((width * i / 11, height * y))
        draw.line(points, fill=_ink(rng), width=2)


def _pie(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    side, start = min(width, height) - 8, rng.uniform(0, 360)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    for _ in range(rng.randint(3, 6)):
        stop = start + rng.uniform(30, 110)
        draw.pieslice(box, start, stop, fill=_ink(rng))
        start = stop


def _page(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for y in range(6, height - 4, 4):
        x = 5.0
        while x < width - 8 and rng.random() > 0.04:
            word = rng.uniform(2, 9)
            draw.line((x, y, min(x + word, width - 5), y), fill=(60, 60, 60))
            x += word + 2


def _table(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    rows, columns = rng.randint(5, 9), rng.randint(3, 5)
    draw.rectangle((0, 0, width, height / rows), fill=_ink(rng))
    for i in range(rows):
        draw.line((0, height * i / rows, width, height * i / rows), fill=(150, 150, 150))
        for j in range(columns):
            x, y = width * j / columns, height * (i + 0.5) / rows
            draw.line((x + 3, y, x + 3 + rng.uniform(3, width / columns - 4), y), fill=(70, 70, 70))
            draw.line((x, 0, x, height), fill=(150, 150, 150))


def _code(rng: Random, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    side = min(width, height) // 21
    for i in range(19):
        for j in range(19):
            if rng.random() < 0.5:
                box = side * (i + 1), side * (j + 1), side * (i + 2) - 1, side * (j + 2) - 1
                draw.rectangle(box, fill=(15, 15, 15))


def _ink(rng: Random) -> Colour:
    return rng.randint(30, 220), rng.randint(30, 220), rng.randint(30, 220)


_PAPERS: dict[str, Callable[[Random, ImageDraw.ImageDraw, int, int], None]] = {
    "bar chart": _bars,
    "line chart": _lines,
    "pie chart": _pie,
    "page": _page,
    "table": _table,
    "code": _code,
}
PAPERS = tuple(_PAPERS)


def paint_paper(rng: Random, paper: str, width: int, height: int) -> Image.Image:
    """Paint one of PAPERS: images that no evaluation set has. RGB, [height, width]."""
    light = rng.randint(225, 255)
    image = Image.new("RGB", (width, height), (light, light, light))
    _PAPERS[paper](rng, ImageDraw.Draw(image), width, height)
    return _develop(rng, image)

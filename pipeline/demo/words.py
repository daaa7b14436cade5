"""The demo's captions, in the style of the web: careful ones, advertisements, incomplete ones."""

from __future__ import annotations

import re
from random import Random

from winnow.pipeline.demo.draw import Thing, View

# The first word is the most common one and gets half of the draws.
KIND_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "round shape", "ball"),
    "triangle": ("triangle", "pyramid", "three-sided shape"),
    "star": ("star", "five-pointed star"),
    "heart": ("heart", "love heart", "valentine"),
    "moon": ("moon", "crescent moon", "crescent"),
    "house": ("house", "cottage", "home", "little hut"),
    "tree": ("tree", "fir tree", "pine"),
    "fish": ("fish", "trout", "little fish"),
    "cat": ("cat", "kitten", "kitty"),
    "car": ("car", "automobile", "hatchback"),
    "flower": ("flower", "blossom", "daisy"),
    "boat": ("boat", "sailing boat", "ship"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet", "cherry red"),
    "orange": ("orange", "tangerine", "amber"),
    "yellow": ("yellow", "lemon yellow", "golden"),
    "green": ("green", "emerald", "leaf green"),
    "blue": ("blue", "navy", "royal blue", "cobalt"),
    "purple": ("purple", "violet", "lilac"),
    "pink": ("pink", "rose", "salmon pink"),
    "brown": ("brown", "chocolate brown", "tan"),
    "black": ("black", "jet black", "dark"),
    "white": ("white", "ivory", "snow white"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("", "", "", "plain", "solid"),
    "striped": ("striped", "stripy", "lined"),
    "dotted": ("dotted", "polka dot", "spotted"),
    "checkered": ("checkered", "chequered", "checked"),
}
# Scenes as class names, and as phrases of captions.
SCENE_NAMES: dict[str, str] = {
    "paper": "plain paper",
    "sunset": "a sunset sky",
    "noise": "static noise",
    "grass": "green grass",
    "night": "the night sky",
    "bricks": "a brick wall",
    "sea": "the sea",
    "wood": "wooden boards",
}
SCENE_WORDS: dict[str, tuple[str, ...]] = {
    "paper": ("on plain paper", "on a plain background", "on white", "isolated on plain paper"),
    "sunset": ("against a sunset sky", "at sunset", "in the evening sky"),
    "noise": ("on static noise", "on a noisy background", "on a grainy screen"),
    "grass": ("on green grass", "in the grass", "on the lawn"),
    "night": ("in the night sky", "at night", "under the stars"),
    "bricks": ("on a brick wall", "painted on a brick wall", "in front of bricks"),
    "sea": ("by the sea", "on the sea", "over the waves", "on blue water"),
    "wood": ("on wooden boards", "on a wooden table", "carved in wood"),
}
_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "left of": ("to the left of", "left of", "beside"),
    "right of": ("to the right of", "right of", "next to"),
}
# Templates and words are divided by "|" or a new line.
_TEMPLATES = """
{thing} {scene} | {thing} {scene} | a picture of {thing} {scene} | a drawing of {thing} {scene}
an illustration of {thing} {scene} | photo: {thing} {scene} | here is {thing} {scene}
we saw {thing} {scene} last summer | my daughter drew {thing} {scene} | {thing} {scene}, free clip art
{thing} {scene} - stock illustration {number} | {thing} sticker {scene}, only ${price}
poster of {thing} {scene} for the nursery | {scene}: {thing} | {thing} {scene} #{kind} #{tag}
greeting card with {thing} | {thing} | how to draw {thing} step by step | {thing} vector icon, ${price}
the story of {thing} {scene}
"""
_TAGS = ("art", "design", "kids", "cute", "drawing", "handmade", "icon")
_PLACES = "the northern region | our online shop | the city council | all branches | the school | the annual report"
_MATTERS = "quarterly sales | monthly rainfall | survey answers | website visits | energy use | exam results"
_PAPER_TEMPLATES: dict[str, str] = {
    "bar chart": """Bar chart of {matter} for {place}, {year} | {matter} in {year} shown as bars
Figure {n}: {matter} by month""",
    "line chart": """Line graph showing {matter} since {year} | Trend of {matter} for {place}
{matter} {year} forecast line chart""",
    "pie chart": "Pie chart: {matter} of {place} | Share of {matter} in {year} | Breakdown of {matter}, {place}",
    "page": """Page {n} of the {year} notes on {matter} | Scanned letter about {matter} from {place}
Read the full text on {matter} (PDF)""",
    "table": """Table {n}. {matter} for {place} in {year} | Spreadsheet of {matter}
Price list and {matter}, updated {year}""",
    "code": "Scan this code to see {matter} | QR code for {place} | Ticket code {n}{year}, please keep it safe",
}


def _pick(rng: Random, phrases: str) -> str:
    return rng.choice(re.split(r" \| |\n", phrases.strip()))


def _word(rng: Random, words: tuple[str, ...]) -> str:
    return words[0] if rng.random() < 0.5 else rng.choice(words)


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(rng: Random, thing: Thing) -> str:
    """ "a small striped red star", or a part of it."""
    size = ""
    if rng.random() < 0.4:
        size = "small" if thing.scale < 0.55 else "big" if thing.scale > 0.7 else ""
    colour = _word(rng, COLOUR_WORDS[thing.colour]) if rng.random() < 0.8 else ""
    pattern = _word(rng, PATTERN_WORDS[thing.pattern]) if rng.random() < 0.7 else ""
    kind = _word(rng, KIND_WORDS[thing.kind]) if rng.random() < 0.92 else rng.choice(("shape", "thing", "picture"))
    if thing.pattern != "plain" and pattern and rng.random() < 0.25:
        marks = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}[thing.pattern]
        return _article(" ".join(filter(None, (size, colour, kind)))) + f" with {marks}"
    words = [pattern, colour] if rng.random() < 0.5 else [colour, pattern]
    return _article(" ".join(filter(None, (size, *words, kind))))


def describe(rng: Random, view: View) -> str:
    """A caption of the view; its words, and what it omits, are drawn."""
    thing = _phrase(rng, view.things[0])
    if len(view.things) == 2:
        thing = f"{thing} {_word(rng, _RELATION_WORDS[view.relation])} {_phrase(rng, view.things[1])}"
    text = _pick(rng, _TEMPLATES).format(
        thing=thing,
        scene=_word(rng, SCENE_WORDS[view.scene]) if rng.random() < 0.85 else "",
        kind=KIND_WORDS[view.things[0].kind][0],
        tag=rng.choice(_TAGS),
        number=rng.randint(10000, 99999),
        price=f"{rng.randint(1, 29)}.99",
    )
    return _finish(rng, text)


def describe_paper(rng: Random, paper: str) -> str:
    """A caption for one of `draw.PAPERS`."""
    text = _pick(rng, _PAPER_TEMPLATES[paper]).format(
        matter=_pick(rng, _MATTERS), place=_pick(rng, _PLACES), year=rng.randint(1998, 2023), n=rng.randint(1, 40)
    )
    return _finish(rng, text)


def _finish(rng: Random, text: str) -> str:
    text = " ".join(text.split()).replace(" ,", ",").removeprefix(": ").strip(" :-")
    style = rng.random()
    if style < 0.5:
        text = text[0].upper() + text[1:]
    elif style < 0.6:
        text = text.title()
    return text + ("." if rng.random() < 0.3 and text[-1].isalpha() else "")

"""Noise in captions and images. Everything is a pure function of uniform draws."""

from __future__ import annotations

import functools
import io
import math
import re
from itertools import product

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

# Uniform draws in [0, 1) that an image's alteration may use.
DRAWS = 4
Draws = tuple[float, ...]

# A paragraph for each language: templates of a sentence (with "{}"), and nouns for them, divided by "|".
_LANGUAGES = """
Wir haben {} gestern auf dem Markt gesehen | Hier gibt es {} zu einem günstigen Preis
{} im Garten meiner Großmutter | Ein altes Foto zeigt {} am Fluss
die Katze | das rote Auto | die schöne Blume | das kleine Haus | die neue Lampe | das Fahrrad | die Kirche
das Boot

Nous avons vu {} hier soir au marché | Achetez {} à petit prix dans notre boutique
{} dans le jardin de ma grand-mère | Une vieille photo montre {} près de la rivière
le chat | la voiture rouge | la belle fleur | la petite maison | la nouvelle lampe | le vélo | l'église | le bateau

Ayer vimos {} en el mercado del pueblo | Compre {} a buen precio en nuestra tienda | {} en el jardín de mi abuela
Una foto antigua muestra {} junto al río
el gato | el coche rojo | la flor bonita | la casa pequeña | la lámpara nueva | la bicicleta | la iglesia
el barco

Ieri abbiamo visto {} al mercato del paese | Compra {} a un prezzo conveniente nel nostro negozio
{} nel giardino di mia nonna | Una vecchia foto mostra {} vicino al fiume
il gatto | la macchina rossa | il bel fiore | la piccola casa | la nuova lampada | la bicicletta | la chiesa
la barca

На этой фотографии хорошо видно: {} | В нашем магазине продаётся {} по низкой цене | {} в саду моей бабушки летом
Вчера у реки нам встретился такой вид: {}
рыжий кот | красная машина | красивый цветок | маленький дом | новая лампа | старый велосипед | белая церковь
лодка

我们昨天在市场上看到了{} | 本店低价出售{}，欢迎选购 | 奶奶的花园里有{} | 这张老照片里是河边的{}
一只猫 | 红色的汽车 | 美丽的花 | 小房子 | 新台灯 | 旧自行车 | 白色的教堂 | 一条船

昨日、市場で{}を見ました | 当店では{}を安く販売しています | おばあさんの庭にある{}です
この古い写真には川辺の{}が写っています
猫 | 赤い車 | きれいな花 | 小さな家 | 新しいランプ | 古い自転車 | 白い教会 | 小さな船

رأينا {} أمس في السوق | اشتر {} بسعر منخفض من متجرنا | {} في حديقة جدتي | تظهر صورة قديمة {} بجانب النهر
القطة | السيارة الحمراء | الزهرة الجميلة | البيت الصغير | المصباح الجديد | الدراجة | الكنيسة | القارب
"""
_FILE_NAMES = """
IMG_{:04d}.JPG DSC{:05d}.jpg DSC_{:04d}.JPG P10{:05d}.JPG image{:03d}.png IMG-20170823-WA{:04d}.jpg
Screenshot_2019-04-11-{:06d}.png product_{:05d}_large.jpg {:08x}_800x600.jpg s-l1600.jpg s-l500.jpg photo.jpg
"""
_MARKS = ("SAMPLE", "stock photo", "© preview", "DO NOT COPY")


@functools.cache
def foreign_sentences() -> tuple[str, ...]:
    """All sentences that `foreign_sentence` draws from: 8 languages, 32 each."""
    languages = [re.split(r" \| |\n", paragraph) for paragraph in _LANGUAGES.strip().split("\n\n")]
    sentences = [
        template.format(noun)
        for phrases in languages
        for template, noun in product(
            [phrase for phrase in phrases if "{}" in phrase], [phrase for phrase in phrases if "{}" not in phrase]
        )
    ]
    return tuple(sentence[0].upper() + sentence[1:] for sentence in sentences)


def foreign_sentence(at: float) -> str:
    """The sentence at a position in [0, 1)."""
    return foreign_sentences()[int(at * len(foreign_sentences()))]


def file_name(at: float) -> str:
    """A file name in the style of cameras, phones and shops, for a position in [0, 1)."""
    names = _FILE_NAMES.split()
    position = at * len(names)
    return names[int(position)].format(int(position % 1 * 10_000))


def near_duplicates(image: Image.Image, draws: Draws) -> Image.Image:
    """Up to 5 % cropped off each edge, brightness changed by at most 12 %. Size as before."""
    width, height = image.size
    left, top = (round(draw * 0.05 * side) for draw, side in zip(draws, image.size, strict=False))
    right, bottom = width - round(draws[2] * 0.05 * width), height - round(draws[3] * 0.05 * height)
    image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return ImageEnhance.Brightness(image).enhance(0.88 + 0.24 * draws[0])


def tiny(image: Image.Image, draws: Draws) -> Image.Image:
    """Shrunk to 8 to 14 pixels on the short side (or fewer, if it has no more)."""
    short = min(image.size)
    target = min(short, 8 + int(draws[0] * 7))
    width, height = (max(1, round(side * target / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def extreme_aspect(image: Image.Image, draws: Draws) -> Image.Image:
    """A strip along the longer side, 4 to 8 times as long as wide."""
    long, short = max(image.size), min(image.size)
    wanted = round(long / (4 + 4 * draws[0]))
    strip = max(1, min(short, max(math.ceil(long / 8), min(wanted, long // 4))))
    at = int(draws[1] * (short - strip + 1))
    if image.width >= image.height:
        return image.crop((0, at, long, at + strip))
    return image.crop((at, 0, at + strip, long))


def watermark(image: Image.Image, draws: Draws) -> Image.Image:
    """A word drawn over the image in three rows, semi-transparent, white or black."""
    word = _MARKS[int(draws[0] * len(_MARKS))]
    tone = 255 if draws[1] < 0.7 else 0
    layer = Image.new("RGBA", image.size, (tone, tone, tone, 0))
    draw = ImageDraw.Draw(layer)
    font = ImageFont.load_default(max(8, image.width // 6))
    for row in range(3):
        shift = ((draws[2] + row / 3) % 1 - 0.5) * 0.3
        position = image.width * (0.05 + shift), image.height * (row + 0.25) / 3
        draw.text(position, word, fill=(tone, tone, tone, 150), font=font)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def encode(image: Image.Image, draws: Draws) -> bytes:
    """As JPEG of a quality between 70 and 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70 + int(draws[3] * 21))
    return buffer.getvalue()

"""The glyph bank: every subject once per font, weight or variant, as small coverage maps."""

from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from examples.mini_clip import captions as c

SIDE: Final = 34  # pixels; glyphs and shapes fill 32 of them, leaving an empty edge
_DRAWN: Final = 64  # pixels; glyphs are drawn and thickened at this size, then resized to 32

FONTS: Final = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral",
    "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmss10", "cmtt10",
    "cmb10", "cmti10",
)  # fmt: skip
_THIN, _BOLD = 3.4, 6.4  # maximum and minimum stroke widths of thin and bold, in pixels of 32


class GlyphBank(NamedTuple):
    """Coverage u8[M, 34, 34], and each glyph's kind, subject, number and weight, i64[M]."""

    coverage: NDArray[np.uint8]
    kind: c.Rows
    subject: c.Rows
    number: c.Rows
    weight: c.Rows


@cache
def glyph_bank() -> GlyphBank:
    """Draw every glyph, with the fonts of Pillow and matplotlib on every machine."""
    coverage: list[NDArray[np.uint8]] = []
    labels: list[tuple[int, int, int, int]] = []

    def add(image: NDArray[np.uint8], kind: int, index: int, count: int, weight: int) -> None:
        coverage.append(image)
        labels.append((kind, c.FIRST_SUBJECT[kind] + index, count, weight))

    characters = [(c.DIGIT, i, str(i)) for i in range(10)]
    characters += [(c.LETTER, i, case) for i, x in enumerate(c.LETTERS) for case in (x, x.upper())]
    characters += [(c.SYMBOL, i, x) for i, x in enumerate(c.SYMBOLS)]
    for font in _fonts():
        for kind, index, character in characters:
            for image in _glyph(font, character):
                add(image, kind, index, c.ABSENT, _weight(image))
    rng = np.random.default_rng(0)  # the bank does not depend on the training seed
    for index, name in enumerate(c.SHAPES):
        for count in range(len(c.COUNTS)):
            for _ in range(12 if count else 4):
                add(_arrange(_shape(name), count + 1, rng), c.SHAPE, index, count, c.ABSENT)
    for index in range(len(c.TEXTURES)):
        for _ in range(40):
            add(_texture(index, rng), c.TEXTURE, index, c.ABSENT, c.ABSENT)
    return GlyphBank(np.stack(coverage), *np.array(labels, np.int64).T)


def _fonts() -> list[ImageFont.FreeTypeFont]:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 80) for name in FONTS]
    own = ImageFont.load_default(80)
    if not isinstance(own, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so its default font is missing")
    return [*fonts, own]


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> list[NDArray[np.uint8]]:
    """Draw one character, cropped: thinned, unchanged, and thickened twice."""
    drawn = Image.new("L", (200, 200))
    ImageDraw.Draw(drawn).text((60, 40), character, 255, font)
    drawn = drawn.crop(drawn.getbbox())
    scale = _DRAWN / max(drawn.size)
    drawn = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))
    wide = Image.new("L", (_DRAWN + 24, _DRAWN + 24))
    wide.paste(drawn, ((wide.width - drawn.width) // 2, (wide.height - drawn.height) // 2))
    thin = wide.filter(ImageFilter.MinFilter(3))
    kept = [thin] if _ink(thin) > 0.4 * _ink(wide) else []
    kept += [wide, *(wide.filter(ImageFilter.MaxFilter(size)) for size in (5, 9))]
    return [_fit(image) for image in kept]


def _ink(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


def _fit(image: Image.Image) -> NDArray[np.uint8]:
    """Resize the drawn part to 32 pixels, keeping proportions, with an empty edge: u8[34, 34]."""
    image = image.crop(image.getbbox())
    scale = (SIDE - 2) / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.BOX,
    )
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(canvas)


def _weight(image: NDArray[np.uint8]) -> int:
    """Classify thin, bold or neither by the stroke's width: twice the area by the outline."""
    ink = image / 255.0
    down, across = np.gradient(ink)
    width = 2 * ink.sum() / np.hypot(down, across).sum()
    return 1 if width < _THIN else 2 if width > _BOLD else 0


def _shape(name: str) -> Image.Image:
    """Draw one shape at 64 pixels."""
    image = Image.new("L", (64, 64))
    draw = ImageDraw.Draw(image)
    turn = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 13, 31)
    star = np.stack([32 + reach * np.sin(turn), 32 - reach * np.cos(turn)], 1)
    box = (1, 1, 62, 62)
    match name:
        case "circle":
            draw.ellipse(box, 255)
        case "ring":
            draw.ellipse(box, outline=255, width=10)
        case "square":
            draw.rectangle(box, 255)
        case "frame":
            draw.rectangle(box, outline=255, width=9)
        case "bar":
            draw.rectangle((1, 23, 62, 41), 255)
        case "crescent":
            draw.ellipse(box, 255)
            draw.ellipse((20, 1, 80, 62), 0)
        case "triangle":
            draw.polygon([(32, 2), (62, 58), (2, 58)], 255)
        case "diamond":
            draw.polygon([(32, 1), (56, 32), (32, 62), (8, 32)], 255)
        case "star":
            draw.polygon([(float(x), float(y)) for x, y in star], 255)
        case "arrow":
            draw.polygon([(2, 24), (34, 24), (34, 8), (62, 32), (34, 56), (34, 40), (2, 40)], 255)
        case _:
            raise ValueError(f"shape: got {name!r}, expected one of {', '.join(c.SHAPES)}")
    return image


def _arrange(shape: Image.Image, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw the shape ``count`` times in cells of a grid, with small random shifts."""
    if count == 1:
        return _fit(shape)
    across = 2 if count <= 4 else 3
    canvas = Image.new("L", (66 * across, 66 * across))
    for cell in rng.permutation(across * across)[:count]:
        side = int(rng.integers(46, 60))
        left, top = 66 * np.array([cell % across, cell // across]) + rng.integers(0, 6, 2)
        canvas.paste(shape.resize((side, side)), (int(left), int(top)))
    return _fit(canvas)


def _texture(index: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one texture that fills its square, with random period and phase."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    period = rng.uniform(5, 11)
    x, y = x + rng.uniform(0, period), y + rng.uniform(0, period)
    u, v = 2 * np.pi * x / period, 2 * np.pi * y / period
    fields = {
        "horizontal stripes": np.sin(v),
        "vertical stripes": np.sin(u),
        "diagonal stripes": np.sin((u + v * rng.choice([-1, 1])) / np.sqrt(2)),
        "checks": np.sin(u) * np.sin(v) * 2,
        "dots": np.cos(u) + np.cos(v) - 0.9,
        "waves": np.sin(v + 1.6 * np.sin(u * 0.6)),
        "grid": np.maximum(np.cos(u), np.cos(v)) - 0.75,
        "ripples": np.sin(np.hypot(x - rng.uniform(10, 34), y - rng.uniform(10, 34)) * 1.1),
        "bricks": np.maximum(np.cos(v), np.cos((u + np.pi * (v // (2 * np.pi) % 2)) / 2)) - 0.8,
        "speckles": rng.normal(0, 1, x.shape) - 0.8,
    }
    return np.asarray(255 * np.clip(0.5 + 2 * fields[c.TEXTURES[index]], 0, 1), np.uint8)

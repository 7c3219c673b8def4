"""The attributes of drawn images, and the grammar of their captions.

An image is a row of attribute values. A caption is a text and a row with the values that the text
names, ``UNNAMED`` elsewhere, so comparing rows shows whether a caption matches an image.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

UNNAMED: Final = -1  # in a caption: the attribute is not mentioned
ABSENT: Final = -2  # in an image: no such attribute, so a caption that names it does not match

SUBJECT, KIND, COUNT, INK, GROUND, HAND, WEIGHT, SIZE, QUALITY = range(9)
N_ATTRIBUTES: Final = 9

KINDS: Final = ("digit", "letter", "symbol", "shape", "texture")
DIGIT, LETTER, SYMBOL, SHAPE, TEXTURE = range(5)

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS: Final = tuple("abcdefghijklmnopqrstuvwxyz")
SYMBOLS: Final = {
    "+": "plus sign", "-": "minus sign", "=": "equals sign", "*": "asterisk", "/": "slash",
    "?": "question mark", "!": "exclamation mark", "#": "hash sign", "&": "ampersand",
    "@": "at sign", "%": "percent sign", "$": "dollar sign",
}  # fmt: skip
SHAPES: Final = (
    "circle", "ring", "square", "frame", "triangle", "diamond", "star", "bar", "arrow", "crescent",
)  # fmt: skip
TEXTURES: Final = (
    "horizontal stripes", "vertical stripes", "diagonal stripes", "checks", "dots", "waves", "grid",
    "ripples", "bricks", "speckles",
)  # fmt: skip
NAMES: Final = (DIGITS, LETTERS, tuple(SYMBOLS.values()), SHAPES, TEXTURES)
FIRST_SUBJECT: Final = tuple(sum(len(names) for names in NAMES[:kind]) for kind in range(5))

COLOURS: Final = {
    "white": (245, 245, 245), "black": (12, 12, 12), "grey": (128, 128, 128),
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215),
    "yellow": (240, 215, 50), "orange": (240, 140, 30), "purple": (135, 50, 160),
    "pink": (245, 150, 190), "brown": (120, 75, 35), "turquoise": (60, 200, 200),
}  # fmt: skip
COLOUR_NAMES: Final = tuple(COLOURS)
WHITE, BLACK = 0, 1
HANDS: Final = ("printed", "handwritten")
WEIGHTS: Final = ("", "thin", "bold")  # "" is never mentioned
SIZES: Final = ("", "small", "large")
QUALITIES: Final = ("clear", "blurred", "noisy", "cluttered")
COUNTS: Final = ("one", "two", "three", "four", "five")

LEADS: Final = (
    "", "", "", "", "a photo of ", "a photo of ", "an image of ", "an image of ", "this is ",
    "a drawing of ", "a photo showing ", "a scan of ",
)  # fmt: skip


class Caption(NamedTuple):
    """A text and the attribute values that it names, i64[A]."""

    text: str
    named: Rows


def compatible(named: Rows, images: Rows) -> NDArray[np.bool_]:
    """Return which captions i64[C, A] match which images i64[N, A]: bool[N, C]."""
    named, images = named[None], images[:, None]
    return np.asarray(((named == UNNAMED) | (named == images)).all(axis=-1))


def describe(image: Rows, rng: np.random.Generator) -> Caption:
    """Return a random matching caption of one image i64[A]."""
    named = np.full(N_ATTRIBUTES, UNNAMED, np.int64)

    def mention(attribute: int, words: tuple[str, ...], chance: float) -> str:
        value = int(image[attribute])
        if value < 0 or not words[value] or rng.random() >= chance:
            return ""
        named[attribute] = value
        return words[value]

    adjectives = [
        mention(SIZE, SIZES, 0.4),
        mention(QUALITY, QUALITIES, 0.4),
        mention(WEIGHT, WEIGHTS, 0.4),
        mention(HAND, HANDS, 0.5),
        mention(INK, COLOUR_NAMES, 0.4),
    ]
    article, noun = _noun(image, named, rng)
    phrase = " ".join(word for word in (*adjectives, noun) if word)
    if article == "a":
        article = _a(phrase)
    ground = mention(GROUND, COLOUR_NAMES, 0.4)
    if ground:
        phrase += f" on {ground}" if rng.random() < 0.5 else f" on {_a(ground)} {ground} background"
    lead = LEADS[rng.integers(len(LEADS))]
    stop = "." if rng.random() < 0.85 else ""
    return Caption(f"{lead}{article} {phrase}{stop}".replace("  ", " ").strip(), named)


def _a(phrase: str) -> str:
    """Return the indefinite article for a phrase."""
    vowel = phrase[0] in "aei" or phrase.startswith("orange")
    return "an" if vowel and " " in phrase + " " * (len(phrase) > 1) else "a"


def _noun(image: Rows, named: Rows, rng: np.random.Generator) -> tuple[str, str]:
    """Return article and noun for the image's subject, and set the values they name."""
    kind, count = int(image[KIND]), int(image[COUNT])
    name = NAMES[kind][int(image[SUBJECT]) - FIRST_SUBJECT[kind]]
    generic = rng.random() < 0.08
    if not generic:
        named[SUBJECT] = image[SUBJECT]
    elif kind != SYMBOL:
        named[KIND] = kind
    if kind == TEXTURE:
        return "", "texture" if generic else name + (" texture" if rng.random() < 0.3 else "")
    if kind == SHAPE:
        named[COUNT] = count
        noun = "shape" if generic else name
        if count > 0:
            return COUNTS[count], noun + "s"
        return ("a" if rng.random() < 0.7 else COUNTS[0]), noun
    if generic:
        return "a", "character" if kind == SYMBOL else KINDS[kind]
    article = ("", "a", "the")[rng.integers(3)]
    if kind == DIGIT:
        if rng.random() < 0.4:
            name = str(DIGITS.index(name))
        return article, ("", "", "digit ", "digit ", "number ", "numeral ")[rng.integers(6)] + name
    if kind == LETTER:
        return article, ("letter " if rng.random() < 0.7 else "") + name
    return article, name

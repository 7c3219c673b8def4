"""Draw batches of images from the glyph bank: place, warp, colour and degrade glyphs."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from examples.mini_clip import captions as c
from examples.mini_clip.glyphs import SIDE, GlyphBank, glyph_bank

SIZE: Final = 24  # pixels, both ways
_FINE: Final = 2 * SIZE  # drawn at twice the size and averaged
_KIND_SHARES: Final = (0.5, 0.2, 0.08, 0.13, 0.09)

Floats = NDArray[np.float32]


def draw(n: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], c.Rows]:
    """Draw ``n`` images u8[n, 24, 24, 3] and return them with their attributes i64[n, A]."""
    bank = glyph_bank()
    rows = np.full((n, c.N_ATTRIBUTES), c.ABSENT, np.int64)
    rows[:, c.KIND] = rng.choice(len(c.KINDS), n, p=_KIND_SHARES)
    chosen = _choose(bank, rows, rng)
    coverage = _place(bank.coverage[chosen], rows, rng)
    rows[:, c.INK], rows[:, c.GROUND] = _colour_pairs(n, rng)
    rows[:, c.QUALITY] = rng.choice(len(c.QUALITIES), n, p=(0.56, 0.24, 0.1, 0.1))
    return _paint(coverage, rows, rng), rows


def _choose(bank: GlyphBank, rows: c.Rows, rng: np.random.Generator) -> c.Rows:
    """Choose a subject of the kind and a count uniformly, then any matching glyph."""
    chosen = np.zeros(len(rows), np.int64)
    for i, kind in enumerate(rows[:, c.KIND]):
        subject = c.FIRST_SUBJECT[kind] + rng.integers(len(c.NAMES[kind]))
        fits = bank.subject == subject
        if kind == c.SHAPE:
            fits &= bank.number == rng.integers(len(c.COUNTS))
        chosen[i] = rng.choice(np.flatnonzero(fits))
    rows[:, c.SUBJECT] = bank.subject[chosen]
    rows[:, c.COUNT], rows[:, c.WEIGHT] = bank.number[chosen], bank.weight[chosen]
    return chosen


def _place(shapes: NDArray[np.uint8], rows: c.Rows, rng: np.random.Generator) -> Floats:
    """Scale, rotate, shear, shift and warp glyphs u8[n, 34, 34] into frames f32[n, 24, 24]."""
    n, kind = len(rows), rows[:, c.KIND]
    glyph, texture = kind <= c.SYMBOL, kind == c.TEXTURE
    by_hand = glyph & (rng.random(n) < 0.6)
    rows[glyph, c.HAND] = by_hand[glyph]
    height = np.where(texture, rng.uniform(1.5, 2.2, n), 0.3 + 0.7 * np.sqrt(rng.random(n)))
    several = rows[:, c.COUNT] > 0
    height[several] = rng.uniform(0.7, 1.0, n)[several]  # smaller ones cannot be counted
    named_size = ~texture & ~several
    rows[named_size, c.SIZE] = np.select([height < 0.5, height > 0.8], [1, 2], 0)[named_size]

    upright = (kind == c.SHAPE) | texture  # a rotated square would be a diamond
    turn = rng.normal(0, np.where(upright, 0.05, np.where(by_hand, 0.16, 0.07)), n)
    shear = rng.normal(0, np.where(upright, 0.0, np.where(by_hand, 0.2, 0.06)), n)
    narrow = np.exp(rng.normal(0, np.where(upright, 0.03, np.where(by_hand, 0.22, 0.1)), n))
    room = np.maximum(0, 1 - height) * np.where(texture, 0, rng.random(n))
    shift = rng.uniform(-1, 1, (n, 2)) * room[:, None]
    strength = np.where(by_hand, rng.uniform(0.08, 0.24, n), rng.uniform(0, 0.03, n))
    strength[texture] = rng.uniform(0, 0.05, n)[texture]

    axis = (np.arange(_FINE) + 0.5) / _FINE * 2 - 1
    y = (axis[None, :, None] - shift[:, :1, None]) / height[:, None, None]
    x = (axis[None, None, :] - shift[:, 1:, None]) / height[:, None, None]
    cosine, sine = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    across, down = cosine * x + sine * y, cosine * y - sine * x
    across = (across + shear[:, None, None] * down) / narrow[:, None, None]
    # The warp is a smooth field: a 4 x 4 grid of random displacements, interpolated by Gaussians.
    bumps = np.exp(-(((axis[:, None] - np.linspace(-1, 1, 4)) / 0.5) ** 2))
    field = rng.normal(0, 1, (2, n, 4, 4)) * strength[:, None, None]
    warp = (bumps @ field @ bumps.T).astype(np.float32)
    return _sample(shapes, down + warp[0], across + warp[1])


def _sample(
    shapes: NDArray[np.uint8], down: NDArray[np.float64], across: NDArray[np.float64]
) -> Floats:
    """Sample glyphs bilinearly at points in [-1, 1], and average 2 x 2 points to a pixel."""
    n, last = len(shapes), SIDE - 1.001
    y = np.clip((down * (SIDE - 2) + SIDE - 1) / 2, 0, last).astype(np.float32)
    x = np.clip((across * (SIDE - 2) + SIDE - 1) / 2, 0, last).astype(np.float32)
    row, column = y.astype(np.int64), x.astype(np.int64)
    y, x = y - row, x - column
    flat = shapes.reshape(-1)
    at = np.arange(n)[:, None, None] * SIDE * SIDE + row * SIDE + column
    top = flat[at] * (1 - x) + flat[at + 1] * x
    bottom = flat[at + SIDE] * (1 - x) + flat[at + SIDE + 1] * x
    fine = (top * (1 - y) + bottom * y) / np.float32(255)
    return np.asarray(fine.reshape(n, SIZE, 2, SIZE, 2).mean(axis=(2, 4)), np.float32)


def _colour_pairs(n: int, rng: np.random.Generator) -> tuple[c.Rows, c.Rows]:
    """Choose different ink and ground colours, with more white and black than by chance."""
    ink = rng.integers(len(c.COLOURS), size=n)
    ground = (ink + rng.integers(1, len(c.COLOURS), size=n)) % len(c.COLOURS)
    plain = rng.random(n)
    ink = np.select([plain < 0.08, plain < 0.4], [c.WHITE, c.BLACK], ink)
    return ink, np.select([plain < 0.08, plain < 0.4], [c.BLACK, c.WHITE], ground)


def _paint(coverage: Floats, rows: c.Rows, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colour the coverage f32[n, 24, 24], add clutter, blur and noise: u8[n, 24, 24, 3]."""
    n, quality = len(rows), rows[:, c.QUALITY]
    palette = np.array(list(c.COLOURS.values()), np.float32)

    def tinted(colours: c.Rows) -> Floats:
        tint = palette[colours] + rng.normal(0, 10, (n, 3))
        return np.asarray(tint[:, None, None, :], np.float32)

    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    slope = rng.normal(0, 8, (2, n, 1, 1)).astype(np.float32)
    light = slope[0] * axis[:, None] + slope[1] * axis[None, :]
    image = tinted(rows[:, c.GROUND]) + light[..., None]
    litter = _litter(n, rng) * (quality == 3)[:, None, None]
    image += litter[..., None] * (tinted(rng.integers(len(palette), size=n)) - image)
    image += coverage[..., None] * (tinted(rows[:, c.INK]) - image)

    spread = np.where(quality == 1, rng.uniform(0.9, 1.6, n), rng.uniform(0.15, 0.65, n))
    distance = (np.arange(SIZE)[:, None] - np.arange(SIZE)[None, :]) ** 2
    kernel = np.exp(-distance / (2 * spread[:, None, None] ** 2)).astype(np.float32)
    kernel /= kernel.sum(axis=2, keepdims=True)
    image = np.einsum("nyj,njxc->nyxc", kernel, image, optimize=True)
    image = np.einsum("nxj,nyjc->nyxc", kernel, image, optimize=True)
    grain = np.where(quality == 2, rng.uniform(14, 38, n), rng.uniform(0, 6, n))
    image += rng.normal(0, 1, image.shape) * grain[:, None, None, None]
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _litter(n: int, rng: np.random.Generator) -> Floats:
    """Draw three thin lines per image, at any angle: coverage f32[n, 24, 24]."""
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    angle = rng.uniform(0, np.pi, (3, n, 1, 1)).astype(np.float32)
    offset = rng.uniform(-1, 1, (3, n, 1, 1)).astype(np.float32)
    distance = np.abs(np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None, :] - offset)
    return np.asarray(np.clip(1.6 - distance * SIZE / 2, 0, 1).max(axis=0))

"""Compare ids, pixels and zero-shot logits with those of the source library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from export.loaded import LoadedClip
from export.parity import LIMIT, open_graph
from runtimes.preprocess import crop, normalise
from runtimes.tokenizer import Tokenizer
from ztune.errors import ZtuneError
from ztune.types import F32, I64

TEXTS = (
    "a photo of a cat.",
    "DOG's and we'LL: 3.14 & 42!?",
    "  white\tspace\n",
    "caf\u00e9 cafe\u0301 stra\u00dfe",
    "schÃ¶n â€™s",
    "fish &amp;amp; chips &#39;n&#39; &lt;b&gt;",
    "snake_case_name",
    "漢字 한국어 ไทย",
    "😀👩‍👩‍👧🇩🇪",
    "½ ² Ⅷ \u0663",
    "ﬁ ﬆ \u017f \u0130",
    "x\u200by\u00a0z\u3000",
    "!",
)
PIXEL_LIMIT = 8.0
"""Levels of 255: where both axes of noise are resized, bicubic differs by up to 5. Another filter,
mode or mean differs by more than ten."""
_EQUAL = 1e-5


@dataclass(frozen=True)
class SourceParity:
    """The largest differences from the source library; ids are equal."""

    library: str
    texts: int
    images: int
    pixels: float
    """In levels of 255."""
    logits: float
    """Of zero-shot classification with the fp32 graphs, on images with equal pixels."""


def compare_ids(loaded: LoadedClip) -> I64:
    """Return the ids i64[B, L] of odd texts, which are the reference's.

    Raises: ZtuneError naming a text with other ids.
    """
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    fitting = {
        text: sequence
        for text in TEXTS
        if len(sequence := tokenizer.sequence(text)) <= loaded.text.context_length
    }
    ours = tokenizer.pad(list(fitting.values()))
    if not fitting:
        raise ZtuneError(
            f"the text tower takes {loaded.text.context_length} tokens: too few for a text"
        )
    expected = loaded.reference.tokenize(list(fitting))
    for text, got, wanted in zip(fitting, ours, expected, strict=True):
        if got.shape != wanted.shape or (got != wanted).any():
            raise ZtuneError(
                f"text {text!r} has ids {_shown(got)}, {loaded.reference.library} gives "
                f"{_shown(wanted)}: no bundle was written (pass this model's tokenizer: "
                "`tokenizer=FILE`)"
            )
    return ours


def _shown(ids: I64) -> str:
    return f"{' '.join(map(str, ids[:12]))}{' ...' if len(ids) > 12 else ''}"


def compare_pixels(loaded: LoadedClip) -> tuple[F32, F32, float]:
    """Return our and the reference's pixels f32[N, 3, S, S] of odd images, and their difference.

    Raises: ZtuneError above PIXEL_LIMIT.
    """
    spec, reference = loaded.image, loaded.reference
    images = list(_odd_images(spec.size))
    ours = normalise(np.stack([crop(image, spec) for image in images]), spec)
    expected = np.stack([reference.preprocess(image) for image in images]).astype(np.float32)
    if expected.shape != ours.shape:
        raise ZtuneError(
            f"images become pixels {list(ours.shape[1:])}, {reference.library} makes "
            f"{list(expected.shape[1:])}: no bundle was written"
        )
    levels = 255 * np.array(spec.std, np.float32)[:, None, None]
    worst = float(np.max(np.abs(ours - expected) * levels))
    if not worst <= PIXEL_LIMIT:
        raise ZtuneError(
            f"preprocessed images differ from {reference.library} by {worst:.1f} levels of 255, "
            f"expected at most {PIXEL_LIMIT:g}: no bundle was written (`preprocess_from` gives the "
            "model's own mean, std and resizing)"
        )
    return ours, expected, worst


def compare_logits(
    loaded: LoadedClip, folder: Path, ids: I64, pixels: tuple[F32, F32, float]
) -> SourceParity:
    """Compare zero-shot logits of the graphs in `folder` with those of torch on the reference.

    Raises: ZtuneError when they differ by more than features may.
    """
    ours, expected, levels = pixels
    differences = np.abs(ours - expected).max(axis=(1, 2, 3))
    equal = differences <= max(_EQUAL, differences.min())
    model: Any = loaded.model
    bias = getattr(model, "logit_bias", None)
    scale, offset = float(model.logit_scale.exp()), 0.0 if bias is None else float(bias)
    with torch.no_grad():
        images = model.encode_image(torch.from_numpy(expected[equal]), normalize=True).numpy()
        texts = model.encode_text(torch.from_numpy(ids), normalize=True).numpy()
    (got_images,) = open_graph(folder / "image.onnx").run(["features"], {"pixels": ours[equal]})
    (got_texts,) = open_graph(folder / "text.onnx").run(["features"], {"tokens": ids})
    wanted, got = (
        scale * left.astype(np.float64) @ right.T.astype(np.float64) + offset
        for left, right in ((images, texts), (got_images, got_texts))
    )
    worst = float(np.max(np.abs(got - wanted)))
    if not worst <= scale * LIMIT:
        raise ZtuneError(
            f"zero-shot logits differ from {loaded.reference.library} by {worst:.3g}, expected at "
            f"most {scale * LIMIT:.3g}: no bundle was written"
        )
    return SourceParity(loaded.reference.library, len(ids), len(ours), levels, worst)


def _odd_images(size: int) -> Iterator[Image.Image]:
    """Yield generated images: one of the model's size, and of odd sizes around it."""
    shapes = (
        (size, size),
        (size + 1, size),
        (2 * size + 13, size + 5),
        (max(1, size - 9), 3 * size + 1),
        (size // 3 + 1, size // 2 + 1),
        (3 * size + 7, 2 * size - 1),
    )
    for seed, (width, height) in enumerate(shapes):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width][..., None]
        across, down, phase = (rng.uniform(0, most, 3) for most in (0.6, 0.6, 6.0))
        levels = 127 + 80 * np.sin(x * across + y * down + phase)
        levels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
        yield Image.fromarray(levels.astype(np.uint8))

"""Count the images that are not 8-bit RGB as stored, by conversion; see docs/images.md."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from runtimes.preprocess import (
    UPRIGHT,
    ImageLike,
    decoding,
    grey_bits,
    has_16_bit_colours,
    open_image,
)
from ztune.io.pixel_limit import check_pixels
from ztune.progress import Progress, warn

CONVERSIONS: Mapping[str, str] = {
    "alpha": "with transparency (ignored)",
    "palette": "with a palette (looked up)",
    "orientation": "with EXIF orientation (applied)",
    "first_frame": "with several frames or pages (first one used)",
    "cmyk": "in CMYK (converted without a profile)",
    "grey_16_bit": "in 16-bit greyscale (scaled)",
    "grey_12_bit": "with 12-bit levels in 16 bits (scaled)",
    "grey_8_bit": "with 8-bit levels in 16 bits (kept)",
    "colour_16_bit": "in 16-bit colour (upper 8 bits used)",
}
"""What reading does with an image, as messages say it."""
_GUESSED = ("grey_12_bit", "grey_8_bit")
_ORIENTATION = 0x0112
# A PNG's metadata may follow its pixels, which Pillow decodes to find them.
_PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def count_conversions(images: Iterable[ImageLike]) -> dict[str, int]:
    """Return how many images each conversion of CONVERSIONS applies to, if any.

    A file is decoded only for levels above 8 bits. Unreadable images count as nothing.
    """
    counts = Counter(name for image in images for name in _conversions(image))
    return {name: counts[name] for name in CONVERSIONS if counts[name]}


def report_conversions(counts: Mapping[str, int], what: str, progress: Progress) -> None:
    """Remark what was converted, and warn where the number of bits is a guess."""
    if counts:
        listed = ", ".join(f"{n} {CONVERSIONS[name]}" for name, n in counts.items())
        progress.remark(f"{what}: {listed}; see docs/images.md")
    if n_guessed := sum(counts.get(name, 0) for name in _GUESSED):
        warn(
            f"{what}: {n_guessed} in 16-bit greyscale without a level above 4095, read as 12-bit "
            "data (8-bit if none is above 255); if they are just dark, save them with 8 bits"
        )


def _conversions(image: ImageLike) -> tuple[str, ...]:
    if isinstance(image, np.ndarray):
        return ()
    with contextlib.suppress(Exception), decoding():
        if isinstance(image, Image.Image):
            check_pixels(*image.size, "image")
            return _of_image(image, True)
        path = Path(image)
        stat = path.stat()
        return _of_file(path, stat.st_mtime_ns, stat.st_size)
    return ()


@functools.lru_cache(maxsize=1 << 17)
def _of_file(path: Path, _changed: int, _size: int) -> tuple[str, ...]:
    with open_image(path) as opened:
        content = path.read_bytes() if opened.format == "PNG" else b""
        return _of_image(opened, not content or any(mark in content for mark in _PNG_METADATA))


def _of_image(image: Image.Image, has_metadata: bool) -> tuple[str, ...]:
    deep = has_16_bit_colours(image)  # reading metadata may decode the image
    orientation = 1
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION, 1) if has_metadata else 1
    found = {
        "alpha": image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
        "palette": image.mode in ("P", "PA"),
        "orientation": orientation in UPRIGHT,
        "first_frame": getattr(image, "is_animated", False),
        "cmyk": image.mode == "CMYK",
        "colour_16_bit": deep,
    }
    if image.mode.startswith("I"):
        found[f"grey_{grey_bits(int(np.asarray(image).max()))}_bit"] = True
    return tuple(name for name, applies in found.items() if applies)

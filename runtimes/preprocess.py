"""Preprocess images as open_clip's evaluation transform does.

Images are read as 8-bit RGB, as torchvision's image folders do for open_clip: an alpha channel is
dropped, not blended, as in published evaluations. Unlike in open_clip, the EXIF orientation is
applied, greyscale above 8 bits is scaled instead of clipped, and axes are resized in a fixed order.
docs/images.md states every rule.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtimes.bundle import ImageSpec
from ztune.errors import DataError
from ztune.io.files import open_regular
from ztune.printing import reason_of
from ztune.types import F32, U8

# Part of the feature cache's key: increase it with every change that alters a pixel.
PREPROCESS_VERSION = 2
# Supported formats: Pillow's names, and ours. Other decoders are a risk with untrusted files: that
# of EPS starts Ghostscript.
FORMATS = {
    "JPEG": "JPEG, MPO",
    "PNG": "PNG",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "WEBP": "WebP",
    "AVIF": "AVIF",
    "JPEG2000": "JPEG 2000",
    "PPM": "PNM",
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Area and aspect ratio of a random crop: torchvision's defaults, as in CoOp and ZIP.
_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
# The short side is resized to the model's size, so a very thin image would exhaust memory.
_LONGEST = 100
# Warning filters are global to the process: one thread at a time may change them.
DECODING = threading.Lock()


def read_view(path: Path, spec: ImageSpec, view: np.random.Generator | None) -> U8:
    """Return u8[S, S, 3] of a file: the centre crop, or a random crop and flip drawn by `view`."""
    image = read_image_file(path)
    return crop(image, spec) if view is None else random_view(image, spec, view)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a regular file in one of FORMATS; its pixels are decoded lazily.

    Raises: DataError naming the file when it is in none of them; OSError.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow
    with open_regular(path) as file:
        try:
            opened = Image.open(file, formats=known)
        except UnidentifiedImageError:
            raise DataError(
                f'image "{path}" cannot be read: unknown format '
                f"(supported: {', '.join(FORMATS[name] for name in known)})"
            ) from None
        with opened:
            yield opened


def read_image_file(path: Path) -> Image.Image:
    """Return the image upright and in 8-bit RGB; it is shared, so do not modify it.

    The last images are cached, so that many random views of an image decode it once.

    Raises: DataError naming the file when it is not an image, corrupted, or too large.
    """
    try:
        stat = path.stat()
        with DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; real problems raise
            return _decode(path, stat.st_mtime_ns, stat.st_size)
    except DataError:
        raise
    except Exception as error:  # decoders raise nearly anything on a corrupted file
        raise _unreadable(f'image "{path}"', error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    """Return the error for an image that a decoder or the system cannot read."""
    return DataError(f"{name} cannot be read: {reason_of(error)}")


ImageLike = Path | str | Image.Image | U8
"""A file, a Pillow image, or u8[H, W, 3]."""


def convert_image(image: Image.Image | U8, name: str) -> Image.Image:
    """Convert an image in memory to upright 8-bit RGB; errors call it `name`.

    Raises: DataError for an array that is not u8[H, W, 3], or an image that cannot be decoded.
    """
    if isinstance(image, Image.Image):
        info = dict(image.info)  # _upright removes a palette's transparency from it
        try:
            return _upright(image)
        except Exception as error:  # decoders raise nearly anything on a corrupted file
            raise _unreadable(name, error) from None
        finally:
            image.info = info
    if not isinstance(image, np.ndarray):
        raise DataError(
            f"{name} is {type(image).__name__}, expected a path, a Pillow image, or an array "
            "u8[H, W, 3]"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(
            f"{name} is {image.dtype}{list(image.shape)}, expected u8[H, W, 3] (RGB, 0 to 255)"
        )
    if too_thin := _too_thin(image.shape[1], image.shape[0]):
        raise DataError(f"{name} cannot be read: {too_thin}")
    return Image.fromarray(np.ascontiguousarray(image))


def read_image(image: ImageLike, name: str) -> Image.Image:
    """Return an image from a file or memory upright and in 8-bit RGB.

    Errors call one in memory `name`.

    Raises: DataError for another type, or an image that cannot be decoded.
    """
    if isinstance(image, str | Path):
        return read_image_file(Path(image))
    return convert_image(image, name)


@functools.lru_cache(maxsize=2)
def _decode(path: Path, _changed: int, _size: int) -> Image.Image:
    with open_image(path) as opened:
        return _upright(opened)


def _too_thin(width: int, height: int) -> str:
    """Return why an image is too thin to resize; empty if it is not."""
    if max(width, height) <= _LONGEST * min(width, height):
        return ""
    return f"{width} x {height} pixels (expected at most {_LONGEST}:1)"


def _upright(opened: Image.Image) -> Image.Image:
    """Return an image in 8-bit RGB, with its EXIF orientation applied."""
    if too_thin := _too_thin(*opened.size):
        raise ValueError(too_thin)
    deep = has_16_bit_colours(opened)
    opened.load()
    if deep and max(top for _, top in _colour_extrema(opened)) < 16:
        raise ValueError(
            "no level of its 16-bit colours is above 4095 (12-bit data?), and only the upper 8 "
            "bits are read (scale its levels to 0…65535, or save it with 8 bits)"
        )
    orientation = 1
    with contextlib.suppress(Exception):  # unreadable metadata leaves the pixels as they are
        orientation = opened.getexif().get(_EXIF_ORIENTATION, 1)
    image = _to_rgb(opened)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    return image


def has_16_bit_colours(opened: Image.Image) -> bool:
    """Return whether a file's colours have 16 bits, before they are decoded to 8."""
    tiles = getattr(opened, "tile", None)
    if not tiles or opened.mode.startswith("I"):
        return False
    layout = tiles[0][3]  # a raw mode such as RGB;16B, or a tuple that starts with one
    return ";16" in str(layout[0] if isinstance(layout, tuple) else layout)


def _colour_extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Return the lowest and highest level of each band but alpha."""
    bands: Any = image.split()
    named = zip(image.getbands(), bands, strict=True)
    return [band.getextrema() for name, band in named if name not in "Aa"]


def grey_bits(levels: NDArray[Any]) -> Literal[8, 12, 16]:
    """Return the bits of greyscale levels above 8 bits: the fewest of 8, 12, 16 that hold them.

    Cameras and scanners store 12-bit levels in 16 bits, and no format says so. Black has 16.
    """
    top = levels.max()
    return 16 if top > 4095 or top == 0 else 12 if top > 255 else 8


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Greyscale above 8 bits, which Pillow would clip at 255. PNG, PGM and TIFF use up to 65535.
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its pixels are not 8-bit or 16-bit integers (convert it first)")
        top = 2 ** grey_bits(levels) - 1
        greys = (levels.astype(np.uint32) * 255 + top // 2) // top
        image = Image.fromarray(greys.astype(np.uint8))
    image.info.pop("transparency", None)  # dropped like alpha; Pillow would warn
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("RGB")


def resize(image: Image.Image, width: int, height: int, spec: ImageSpec) -> Image.Image:
    """Resize an RGB image along its width, then along its height, each rounded to 8 bits.

    Pillow 10 to 13 resize one axis in the same way, but both axes in different orders.
    """
    resample = _FILTERS[spec.interpolation]
    return image.resize((width, image.height), resample).resize((width, height), resample)


def crop(image: Image.Image, spec: ImageSpec) -> U8:
    """Return u8[S, S, 3]: the image resized and cropped or padded at the centre."""
    side = spec.size
    width, height = image.size
    if spec.resize_mode == "squash":
        return np.array(resize(image, side, side, spec))
    if spec.resize_mode == "longest":
        ratio = max(width / side, height / side)
        # open_clip fails if the short side rounds to 0; here one row remains.
        new_width, new_height = max(1, round(width / ratio)), max(1, round(height / ratio))
        canvas = Image.new("RGB", (side, side), (spec.fill_color,) * 3)
        corner = ((side - new_width) // 2, (side - new_height) // 2)
        canvas.paste(resize(image, new_width, new_height, spec), corner)
        return np.array(canvas)
    new_width, new_height = (int(side * length / min(width, height)) for length in (width, height))
    left, top = round((new_width - side) / 2), round((new_height - side) / 2)
    resized = resize(image, new_width, new_height, spec)
    return np.array(resized.crop((left, top, left + side, top + side)))


def random_view(image: Image.Image, spec: ImageSpec, rng: np.random.Generator) -> U8:
    """Return u8[S, S, 3]: torchvision's RandomResizedCrop, then a flip with probability 0.5."""
    left, top, width, height = _random_box(*image.size, rng)
    view = image.crop((left, top, left + width, top + height))
    pixels = np.array(resize(view, spec.size, spec.size, spec))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random crop."""
    for _ in range(10):
        area = width * height * rng.uniform(*_SCALE)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, w, h
    # None fits a thin image: use the largest allowed box at the centre.
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def normalise(pixels: U8, spec: ImageSpec) -> F32:
    """Return f32[N, 3, S, S] of u8[N, S, S, 3]: (pixels / 255 - mean) / std, contiguous."""
    result = np.empty((pixels.shape[0], 3, *pixels.shape[1:3]), np.float32)
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    for channel in range(3):
        table = (levels - np.float32(spec.mean[channel])) / np.float32(spec.std[channel])
        np.take(table, pixels[..., channel], out=result[:, channel])
    return result

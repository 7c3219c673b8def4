"""Preprocess images as open_clip's evaluation transform does.

Images are read as 8-bit RGB, as torchvision's image folders do for open_clip: an alpha channel is
dropped, not blended, as in published evaluations. Unlike in open_clip, the EXIF orientation is
applied, greyscale above 8 bits is scaled instead of clipped, and axes are resized in a fixed order.
docs/images.md states every rule.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from runtimes.bundle import ImageSpec
from ztune.errors import ConfigError, DataError, ImageSizeError, how_to_install
from ztune.io.files import open_regular
from ztune.io.image_formats import HEAD, format_of
from ztune.io.pixel_limit import ROOM, check_pixels, check_tile, check_webp, max_pixels
from ztune.printing import reason_of
from ztune.types import F32, LEAST_AREA, U8, RandomView

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
    "HEIF": "HEIC",
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
# Aspect ratio of a random crop: torchvision's default, as in CoOp and ZIP.
_RATIO = (3 / 4, 4 / 3)
# The short side is resized to the model's size, so a very thin image would exhaust memory.
_LONGEST = 100
# Length of a nearly uniform image's hash: 2 levels for each of 64 pixels.
_UNIFORM = 16.0
# Warning filters and Pillow's limit are global to the process: one thread at a time changes them.
_DECODING = threading.Lock()
_WEBP_START = 30  # bytes
_STRIP = 1_000_000  # pixels
# The images decoded last, so that many random views of an image decode it once.
_RECENT: OrderedDict[tuple[Path, int, int], Image.Image] = OrderedDict()
_MOST_RECENT = 2
T = TypeVar("T")


def read_view(path: Path, spec: ImageSpec, view: RandomView | None) -> U8:
    """Return u8[S, S, 3] of a file: the centre crop, or a random crop and flip drawn by `view`."""
    with decoded_file(path) as image:
        return view_pixels(image, spec, view)


def view_pixels(image: Image.Image, spec: ImageSpec, view: RandomView | None) -> U8:
    """Return u8[S, S, 3]: the centre crop, or a random view."""
    if view is None:
        return crop(image, spec)
    return random_view(image, spec, view.rng, view.least_area)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a regular file in one of FORMATS; its pixels are decoded lazily.

    Raises: DataError naming the file when it is in none of them, or has more pixels than allowed;
        OSError.
    """
    Image.init()
    name = f'image "{path}"'
    with open_regular(path) as file:
        if not (start := file.read(max(HEAD, _WEBP_START))):
            raise DataError(f"{name} cannot be read: the file is empty")
        if format_of(start[:HEAD]) == ".heic":
            _add_heic(path)
        check_webp(start, name)
        file.seek(0)
        known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow
        try:
            opened = Image.open(file, formats=known)
        except UnidentifiedImageError:
            raise DataError(
                f"{name} cannot be read: unknown format "
                f"(supported: {', '.join(FORMATS[name] for name in known)})"
            ) from None
        with opened:
            check_pixels(*opened.size, name)
            if opened.format == "TIFF":
                check_tile(opened, name)
            yield opened


def _add_heic(path: Path) -> None:
    """Register the decoder of HEIC, an optional dependency; the image at `path` needs it."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:
        raise DataError(
            f'image "{path}" cannot be read: HEIC needs pillow-heif, which is not installed '
            f"(install it with: {how_to_install('heic')}; or convert the images to JPEG)"
        ) from None
    heif.register_heif_opener()


@contextlib.contextmanager
def decoded_file(path: Path) -> Iterator[Image.Image]:
    """Yield the image upright and in 8-bit RGB; it is shared, so do not modify it.

    All images in these contexts together have at most the limit's pixels: a thread waits for room.
    The last images are cached while there is room.

    Raises: DataError naming the file when it is not an image, corrupted, or too large.
    """
    with contextlib.ExitStack() as room:
        try:
            stat = path.stat()
            with decoding():
                image = _decode((path, stat.st_mtime_ns, stat.st_size), room)
        except (DataError, ConfigError):
            raise
        except Exception as error:  # decoders raise nearly anything on a corrupted file
            raise _unreadable(f'image "{path}"', error) from None
        try:
            yield image
        except MemoryError as error:
            raise _unreadable(f'image "{path}"', error) from None


def read_image_file(path: Path) -> Image.Image:
    """Return the image of `decoded_file`, which then no longer counts."""
    with decoded_file(path) as image:
        return image


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Decode without warnings and with ztune's limit in place of Pillow's; one thread at a time."""
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; real problems raise
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def perceptual_hash(path: Path) -> F32 | None:
    """Return f32[64], a unit vector of an image in 8 x 8 grey levels without their mean.

    The last images are cached. None for an image that is unreadable or uniform.
    """
    try:
        stat = path.stat()
        with decoding():
            return _hash(path, stat.st_mtime_ns, stat.st_size)
    except Exception:  # decoders raise nearly anything on a corrupted file
        return None


@functools.lru_cache(maxsize=8192)
def _hash(path: Path, _changed: int, _size: int) -> F32 | None:
    with open_image(path) as opened:
        opened.draft("L", (64, 64))  # decodes a JPEG at the least sufficient size
        turned = UPRIGHT.get(opened.getexif().get(_EXIF_ORIENTATION, 1))
        deep = opened.mode == "F" or opened.mode.startswith("I")
        grey = (
            (_to_rgb(opened) if deep else opened)
            .convert("L")
            .resize((8, 8), Image.Resampling.LANCZOS)
        )
    upright = grey if turned is None else grey.transpose(turned)
    levels = np.asarray(upright, np.float32).ravel()
    deviations = levels - levels.mean()
    length = np.linalg.norm(deviations)
    return deviations / length if length > _UNIFORM else None


def reason_broken(path: Path, whole: bool) -> DataError | None:
    """Return why an image cannot be read, None if it can; by its first bytes unless `whole`.

    Raises: ConfigError for an invalid limit of pixels.
    """
    try:
        with open_regular(path) as file:
            known = format_of(file.read(HEAD))
        if whole:
            read_image_file(path)
        elif known in (None, ".heic", ".avif"):  # formats that depend on the installation
            with decoding(), open_image(path):
                pass
    except ConfigError:
        raise
    except DataError as error:
        return error
    except Exception as error:  # as in read_image_file
        return _unreadable(f'image "{path}"', error)
    return None


def _unreadable(name: str, error: Exception) -> DataError:
    """Return the error for an image that a decoder or the system cannot read."""
    if isinstance(error, MemoryError):
        return ImageSizeError(
            f"{name} does not fit into memory (scale it down, or free memory; a lower `max_pixels` "
            "refuses such images at once)"
        )
    return DataError(f"{name} cannot be read: {reason_of(error)}")


ImageLike = Path | str | Image.Image | U8
"""A file, a Pillow image, or u8[H, W, 3]."""


def convert_image(image: Image.Image | U8, name: str) -> Image.Image:
    """Convert an image in memory to upright 8-bit RGB; errors call it `name`.

    Raises: DataError for an array that is not u8[H, W, 3], or an image that cannot be decoded or
        has more pixels than allowed.
    """
    if isinstance(image, Image.Image):
        check_pixels(*image.size, name)
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


def with_image(image: ImageLike, name: str, use: Callable[[Image.Image], T]) -> T:
    """Return `use` of an image from a file or memory, upright and in 8-bit RGB.

    Errors call one in memory `name`.

    Raises: DataError for another type, or an image that cannot be decoded.
    """
    if isinstance(image, str | Path):
        with decoded_file(Path(image)) as decoded:
            return use(decoded)
    return use(convert_image(image, name))


def _decode(file: tuple[Path, int, int], room: contextlib.ExitStack) -> Image.Image:
    """Decode a file, given with its time of change and size; enter its pixels into `room`."""
    if (image := _RECENT.get(file)) is not None:
        _RECENT.move_to_end(file)
        room.enter_context(ROOM.taken(image.width * image.height))
        return image
    with open_image(file[0]) as opened:
        room.enter_context(ROOM.taken(opened.width * opened.height))
        while len(_RECENT) >= _MOST_RECENT or (
            _RECENT and _n_recent() + ROOM.n_used > max_pixels()
        ):
            _RECENT.popitem(last=False)
        image = _RECENT[file] = _upright(opened)
    return image


def _n_recent() -> int:
    """Return the pixels of the cached images."""
    return sum(image.width * image.height for image in _RECENT.values())


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
            "no level of its 16-bit colours is above 4095 (black, or 12-bit data?), and only the "
            "upper 8 bits are read (scale its levels to 0…65535, or save it with 8 bits)"
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


def grey_bits(top: int) -> Literal[8, 12, 16]:
    """Return the bits of greyscale up to the level `top`: the fewest of 8, 12, 16 that hold it.

    Cameras and scanners store 12-bit levels in 16 bits, and no format says so. Black has 16.
    """
    return 16 if top > 4095 or top == 0 else 12 if top > 255 else 8


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Greyscale above 8 bits, which Pillow would clip at 255. PNG, PGM and TIFF use up to 65535.
        image = Image.fromarray(_scale_greys(image))
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


def _scale_greys(image: Image.Image) -> U8:
    """Return u8[H, W] of greyscale above 8 bits, strip by strip: a copy takes 12 bytes a pixel."""
    n_rows = max(1, _STRIP // image.width)
    strips = [(top, min(top + n_rows, image.height)) for top in range(0, image.height, n_rows)]

    def levels_of(top: int, bottom: int) -> NDArray[Any]:
        return np.asarray(image.crop((0, top, image.width, bottom)))

    extremes = [(int(part.min()), int(part.max())) for part in (levels_of(*one) for one in strips)]
    low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError("its pixels are not 8-bit or 16-bit integers (convert it first)")
    most = 2 ** grey_bits(high) - 1
    greys = np.empty((image.height, image.width), np.uint8)
    for top, bottom in strips:
        levels = levels_of(top, bottom).astype(np.uint32)
        greys[top:bottom] = (levels * 255 + most // 2) // most
    return greys


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
    rounded = math.floor if spec.resize_mode == "shortest_floor" else round
    left, top = rounded((new_width - side) / 2), rounded((new_height - side) / 2)
    resized = resize(image, new_width, new_height, spec)
    return np.array(resized.crop((left, top, left + side, top + side)))


def random_view(
    image: Image.Image, spec: ImageSpec, rng: np.random.Generator, least_area: float = LEAST_AREA
) -> U8:
    """Return u8[S, S, 3]: torchvision's RandomResizedCrop, then a flip with probability 0.5."""
    left, top, width, height = _random_box(*image.size, rng, least_area)
    view = _cut(image, (left, top, left + width, top + height))
    pixels = np.array(resize(view, spec.size, spec.size, spec))
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


def _cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return a part of an image; Pillow's own limit does not apply."""
    left, top, right, bottom = box
    if (right - left) * (bottom - top) <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return image.crop(box)
    return Image.fromarray(np.asarray(image)[top:bottom, left:right])


def _random_box(
    width: int, height: int, rng: np.random.Generator, least_area: float = LEAST_AREA
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random crop."""
    for _ in range(10):
        area = width * height * rng.uniform(least_area, 1.0)
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

"""Derive image sets: changed images, and some classes of a set in CoOp's layout.

They are written once as PNG, with the same bytes for the same Pillow and NumPy versions.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from runtimes.preprocess import open_image
from ztune.data.folders import read_dataset
from ztune.errors import DataError
from ztune.io.files import new_folder, read_json

_BLUR = 32
"""The radius of the blur is an image's short side divided by this."""
_NOISE = 40.0
"""Standard deviation of the noise, of 255."""
_JPEG_QUALITY = 5
_BITS = 2
"""Bits per channel after posterizing."""

Change = Callable[[Image.Image, int], Image.Image]
"""From an RGB image and its seed to an RGB image."""


def _edges(image: Image.Image, _seed: int) -> Image.Image:
    return ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES).convert("RGB")


def _blur(image: Image.Image, _seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / _BLUR))


def _noise(image: Image.Image, seed: int) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, _NOISE, pixels.shape)
    return Image.fromarray(np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, _seed: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return Image.open(file, formats=["JPEG"]).convert("RGB")


CHANGES: Mapping[str, Change] = {
    "grey": lambda image, _: ImageOps.grayscale(image).convert("RGB"),
    "rotated": lambda image, _: image.transpose(Image.Transpose.ROTATE_90),
    "upside-down": lambda image, _: image.transpose(Image.Transpose.ROTATE_180),
    "negative": lambda image, _: ImageOps.invert(image),
    "posterized": lambda image, _: ImageOps.posterize(image, _BITS),
    "edges": _edges,
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
}


def change_images(source: Path, change: str, out: Path) -> Path:
    """Write every image of the data set `source`, changed, to `out` unless it exists; return it.

    Raises: DataError for an image that cannot be read.
    """
    root = source.absolute()
    images = read_dataset(root).images
    files = ((root / one.path, Path(one.path).with_suffix(".png")) for one in images)
    return _write_images(out, files, CHANGES[change])


def select_coop_classes(source: Path, classes: slice, out: Path) -> Path:
    """Write some classes of a set in CoOp's layout to `out` unless it exists; return it.

    `classes` are indices in the order of the split file. Folders: `train`, with its train and val,
    and `test`.

    Raises: DataError, FormatError when the set is not as expected.
    """
    listings = sorted(source.glob("split_zhou_*.json"))
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if len(listings) != 1 or len(folders) != 1:
        raise DataError(
            f'"{source}" is not in CoOp\'s layout (expected one split_zhou_*.json and one folder '
            "of images)"
        )
    split = read_json(listings[0], "split file")
    listed = [(role, *row) for role in ("train", "val", "test") for row in _rows(split, role)]
    chosen = set(sorted({label for _, _, label, _ in listed})[classes])
    files = [
        (folders[0] / path, Path("test" if role == "test" else "train", name, Path(path).name))
        for role, path, label, name in listed
        if label in chosen
    ]
    return _write_images(out, ((path, to.with_suffix(".png")) for path, to in files), None)


def _rows(split: Mapping[str, object], role: str) -> list[tuple[str, int, str]]:
    """Return (path, label, class name) of one part of a split file."""
    rows = split.get(role)
    if not isinstance(rows, list):
        raise DataError(f'the split file has no list "{role}"')
    return [(str(path), int(label), str(name)) for path, label, name in rows]


def _write_images(out: Path, files: Iterable[tuple[Path, Path]], change: Change | None) -> Path:
    """Write images (from, to below `out`) atomically."""
    if out.is_dir():
        return out
    try:
        with new_folder(out) as work:
            for source, target in files:
                (work / target).parent.mkdir(parents=True, exist_ok=True)
                with open_image(source) as image:
                    plain = image.convert("RGB")
                if change is not None:
                    plain = change(plain, zlib.crc32(target.as_posix().encode()))
                plain.save(work / target, "PNG")
    except OSError:
        if not out.is_dir():  # else another process wrote the same
            raise
    return out

"""Write the image sets of plans/queries.toml and plans/queries-study.toml, once.

    python -m benchmarks.query_images FOLDER

FOLDER has `cifar10`, `cifar10-negative`, `pacs-photo` and `pacs-sketch`, folders of class folders,
and Caltech101 as a named data set. The sets are links and changed copies, with the same bytes for
the same versions of Pillow and NumPy.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from benchmarks.measure import ROOT, say
from runtimes.preprocess import open_image
from ztune.data.sources import read_source
from ztune.errors import DataError, ZtuneError
from ztune.io.files import new_folder

OUT = ROOT / "runs" / "query-images"
_CALTECH = "caltech101"
_BLUR = 32
"""The radius of the blur is an image's short side divided by this."""
_NOISE = 40.0
"""Standard deviation of the noise, of 255."""

Change = Callable[[Image.Image, int], Image.Image]
"""From an RGB image and its seed to an RGB image."""


def _noise(image: Image.Image, seed: int) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, _NOISE, pixels.shape)
    return Image.fromarray(np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8))


CHANGES: Mapping[str, Change] = {
    "none": lambda image, _: image,
    "grey": lambda image, _: ImageOps.grayscale(image).convert("RGB"),
    "rotated": lambda image, _: image.transpose(Image.Transpose.ROTATE_90),
    "negative": lambda image, _: ImageOps.invert(image),
    "edges": lambda image, _: (
        ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES).convert("RGB")
    ),
    "blur": lambda image, _: image.filter(ImageFilter.GaussianBlur(min(image.size) / _BLUR)),
    "noise": _noise,
}


@dataclass(frozen=True)
class ImageSet:
    """A set made from another."""

    source: str
    change: str = "none"
    n_classes: int = 0
    """The first classes of Caltech101; 0: a folder of class folders."""

    def files(self, images: Path) -> Iterator[tuple[Path, Path]]:
        """Yield each image and its path in the set; Caltech101's val images are for training.

        Raises: DataError.
        """
        if not self.n_classes:
            listing = read_source(str(images / self.source), None)
            for image in listing.images:
                yield listing.root / image.path, Path(image.path).with_suffix(".png")
            return
        listing = read_source(self.source, images)
        for role, item in listing.lists or ():
            if item.label < self.n_classes:
                to = Path("test" if role == "test" else "train", item.name, Path(item.path).name)
                yield listing.root / item.path, to.with_suffix(".png")


SETS = {
    "cifar10": ImageSet("cifar10"),
    "cifar10-negative": ImageSet("cifar10-negative"),
    "cifar10-grey": ImageSet("cifar10", "grey"),
    "cifar10-rotated": ImageSet("cifar10", "rotated"),
    "cifar10-noise": ImageSet("cifar10", "noise"),
    "cifar10-blur": ImageSet("cifar10", "blur"),
    "pacs-photo": ImageSet("pacs-photo"),
    "pacs-photo-negative": ImageSet("pacs-photo", "negative"),
    "pacs-photo-edges": ImageSet("pacs-photo", "edges"),
    "pacs-sketch": ImageSet("pacs-sketch"),
    "pacs-sketch-rotated": ImageSet("pacs-sketch", "rotated"),
    "caltech-20": ImageSet(_CALTECH, n_classes=20),
    "caltech-50-edges": ImageSet(_CALTECH, "edges", n_classes=50),
}


def write_set(one: ImageSet, images: Path, out: Path) -> None:
    """Write a set to the folder `out`; an unchanged folder of class folders becomes a link.

    Raises: DataError for a missing set or an invalid image.
    """
    if one.change == "none" and not one.n_classes:
        source = (images / one.source).resolve()
        if not source.is_dir():
            raise DataError(f'"{source}" does not exist (expected a folder of class folders)')
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # a link to a folder that was moved
        out.symlink_to(source)
        return
    with new_folder(out) as work:
        for source, target in one.files(images):
            if (work / target).exists():
                raise DataError(f'"{source}": another image becomes "{target}" too (rename it)')
            (work / target).parent.mkdir(parents=True, exist_ok=True)
            with open_image(source) as image:
                plain = image.convert("RGB")
            changed = CHANGES[one.change](plain, zlib.crc32(target.as_posix().encode()))
            changed.save(work / target, "PNG")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=OUT, help="default: where the plans look")
    arguments = parser.parse_args(words)
    try:
        for name, one in SETS.items():
            if not (arguments.out / name).exists():
                say(name)
                write_set(one, arguments.images, arguments.out / name)
    except ZtuneError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Encode images in memory where an image encoder expects files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from runtimes.bundle import ImageSpec
from runtimes.preprocess import view_pixels
from ztune.types import F32, U8, ImageEncoder, RandomView

InMemoryImages = Mapping[Path, Image.Image]
"""Upright 8-bit RGB images by placeholder path."""


@dataclass(frozen=True)
class InMemoryImageEncoder:
    """An image encoder (an ImageEncoder) with some images in memory."""

    encoder: ImageEncoder
    spec: ImageSpec
    images: InMemoryImages

    @property
    def identity(self) -> str:
        return self.encoder.identity

    def read(self, path: Path, view: RandomView | None) -> U8:
        image = self.images.get(path)
        if image is None:
            return self.encoder.read(path, view)
        return view_pixels(image, self.spec, view)

    def encode(self, pixels: U8) -> F32:
        return self.encoder.encode(pixels)


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels, in place of a file's."""
    digest = hashlib.sha256(f"RGB {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()

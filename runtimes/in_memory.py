"""Images that are in memory, read by an image encoder where it would read files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtimes.bundle import ImageSpec
from runtimes.preprocess import crop, random_view
from ztune.types import F32, U8, ImageEncoder

Held = Mapping[Path, Image.Image]
"""Upright 8-bit RGB images by a path that no file has."""


@dataclass(frozen=True)
class HoldingEncoder:
    """An image encoder (an ImageEncoder) that has some images in memory."""

    encoder: ImageEncoder
    spec: ImageSpec
    held: Held

    @property
    def identity(self) -> str:
        return self.encoder.identity

    def read(self, path: Path, view: np.random.Generator | None) -> U8:
        image = self.held.get(path)
        if image is None:
            return self.encoder.read(path, view)
        return crop(image, self.spec) if view is None else random_view(image, self.spec, view)

    def encode(self, pixels: U8) -> F32:
        return self.encoder.encode(pixels)


def digest_of(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels: it stands where a file's does."""
    digest = hashlib.sha256(f"RGB {image.width} {image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()

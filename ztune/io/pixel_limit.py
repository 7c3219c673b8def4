"""One limit on the pixels of images in memory, counted from their headers before decoding."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from ztune.errors import ConfigError, ImageSizeError

VARIABLE = "ZTUNE_MAX_PIXELS"
"""Environment variable with the limit, which child processes inherit."""
_DEFAULT = 100_000_000
_TIFF_TILE = (322, 323)  # tags of its width and length


def max_pixels() -> int:
    """Return the limit.

    Raises: ConfigError when the environment variable is not a positive integer.
    """
    text = os.environ.get(VARIABLE, str(_DEFAULT))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"`max_pixels` ({VARIABLE}) is {text!r}, expected a positive integer")
    return int(text)


@contextlib.contextmanager
def at_most(n_pixels: int | None) -> Iterator[None]:
    """Set the limit for this process and its children until the block ends; None keeps it."""
    if n_pixels is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(n_pixels)
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse an image above the limit.

    Raises: ImageSizeError naming the image and the option.
    """
    if width * height > (limit := max_pixels()):
        raise ImageSizeError(
            f"{name} has {width} x {height} = {width * height} pixels, expected at most {limit} "
            f"(scale it down, or allow more: `max_pixels`, {VARIABLE} in the environment)"
        )


def check_webp(start: bytes, name: str) -> None:
    """Check the size in the first 30 bytes of a WebP: Pillow allocates the canvas while opening.

    Raises: ImageSizeError.
    """
    kind, size = start[12:16], start[20:]
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP" or len(size) < 10:
        return
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(part, "little") for part in (size[4:7], size[7:10]))
    elif kind == b"VP8L":
        bits = int.from_bytes(size[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (
            int.from_bytes(part, "little") & 0x3FFF for part in (size[6:8], size[8:10])
        )
    check_pixels(width, height, name)


def check_tile(image: Any, name: str) -> None:
    """Check the tile of an open TIFF, which is decoded whole even if the image is smaller.

    Raises: ImageSizeError.
    """
    width, height = (image.tag_v2.get(tag) for tag in _TIFF_TILE)
    if isinstance(width, int) and isinstance(height, int):
        check_pixels(width, height, f"a tile of {name}")


class Room:
    """Counts the pixels of the images in use, so that all of them together stay in the limit."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.n_used = 0

    @contextlib.contextmanager
    def taken(self, n_pixels: int) -> Iterator[None]:
        """Wait until the images in use leave room for another one of at most the limit.

        A thread that has room must not wait for more, or for a thread that waits.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self.n_used or self.n_used + n_pixels <= max_pixels()
            )
            self.n_used += n_pixels
        try:
            yield
        finally:
            with self._changed:
                self.n_used -= n_pixels
                self._changed.notify_all()


ROOM = Room()
"""The room of this process."""

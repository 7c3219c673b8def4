"""Files that are not what their names say, and what is no file at all."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image


def saved(kind: str) -> bytes:
    """Return a small image in one of Pillow's formats."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 10)).save(file, kind)
    return file.getvalue()


_WMF = b"\xd7\xcd\xc6\x9a\0\0" + bytes([0, 0, 0, 0, 100, 0, 100, 0, 96, 0]) + bytes(6)
_PSD = b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(32)

FOREIGN: dict[str, bytes] = {
    "EPS": saved("EPS"),
    "WMF": _WMF + b"\x01\0\x09\0" + bytes(32),
    "PDF": saved("PDF"),
    "PSD": _PSD,
    "ICO": saved("ICO"),
    "TGA": saved("TGA"),
    "PCX": saved("PCX"),
    "XBM": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x00 };\n",
}
"""Images in formats that are not read, by format."""


def _fifo(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)


def _endless(path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    path.symlink_to("/dev/zero")


NOT_REGULAR: Sequence[Callable[[Path], None]] = (
    pytest.param(_fifo, id="pipe"),  # type: ignore[assignment]
    pytest.param(_endless, id="device"),
)
"""What makes something that is waited for, or that has no end, under a path."""

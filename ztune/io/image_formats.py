"""Recognise image formats by their first bytes, without a decoder."""

from __future__ import annotations

import re

HEAD = 64
"""Bytes that are enough to recognise a format."""
_STARTS = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", ".jp2"),
    (b"\xff\x4f\xff\x51", ".j2k"),
)
_PNM = re.compile(rb"P[1-6]\s+(#|\d)")
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of its versions
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")


def format_of(head: bytes) -> str | None:
    """Return the usual suffix of the format of a file that starts with `head`, None if unknown."""
    for start, suffix in _STARTS:
        if head.startswith(start):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return ".bmp"
    if head[4:8] == b"ftyp":
        # A file may be of several brands, the first of which may be the general one.
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(len(head), head[3]), 4))}
        return ".avif" if brands & {*_AVIF} else ".heic" if brands & {*_HEIF} else None
    return ".ppm" if _PNM.match(head) else None

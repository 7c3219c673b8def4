"""Count what reading converts, and read levels above 8 bits by the rule of docs/images.md."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes.conversions import CONVERSIONS, count_conversions, report_conversions
from runtimes.preprocess import read_image_file, with_image
from ztune.errors import DataError, ZtuneWarning
from ztune.progress import Silence


class Remarks(Silence):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def remark(self, text: str) -> None:
        self.lines.append(text)


def colours(width: int = 16, height: int = 12) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def ramp(top: int) -> np.ndarray:
    return np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)


def write_png(path: Path, levels: np.ndarray, after: bytes = b"") -> None:
    """Write a PNG of u16[H, W, C], with chunks `after` its pixels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[levels.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts + after + chunk(b"IEND", b""))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("name", "image", "more", "expected"),
    [
        ("a.png", colours(), {}, []),
        ("a.jpg", colours(), {}, []),
        ("a.png", colours().convert("L"), {}, []),
        ("a.png", colours().convert("1"), {}, []),
        ("a.png", colours().convert("RGBA"), {}, ["alpha"]),
        ("a.png", colours().convert("LA"), {}, ["alpha"]),
        ("a.png", colours(), {"transparency": (1, 2, 3)}, ["alpha"]),
        ("a.png", colours().convert("P"), {}, ["palette"]),
        ("a.png", colours().convert("P"), {"transparency": 0}, ["alpha", "palette"]),
        ("a.jpg", colours(), {"exif": oriented(6)}, ["orientation"]),
        ("a.jpg", colours(), {"exif": oriented(1)}, []),
        ("a.png", colours(), {"exif": oriented(3)}, ["orientation"]),
        ("a.jpg", colours().convert("CMYK"), {}, ["cmyk"]),
        ("a.tif", colours().convert("CMYK"), {}, ["cmyk"]),
        ("a.gif", colours().convert("P"), {"save_all": True, "append_images": [colours(9, 9)]},
         ["palette", "first_frame"]),
        ("a.png", colours(), {"save_all": True, "append_images": [colours().rotate(180)]},
         ["first_frame"]),
        ("a.webp", colours(), {"save_all": True, "append_images": [colours().rotate(180)]},
         ["first_frame"]),
        ("a.tif", colours(), {"save_all": True, "append_images": [colours()]}, ["first_frame"]),
        ("a.mpo", colours(), {"save_all": True, "append_images": [colours()]}, ["first_frame"]),
        ("a.png", Image.fromarray(ramp(65535)), {}, ["grey_16_bit"]),
        ("a.tif", Image.fromarray(ramp(4096)), {}, ["grey_16_bit"]),
        ("a.png", Image.fromarray(ramp(4095)), {}, ["grey_12_bit"]),
        ("a.tif", Image.fromarray(ramp(1023)), {}, ["grey_12_bit"]),
        ("a.pgm", Image.fromarray(ramp(256)), {}, ["grey_12_bit"]),
        ("a.png", Image.fromarray(ramp(255)), {}, ["grey_8_bit"]),
        ("a.tif", Image.fromarray(ramp(255).astype(np.int32)), {}, ["grey_8_bit"]),
        ("a.png", Image.fromarray(ramp(0)), {}, ["grey_16_bit"]),
    ],
)  # fmt: skip
def test_every_conversion_is_counted(
    name: str, image: Image.Image, more: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    image.save(tmp_path / name, **more)
    counts = count_conversions([tmp_path / name, tmp_path / name])
    read_image_file(tmp_path / name)
    assert counts == {rule: 2 for rule in CONVERSIONS if rule in expected}
    assert len(counts) == len(expected)


@pytest.mark.parametrize("n_bands", [2, 3, 4])
def test_16_bit_colours(n_bands: int, tmp_path: Path) -> None:
    levels = np.repeat(ramp(65535)[..., None], n_bands, axis=2)
    write_png(tmp_path / "a.png", levels)
    assert "colour_16_bit" in count_conversions([tmp_path / "a.png"])
    np.testing.assert_array_equal(
        np.asarray(read_image_file(tmp_path / "a.png"))[..., 0], levels[..., 0] >> 8
    )


@pytest.mark.parametrize("n_bands", [2, 3, 4])
@pytest.mark.parametrize("top", [255, 1023, 4095])
def test_16_bit_colours_that_would_be_black_are_refused(
    n_bands: int, top: int, tmp_path: Path
) -> None:
    levels = np.repeat(ramp(top)[..., None], n_bands, axis=2)
    if n_bands % 2 == 0:
        levels[..., -1] = 65535  # opaque
    write_png(tmp_path / "a.png", levels)
    with pytest.raises(DataError, match=r"a\.png.* no level of its 16-bit colours is above 4095"):
        read_image_file(tmp_path / "a.png")


@pytest.mark.parametrize("mark", ["eXIf", "tEXt"])
def test_metadata_after_the_pixels_is_found(mark: str, tmp_path: Path) -> None:
    exif = oriented(6).tobytes().removeprefix(b"Exif\0\0")
    after = chunk(b"eXIf", exif)
    if mark == "tEXt":
        text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
        after = chunk(b"tEXt", b"Raw profile type exif\0" + text)
    write_png(tmp_path / "a.png", np.repeat(ramp(65535)[:6, :, None], 3, axis=2), after)
    assert "orientation" in count_conversions([tmp_path / "a.png"])
    assert read_image_file(tmp_path / "a.png").size == (6, 8)


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_levels_keep_their_range(top: int, suffix: str, tmp_path: Path) -> None:
    levels = ramp(top)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    read = np.asarray(read_image_file(tmp_path / f"a.{suffix}"))[..., 0]
    assert (read.min(), read.max()) == (0, 255)
    np.testing.assert_allclose(read, levels * (255 / top), atol=0.51)


def test_images_in_memory_are_counted_and_read_alike(tmp_path: Path) -> None:
    image = Image.fromarray(ramp(4095))
    image.save(tmp_path / "a.png")
    assert count_conversions([image, np.zeros((4, 4, 3), np.uint8)]) == {"grey_12_bit": 1}
    own = with_image(image, "image", lambda own: own)
    np.testing.assert_array_equal(own, read_image_file(tmp_path / "a.png"))


def test_unreadable_images_count_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    assert count_conversions([tmp_path / "a.png", tmp_path / "b.png"]) == {}


def test_what_is_reported() -> None:
    said = Remarks()
    report_conversions({}, "images", said)
    assert said.lines == []
    report_conversions({"alpha": 2, "orientation": 1}, "images", said)
    assert said.lines == [
        "images: 2 with transparency (ignored), 1 with EXIF orientation (applied); "
        "see docs/images.md"
    ]
    with pytest.warns(ZtuneWarning, match=r"images: 3 in 16-bit greyscale .* 12-bit data"):
        report_conversions({"grey_12_bit": 2, "grey_8_bit": 1}, "images", said)

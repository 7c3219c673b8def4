"""Small files that would take gigabytes are refused from their headers, before decoding."""

import io
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from runtimes import preprocess
from runtimes.preprocess import (
    convert_image,
    decoded_file,
    random_view,
    read_image_file,
    read_view,
    with_image,
)
from tests.conftest import DIGITS, MINI, Command
from tests.runtimes.test_preprocess import make_bomb, make_spec
from ztune.errors import ConfigError, DataError, ImageSizeError
from ztune.io.pixel_limit import ROOM, VARIABLE, Room

SIZE = (120, 100)


def _encode() -> dict[str, bytes]:
    """Return an image of SIZE in every format that this Pillow writes."""
    grey16 = Image.fromarray(np.zeros(SIZE[::-1], np.uint16))
    formats = {
        "JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "JPEG2000": {},
        "WEBP": {}, "WEBP lossless": {"lossless": True}, "AVIF": {},
    }  # fmt: skip
    made = {}
    for name, options in formats.items():
        kind = name.split()[0]
        if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
            continue
        content = io.BytesIO()
        Image.new("RGB", SIZE, (1, 2, 3)).save(content, kind, **options)
        made[name] = content.getvalue()
    for name, kind, image, more in (
        ("PNG of 16 bits", "PNG", grey16, {}),
        ("TIFF of 16 bits", "TIFF", grey16, {}),
        ("WEBP with alpha", "WEBP", Image.new("RGBA", SIZE, (1, 2, 3, 4)), {}),
        ("animated GIF", "GIF", Image.new("P", SIZE), {"append_images": [Image.new("P", SIZE, 1)]}),
    ):
        content = io.BytesIO()
        image.save(content, kind, save_all="append_images" in more, **more)
        made[name] = content.getvalue()
    return made


ENCODED = _encode()


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a limit that SIZE exceeds."""
    monkeypatch.setenv(VARIABLE, "9999")


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("an image above the limit was decoded")

    for kind in [Image.Image, *{type(Image.open(io.BytesIO(c))) for c in ENCODED.values()}]:
        monkeypatch.setattr(kind, "load", load)


@pytest.mark.parametrize("name", ENCODED)
def test_an_image_above_the_limit_is_refused_before_decoding(
    name: str, tmp_path: Path, low: None, no_decoder: None
) -> None:
    path = tmp_path / "large"
    path.write_bytes(ENCODED[name])
    with pytest.raises(ImageSizeError) as caught:
        read_image_file(path)
    assert str(caught.value) == (
        f'image "{path}" has 120 x 100 = 12000 pixels, expected at most 9999 (scale it down, or '
        "allow more: `max_pixels`, ZTUNE_MAX_PIXELS in the environment)"
    )


@pytest.mark.parametrize("name", ENCODED)
def test_an_image_at_the_limit_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "12000")
    (tmp_path / "large").write_bytes(ENCODED[name])
    assert read_image_file(tmp_path / "large").size == SIZE


@pytest.mark.skipif(not features.check("webp"), reason="this Pillow reads no WebP")
@pytest.mark.parametrize("name", [name for name in ENCODED if name.startswith("WEBP")])
def test_no_canvas_is_allocated_for_a_webp_above_the_limit(
    name: str, tmp_path: Path, low: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_nothing(*_: object, **__: object) -> Image.Image:
        raise AssertionError("Pillow opened it")

    monkeypatch.setattr(Image, "open", open_nothing)
    (tmp_path / "a.webp").write_bytes(ENCODED[name])
    with pytest.raises(ImageSizeError, match="120 x 100"):
        read_image_file(tmp_path / "a.webp")


def test_the_default_is_100_million_whatever_pillows_own_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    make_bomb(path)  # of 60000 x 60000
    with pytest.raises(ImageSizeError, match="expected at most 100000000"):
        read_image_file(path)
    # with more allowed, it is a truncated image
    monkeypatch.setenv(VARIABLE, str(10**10))
    monkeypatch.setattr(preprocess, "_upright", lambda _: Image.new("RGB", (1, 1)))
    before = Image.MAX_IMAGE_PIXELS
    assert read_image_file(path).size == (1, 1)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_view_above_pillows_own_limit_has_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8))
    spec = make_spec(16)
    plain = random_view(image, spec, np.random.default_rng(1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    np.testing.assert_array_equal(random_view(image, spec, np.random.default_rng(1)), plain)


@pytest.mark.parametrize("tile", [(4096, 4096), (65536, 65536)])
def test_the_tile_of_a_tiff_counts(tile: tuple[int, int], tmp_path: Path, low: None) -> None:
    data = zlib.compress(bytes(1000))
    entries = [
        (256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, tile[0]), (323, 4, tile[1]), (324, 4, 8), (325, 4, len(data)),
    ]  # fmt: skip
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    ifd = struct.pack("<H", len(entries)) + packed + bytes(4)
    (tmp_path / "a.tif").write_bytes(start + data + ifd)
    with pytest.raises(ImageSizeError, match=rf"a tile of .* {tile[0]} x {tile[1]} = "):
        read_image_file(tmp_path / "a.tif")


def test_an_open_pillow_image_counts_too(low: None, no_decoder: None) -> None:
    image = Image.open(io.BytesIO(ENCODED["PNG"]))
    for read in (convert_image, lambda image, name: with_image(image, name, lambda one: one)):
        with pytest.raises(ImageSizeError, match="image 3 has 120 x 100 = 12000 pixels"):
            read(image, "image 3")


@pytest.mark.parametrize("text", ["0", "-1", "", "many", "1e6", "1.5"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match="expected a positive integer"):
        read_image_file(next(DIGITS.rglob("*.png")))


def test_grey_levels_are_scaled_in_strips_to_the_same_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (37, 23)).astype(np.uint16)
    expected = (levels.astype(np.uint32) * 255 + 32767) // 65535
    for strip in (1, 100, 10**6):
        monkeypatch.setattr(preprocess, "_STRIP", strip)
        grey = np.asarray(convert_image(Image.fromarray(levels), "image"))
        np.testing.assert_array_equal(grey, np.repeat(expected[..., None], 3, axis=2))


# Several at once


def test_images_in_use_count_together() -> None:
    room, most, lock = Room(), [0], threading.Lock()

    def use() -> None:
        for _ in range(20):
            with room.taken(40_000_000):
                with lock:
                    most[0] = max(most[0], room.n_used)
                time.sleep(0.001)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert most[0] == 80_000_000
    assert room.n_used == 0


def test_decoders_and_their_cache_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "25000")  # two images of SIZE
    preprocess._RECENT.clear()
    seen: list[int] = []

    def crop(image: Image.Image, _: object) -> np.ndarray:
        seen.append(ROOM.n_used)
        return np.zeros(1)

    monkeypatch.setattr(preprocess, "crop", crop)
    for n in range(9):
        (tmp_path / f"{n}.png").write_bytes(ENCODED["PNG"])
    threads = [
        threading.Thread(target=read_view, args=(tmp_path / f"{n}.png", make_spec(8), None))
        for n in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 9
    assert max(seen) <= 25_000
    assert ROOM.n_used == 0
    assert sum(image.width * image.height for image in preprocess._RECENT.values()) <= 25_000


def test_room_is_given_back_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(ENCODED["PNG"][:-40])
    with pytest.raises(DataError):
        read_image_file(tmp_path / "cut.png")
    (tmp_path / "a.png").write_bytes(ENCODED["PNG"])
    with (
        pytest.raises(ImageSizeError, match="does not fit into memory"),
        decoded_file(tmp_path / "a.png"),
    ):
        raise MemoryError
    assert ROOM.n_used == 0


@pytest.mark.parametrize("limit", [None, 11_999, 12_000])
def test_the_option_is_named_and_heeded(
    limit: int | None, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "9999")  # restored after the command has set it
    made = ztune("tune", MINI, "--data", DIGITS, "--method", "gda", "--out", tmp_path / "run")
    assert made.code == 0, made.err
    packed = tmp_path / "c.onnx"
    made = ztune("pack", MINI, "--prompt", tmp_path / "run", "--resize", "--out", packed)
    assert made.code == 0, made.err
    (tmp_path / "a.png").write_bytes(ENCODED["PNG"])
    more = [] if limit is None else ["--max-pixels", limit]
    done = ztune("predict", packed, tmp_path / "a.png", *more, "--quiet")
    if limit == 12_000:
        assert done.code == 0, done.err
        return
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert f"expected at most {limit or 9999} (scale it down, or allow more: --max-pixels" in line
    assert "repair" not in line
    skipped = ztune(
        "predict", packed, tmp_path / "a.png", next(DIGITS.rglob("*.png")), *more,
        "--skip-broken", "--json",
    )  # fmt: skip
    assert skipped.json["broken_images"] == 1

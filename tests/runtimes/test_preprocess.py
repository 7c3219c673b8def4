"""Compare preprocessing with open_clip's transform, and read corrupted and unusual images."""

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtimes.bundle import ImageSpec
from runtimes.preprocess import (
    _random_box,
    crop,
    normalise,
    open_image,
    random_view,
    read_image_file,
    with_image,
)
from tests.foreign import FOREIGN, NOT_REGULAR
from ztune.errors import DataError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODES = ("shortest", "longest", "squash")
SIZES = [(1, 1), (7, 5), (48, 48), (49, 48), (64, 48), (31, 97), (300, 199), (640, 481), (8, 400)]


def make_spec(size: int = 48, mode: Any = "shortest", interpolation: Any = "bicubic") -> ImageSpec:
    return ImageSpec(size, MEAN, STD, interpolation, mode, 127)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def reference(spec: ImageSpec, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return open_clip's transform of an image, with its resizes along the width first."""
    transform = pytest.importorskip("open_clip.transform").image_transform(
        spec.size, is_train=False, mean=spec.mean, std=spec.std, resize_mode=spec.resize_mode,
        interpolation=spec.interpolation, fill_color=spec.fill_color,
    )  # fmt: skip
    both_axes = Image.Image.resize

    def one_by_one(one: Image.Image, size: Any, resample: Any, *more: Any) -> Image.Image:
        return both_axes(both_axes(one, (size[0], one.height), resample), size, resample)

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", one_by_one)
        return np.asarray(transform(image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, 37, 224])
def test_equals_open_clip_apart_from_the_order_of_axes(
    mode: str, interpolation: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(size, mode, interpolation)
    for width, height in SIZES:
        image = noise(width, height)
        ours = normalise(crop(image, spec)[None], spec)[0]
        expected = reference(spec, image, monkeypatch)
        np.testing.assert_array_equal(ours, expected, err_msg=f"{width}x{height}")


def test_equals_open_clip_on_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(MODES), st.integers(8, 64))
    def check(width: int, height: int, mode: str, size: int) -> None:
        spec, image = make_spec(size, mode), noise(width, height)
        if mode == "longest" and round(min(width, height) * size / max(width, height)) == 0:
            assert crop(image, spec).shape == (size, size, 3)  # open_clip fails on these
            return
        ours = normalise(crop(image, spec)[None], spec)[0]
        np.testing.assert_array_equal(ours, reference(spec, image, monkeypatch))

    check()


def test_pixels_are_equal_with_every_pillow() -> None:
    """The digest is that of Pillow 10.4, 11.3, 12.3 and 13.0."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    for number in range(60):
        width, height = (int(np.exp(rng.uniform(0, np.log(900)))) for _ in range(2))
        size, image = int(rng.integers(8, 65)), noise(width, height, number)
        for mode in MODES:
            for interpolation in ("bicubic", "bilinear"):
                digest.update(crop(image, make_spec(size, mode, interpolation)).tobytes())
        digest.update(random_view(image, make_spec(size), rng).tobytes())
    assert digest.hexdigest() == (
        "2547670e88ee32fc1ee80a68d40e8ba4a5054c523df444fc28770e4deec23b5f"
    )


def test_equals_open_clip_on_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("ZTUNE_BENCH_DATA")
    if not folder:
        pytest.skip("ZTUNE_BENCH_DATA names no folder of photographs")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    assert files
    for path in files[:: max(1, len(files) // 100)]:
        with open_image(path) as opened:
            image = opened.convert("RGB")
        spec = make_spec(224)
        np.testing.assert_array_equal(crop(read_image_file(path), spec), crop(image, spec))
        np.testing.assert_array_equal(
            normalise(crop(image, spec)[None], spec)[0], reference(spec, image, monkeypatch)
        )


def test_normalise_is_contiguous() -> None:
    spec = make_spec(5)
    result = normalise(np.zeros((3, 5, 5, 3), np.uint8), spec)
    assert result.shape == (3, 3, 5, 5)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert normalise(np.zeros((0, 5, 5, 3), np.uint8), spec).shape == (0, 3, 5, 5)


# Reading


def test_alpha_is_dropped_as_by_open_clip(tmp_path: Path) -> None:
    image = noise(9, 7).convert("RGBA")
    image.putalpha(Image.new("L", (9, 7), 3))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), noise(9, 7))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_modes(tmp_path: Path, mode: str) -> None:
    image = noise(16, 12).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    read = read_image_file(path)
    assert (read.mode, read.size) == ("RGB", (16, 12))
    np.testing.assert_array_equal(read, Image.open(path).convert("RGB"))


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_palette_with_transparency(tmp_path: Path, transparency: object) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert np.asarray(read_image_file(tmp_path / "a.png")).tolist() == [
        [[10, 20, 30], [40, 50, 60]]
    ]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    read = np.asarray(read_image_file(tmp_path / f"a.{suffix}"))
    assert read[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize("levels", [np.full((2, 2), 1e9, np.int32), np.ones((2, 2), np.float32)])
def test_levels_of_unknown_range_are_refused(tmp_path: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*8-bit or 16-bit"):
        read_image_file(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    # Four quarters with different grey values as stored; EXIF gives the dark one's upright place.
    stored = np.kron(np.array([[10, 80], [150, 220]], np.uint8), np.ones((16, 24), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
        6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored),
    }[orientation]  # fmt: skip
    read = np.asarray(read_image_file(tmp_path / f"a.{suffix}"))[..., 0].astype(int)
    assert read.shape == upright.shape
    assert abs(read - upright).max() <= 2


def test_corrupted_metadata_is_ignored(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), noise(8, 8))
    assert not caught


def make_bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def truncate(path: Path) -> None:
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        (
            "text.jpg",
            lambda p: p.write_text("no image\n"),
            "unknown format (supported: JPEG, MPO, ",
        ),
        ("empty.png", lambda p: p.touch(), "the file is empty"),
        ("cut.jpg", truncate, "truncated"),
        ("cut.png", truncate, ""),
        ("cut.bmp", truncate, ""),
        ("absent.png", lambda p: None, "No such file"),
        ("folder.png", lambda p: p.mkdir(), "directory"),
        ("thin.png", lambda p: Image.new("1", (30000, 2)).save(p), "30000 x 2 pixels"),
    ],
)
def test_unreadable_images_are_named(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot be read: .") as caught:
        read_image_file(tmp_path / name)
    message = str(caught.value)
    assert name in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("shape", [(1, 101, 3), (101, 1, 3), (2, 60000, 3)])
def test_thin_images_in_memory_are_refused(shape: tuple[int, int, int]) -> None:
    levels = np.zeros(shape, np.uint8)
    for image in (levels, Image.fromarray(levels)):
        with pytest.raises(DataError, match=r"image 3 cannot be read: .* at most 100:1"):
            with_image(image, "image 3", lambda own: own)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(8, 8, 0).save(path)
    first = read_image_file(path)
    noise(9, 8, 1).save(path)
    assert read_image_file(path).size != first.size


# Random views


def test_random_views() -> None:
    spec, image = make_spec(16), noise(60, 40)
    views = [random_view(image, spec, np.random.default_rng(seed)) for seed in range(20)]
    again = [random_view(image, spec, np.random.default_rng(seed)) for seed in range(20)]
    np.testing.assert_array_equal(views, again)
    assert {view.shape for view in views} == {(16, 16, 3)}
    assert all(view.flags.c_contiguous for view in views)
    assert len({view.tobytes() for view in views}) == 20


def test_half_of_the_views_are_flipped() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))).convert("RGB")
    views = [random_view(ramp, make_spec(16), np.random.default_rng(seed)) for seed in range(400)]
    n_flipped = sum(int(view[0, 0, 0]) > int(view[0, -1, 0]) for view in views)
    assert 150 < n_flipped < 250


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_random_boxes_are_inside(width: int, height: int, seed: int) -> None:
    left, top, w, h = _random_box(width, height, np.random.default_rng(seed))
    assert w > 0
    assert h > 0
    assert 0 <= left <= width - w
    assert 0 <= top <= height - h


def test_random_boxes_have_torchvisions_distribution() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), noise(120, 80)
    ours = np.array([_random_box(120, 80, rng) for _ in range(4000)])
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    np.testing.assert_allclose(ours.mean(0), theirs[:, [1, 0, 3, 2]].mean(0), atol=2)
    np.testing.assert_allclose(ours.std(0), theirs[:, [1, 0, 3, 2]].std(0), atol=2)


@pytest.mark.parametrize(
    ("name", "plugin"),
    [
        ("JPEG", "JPEG"),
        ("MPO", "JPEG"),
        ("PNG", "PNG"),
        ("GIF", "GIF"),
        ("BMP", "BMP"),
        ("TIFF", "TIFF"),
        ("WEBP", "WEBP"),
        ("AVIF", "AVIF"),
        ("JPEG2000", "JPEG2000"),
        ("PPM", "PPM"),
    ],
)
def test_every_format_of_the_list_is_read(tmp_path: Path, name: str, plugin: str) -> None:
    Image.init()
    if plugin not in Image.OPEN or name not in Image.SAVE:
        pytest.skip(f"this Pillow has no {name}")
    path = tmp_path / "named.wrongly"
    more = {"save_all": True, "append_images": [noise(16, 12, 1)]} if name == "MPO" else {}
    noise(16, 12).save(path, name, **more)
    with Image.open(path, formats=[plugin]) as opened:
        assert opened.format == name
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(read_image_file(path), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_a_compressed_tiff_is_read(tmp_path: Path, compression: str) -> None:
    noise(16, 12).save(tmp_path / "a.tif", compression=compression)
    with Image.open(tmp_path / "a.tif", formats=["TIFF"]) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.tif"), expected)


def test_formats_that_this_pillow_lacks_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "AVIF"})
    noise(9, 7).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.png"), noise(9, 7))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        DataError, match=r"\(supported: JPEG, MPO, PNG, GIF, BMP, TIFF, WebP, JPEG 2000, PNM\)"
    ):
        read_image_file(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", sorted(FOREIGN))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "eps"])
def test_other_formats_are_refused_without_their_decoder(
    tmp_path: Path, kind: str, suffix: str, listed_decoders: None
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(DataError, match=rf'"{path}" cannot be read: unknown format') as caught:
        read_image_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_only_regular_files_are_images(
    tmp_path: Path, make: Callable[[Path], None], in_time: None
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*not a regular file"):
        read_image_file(tmp_path / "a.png")


def test_a_link_to_an_image_is_read(tmp_path: Path) -> None:
    noise(9, 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    np.testing.assert_array_equal(read_image_file(tmp_path / "b.png"), noise(9, 7))

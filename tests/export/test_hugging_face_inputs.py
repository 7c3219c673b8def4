"""Token ids and pixels of transformers' tokenizers and image processors."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from export.clip import load_clip
from export.loaded import LoadedClip
from runtimes.bundle import ImageSpec
from runtimes.preprocess import crop, normalise, read_image_file
from runtimes.tokenizer import Tokenizer, clean
from tests.conftest import DIGITS
from tests.export.hugging_face_models import KINDS, PROCESSORS, SIDE, save
from tests.runtimes.test_preprocess import noise

TEXTS = (
    "a photo of a cat.",
    "",
    "Hello, World!",
    " lead",
    "trail ",
    "a\t b\n c",
    "ÀÉÎ CAFÉ naïve cafe\u0301",
    "DOG's and we'LL 3.14 & 42!?",
    "&amp;lt; fish &amp; chips <b>",
    "😀👩‍👩‍👧🇩🇪 cat",
    "你好 世界，一张照片。",
    "привет ΣΑΣ 한국어 ไทย",
    "½ ² Ⅷ \u0663 ﬁ ﬆ \u017f İ straße ẞ",
    "x\u200by\u00a0z\u3000 a\u2028b \ufeffa x\u00adx",
    "snake_case ▁x ▁ 'quoted' ! ...",
    " ".join(["cat"] * 200),
)
LETTERS = "abc XYZ._-'!,&;#<>▁  \t\nàÀçßıſΣσςﬁ你好，。😀\u3000\x1c\x85한ไ"
Get = Callable[[str], tuple[LoadedClip, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Get:
    @functools.cache
    def get(kind: str) -> tuple[LoadedClip, Path]:
        folder = tmp_path_factory.mktemp("saved") / kind
        save(kind, folder)
        return load_clip(f"local-dir:{folder}"), folder

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, saved: Get) -> None:
    loaded, folder = saved(kind)
    ours = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    drawn = random.Random(0)
    odd = ["".join(drawn.choices(LETTERS, k=drawn.randint(1, 14))) for _ in range(500)]
    for text in (*TEXTS, *odd):
        assert list(ours.sequence(text)) == theirs(text)["input_ids"], repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_that_of_transformers(kind: str, saved: Get) -> None:
    loaded, _ = saved(kind)
    ours = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    texts = ("a photo of a cat", "", "x")
    np.testing.assert_array_equal(
        ours.pad([ours.sequence(text) for text in texts]), loaded.reference.tokenize(texts)
    )


def test_cleaning_of_siglip() -> None:
    assert clean("  A_photo, of\u3000it's&amp;\n▁X ", "siglip") == "aphoto of itsamp x"


def in_one_call(spec: ImageSpec, image: Image.Image) -> Any:
    """Return preprocessed pixels f32[3, S, S]."""
    return normalise(crop(image, spec)[None], spec)[0]


@pytest.fixture
def widths_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow resize the width first, as ztune does whatever the version of Pillow."""
    both_axes = Image.Image.resize

    def one_by_one(one: Image.Image, size: Any, resample: Any = None, **more: Any) -> Image.Image:
        return both_axes(both_axes(one, (size[0], one.height), resample), size, resample, **more)

    monkeypatch.setattr(Image.Image, "resize", one_by_one)


@pytest.mark.usefixtures("widths_first")
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_transformers(kind: str, saved: Get, tmp_path: Path) -> None:
    loaded, _ = saved(kind)
    images = [noise(w, h) for w, h in ((32, 32), (33, 32), (77, 40), (31, 97), (3, 4), (640, 481))]
    images += [noise(3, 200), noise(200, 3)]
    images += [Image.open(path) for path in sorted((DIGITS / "two").iterdir())[:3]]
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image in (
        ("grey.png", noise(45, 70).convert("L")),
        ("alpha.png", noise(50, 41).convert("RGBA")),
        ("turned.jpg", noise(61, 40)),
    ):
        image.save(tmp_path / name, exif=turned if name == "turned.jpg" else b"")
        with Image.open(tmp_path / name) as opened:
            # transformers ignores EXIF's orientation; ztune applies it, as its docs say.
            upright = ImageOps.exif_transpose(opened)
            expected = loaded.reference.preprocess(upright)
        found = in_one_call(loaded.image, read_image_file(tmp_path / name))
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=name)
    for image in images:
        found = in_one_call(loaded.image, image.convert("RGB"))
        expected = loaded.reference.preprocess(image)
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=str(image.size))


@pytest.mark.parametrize("kind", KINDS)
def test_settings_follow_the_image_processor(kind: str, saved: Get) -> None:
    loaded, _ = saved(kind)
    processor = PROCESSORS[kind]
    assert loaded.image.size == SIDE
    np.testing.assert_allclose(loaded.image.mean, processor.image_mean)
    np.testing.assert_allclose(loaded.image.std, processor.image_std)
    cropped = kind in ("clip", "altclip")
    assert loaded.image.resize_mode == ("shortest_floor" if cropped else "squash")
    assert loaded.image.interpolation == ("bilinear" if kind == "siglip2" else "bicubic")

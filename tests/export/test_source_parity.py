"""Ids, pixels and logits against the library that a model comes from."""

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from export.reference import open_clip_preprocess
from export.source_parity import compare_ids, compare_logits, compare_pixels
from runtimes.bundle import ImageSpec
from tests.export.conftest import Exported
from ztune.errors import ZtuneError
from ztune.exporting import summary
from ztune.types import F32


def test_the_manifest_says_what_was_compared(tiny: Exported) -> None:
    _, bundle = tiny
    manifest: Any = bundle.manifest
    found = manifest["source_parity"]
    assert found["library"] == "open_clip"
    assert found["texts"] >= 12
    assert found["images"] == 6
    assert 0 <= found["pixels"] <= 2
    assert 0 < found["logits"] < 1e-4
    assert manifest["activation"] == "GELU"


def test_every_export_prints_what_it_assumes(tiny: Exported) -> None:
    _, bundle = tiny
    lines = summary(bundle)
    assert lines[1:3] == [
        "  images: 64 x 64, resized by shortest, bilinear; mean 0.5 0.4 0.3, std 0.2 0.3 0.4",
        "  texts: 20 tokens, cleaning lower; activation GELU",
    ]
    assert re.match(
        r"  against open_clip: ids of 13 texts equal, pixels of 6 images within [\d.]+ levels of "
        r"255, logits within \d\.\de-0\d",
        lines[3],
    )
    assert lines[4].startswith("  image.onnx against torch: worst cosine 1.0000")


def test_another_tokenizer_is_refused(tiny: Exported) -> None:
    loaded, _ = tiny
    wrong = replace(loaded.text, cleaning="canonicalize")
    with pytest.raises(ZtuneError, match=r"text 'a photo of a cat\.' has ids 49406 .*tokenizer=F"):
        compare_ids(replace(loaded, text=wrong))
    with pytest.raises(ZtuneError, match="has ids"):
        compare_ids(replace(loaded, text=replace(loaded.text, pad_id=1)))


@pytest.mark.parametrize("size", [240, 256, 320])
def test_squashed_noise_is_within_the_limit(tiny: Exported, size: int) -> None:
    given: dict[str, Any] = {"interpolation": "bicubic", "resize_mode": "squash"}
    image = replace(tiny[0].image, size=size, **given)
    settings = {"mean": image.mean, "std": image.std, **given}
    reference = replace(tiny[0].reference, preprocess=open_clip_preprocess(settings, size))
    *_, worst = compare_pixels(replace(tiny[0], image=image, reference=reference))
    assert worst <= 5.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"interpolation": "bicubic"},
        {"resize_mode": "squash"},
        {"resize_mode": "longest"},
        {"mean": (0.4, 0.4, 0.3)},
        {"std": (0.2, 0.3, 0.3)},
    ],
)
def test_another_preprocessing_is_refused(tiny: Exported, wrong: dict[str, Any]) -> None:
    loaded, _ = tiny
    spec: ImageSpec = replace(loaded.image, **wrong)
    with pytest.raises(ZtuneError, match=r"differ from open_clip by \d+\.\d levels of 255"):
        compare_pixels(replace(loaded, image=spec))


def test_another_size_is_refused(tiny: Exported) -> None:
    loaded, _ = tiny

    def preprocess(image: Image.Image) -> F32:
        return loaded.reference.preprocess(image)[:, 1:, 1:]

    smaller = replace(loaded.reference, preprocess=preprocess)
    with pytest.raises(ZtuneError, match=r"pixels \[3, 64, 64\], open_clip makes \[3, 63, 63\]"):
        compare_pixels(replace(loaded, reference=smaller))


def test_other_logits_are_refused(tiny: Exported) -> None:
    loaded, bundle = tiny
    ids = compare_ids(loaded)
    ours, expected, levels = compare_pixels(loaded)
    assert compare_logits(loaded, bundle.path, ids, (ours, expected, levels)).logits < 1e-4
    model: Any = copy.deepcopy(loaded.model)
    model.text_projection[:, 0] += 0.1
    with pytest.raises(ZtuneError, match="zero-shot logits differ from open_clip by"):
        compare_logits(replace(loaded, model=model), bundle.path, ids, (ours, expected, levels))

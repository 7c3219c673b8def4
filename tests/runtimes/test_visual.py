"""Compare visual prompts on the embedded bundle with the papers' formulas in numpy."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from export.quantize import quantize_bundle
from runtimes import visual
from runtimes.bundle import IMAGE_PROMPTED, load_bundle
from runtimes.decoder import Decoder, initial_values, n_values
from runtimes.ort import OrtImageEncoder
from runtimes.providers import Execution, open_session, run_graph
from runtimes.visual import (
    BorderPrompts,
    DecoderPrompts,
    PromptedViews,
    TokenPrompts,
    VisualPrompts,
    inner_side,
)
from tests.conftest import MINI
from ztune.errors import ConfigError, FormatError
from ztune.types import F32, U8, Batch

CPU = Execution()
BUNDLE = load_bundle(MINI)
SPEC = BUNDLE.image
S = SPEC.size
K = 40  # features of another extractor than the bundle's
N_VALUES = n_values(K, S)


def images(n: int, seed: int = 0) -> tuple[U8, F32]:
    """Return pixels u8[n, S, S, 3] and an extractor's features f32[n, K]."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, S, S, 3), dtype=np.uint8)
    return pixels, rng.standard_normal((n, K)).astype(np.float32)


def opened(kind: str) -> VisualPrompts:
    if kind == "border":
        return BorderPrompts(BUNDLE, CPU)
    return DecoderPrompts(BUNDLE, CPU, K) if kind == "decoder" else TokenPrompts(BUNDLE, CPU)


def candidates(kind: str, n: int, seed: int = 1) -> F32:
    rng = np.random.default_rng(seed)
    if kind == "decoder":
        return np.stack([initial_values(K, S, rng) for _ in range(n)]).astype(np.float32)
    shape = (3, S, S) if kind == "border" else (5, 128)
    return rng.standard_normal((n, *shape)).astype(np.float32)


def tower(pixels: Any) -> Any:
    """Return features of pixels f64[N, S, S, 3] in 0…1, one image at a time."""
    session = open_session(BUNDLE.file("image.onnx"), CPU)
    planes = ((pixels - SPEC.mean) / SPEC.std).transpose(0, 3, 1, 2).astype(np.float32)
    runs = [run_graph(session, "image.onnx", None, {"pixels": one[None]})[0] for one in planes]
    return np.concatenate(runs)


def test_a_border_surrounds_a_shrunk_image() -> None:
    pixels, features = images(3)
    values = candidates("border", 2)
    values[1, :, 0, 0] = -200, 200, 0  # black, white and grey, without overflow
    side = 20
    margin = (S - side) // 2
    expected = []
    for border in values.astype(np.float64):
        frame = 1 / (1 + np.exp(-border.transpose(1, 2, 0)))
        shown = np.stack([frame] * len(pixels))
        for canvas, image in zip(shown, pixels, strict=True):
            small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            canvas[margin : margin + side, margin : margin + side] = np.asarray(small) / 255
        expected.append(tower(shown))
    prompts = BorderPrompts(BUNDLE, CPU)
    encoded = prompts.encode(values, pixels, features)
    assert encoded.shape == (2, 3, BUNDLE.embed_dim)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    # Border values behind the image have no effect.
    hidden, frame = values.copy(), values.copy()
    hidden[:, :, margin : S - margin, margin : S - margin] += 1
    assert prompts.encode(hidden, pixels, features).tobytes() == encoded.tobytes()
    frame[:, :, margin - 1] += 1
    assert np.abs(prompts.encode(frame, pixels, features) - encoded).max() > 1e-3


@pytest.mark.parametrize(("size", "inner"), [(224, 194), (24, 20), (336, 292), (225, 195), (3, 1)])
def test_margins_are_equal_and_of_the_published_size(size: int, inner: int) -> None:
    assert inner_side(size) == inner


def test_a_decoders_perturbation_is_added_and_clipped() -> None:
    pixels, features = images(4)
    values = candidates("decoder", 2)
    decoder = Decoder(K, S, CPU)
    fixed = decoder.statistics(values[0], features[:2])
    fractions = pixels / 255
    for statistics in (None, fixed):
        for strength in (1.0, 0.3, 50.0):  # the last clips nearly everything
            stronger = values.copy()
            stronger[:, -3 * 16 * 4 :] *= strength
            expected = []
            for one in stronger:
                by = decoder.statistics(one, features) if statistics is None else statistics
                added = decoder(one, features, by).transpose(0, 2, 3, 1)
                expected.append(tower(np.clip(fractions + added * SPEC.std, 0, 1)))
            prompts = DecoderPrompts(BUNDLE, CPU, K, statistics)
            encoded = prompts.encode(stronger, pixels, features)
            np.testing.assert_allclose(encoded, expected, atol=2e-5)
    by_batch = DecoderPrompts(BUNDLE, CPU, K)
    assert by_batch.statistics(values[0], features[:2]).tobytes() == fixed.tobytes()
    plain = OrtImageEncoder(BUNDLE, CPU).encode(pixels)
    assert np.abs(encoded - plain).max() > 1e-2
    silent = values.copy()
    silent[:, -3 * 16 * 4 :] = 0
    encoded = by_batch.encode(silent, pixels, features)
    np.testing.assert_allclose(encoded, [plain, plain], atol=1e-5)


def test_with_fixed_statistics_an_image_does_not_depend_on_the_batch() -> None:
    pixels, features = images(6)
    values = candidates("decoder", 1)
    fixed = Decoder(K, S, CPU).statistics(values[0], features)
    by_batch, alone = DecoderPrompts(BUNDLE, CPU, K), DecoderPrompts(BUNDLE, CPU, K, fixed)
    six, two = (alone.encode(values, pixels[:n], features[:n])[0, :2] for n in (6, 2))
    np.testing.assert_allclose(six, two, atol=1e-5)
    six, two = (by_batch.encode(values, pixels[:n], features[:n])[0, :2] for n in (6, 2))
    assert np.abs(six - two).max() > 1e-4


def test_tokens_equal_the_graph() -> None:
    pixels, features = images(3)
    values = candidates("tokens", 4)
    session = open_session(BUNDLE.file(IMAGE_PROMPTED), CPU)
    planes = ((pixels / 255 - SPEC.mean) / SPEC.std).transpose(0, 3, 1, 2).astype(np.float32)
    (expected,) = session.run(None, {"pixels": planes, "tokens": values})
    encoded = TokenPrompts(BUNDLE, CPU).encode(values, pixels, features)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["border", "decoder", "tokens"])
def test_calls_are_bounded_and_candidates_independent(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def record(session: Any, path: Path, outputs: Any, feeds: Any) -> Any:
        sizes.append((len(feeds["pixels"]), len(feeds.get("tokens", [0]))))
        return run_graph(session, path, outputs, feeds)

    pixels, features = images(11)
    values = candidates(kind, 3)
    whole = opened(kind).encode(values, pixels, features)
    monkeypatch.setattr(visual, "_CHUNK_CPU", 4)
    monkeypatch.setattr(visual, "run_graph", record)
    prompts = opened(kind)
    encoded = prompts.encode(values, pixels, features)
    assert sizes == [(4, 1)] * 9  # 11 images in calls of 4, the last one padded
    np.testing.assert_allclose(encoded, whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=-1), 1, atol=1e-5)
    assert np.abs(encoded[0] - encoded[1]).max() > 1e-3
    alone = np.concatenate([prompts.encode(one[None], pixels, features) for one in values])
    assert alone.tobytes() == encoded.tobytes()


def test_images_of_a_batch_are_selected_by_view_and_index() -> None:
    class Recorded:
        def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
            assert (pixels[:, 0, 0, 0] == features[:, 0]).all()
            return np.asarray(visual.sum() + features[None], dtype=np.float32)

    n_views, n = 2, 5
    number = np.arange(n_views * n).reshape(n_views, n)
    pixels = np.zeros((n_views, n, 2, 2, 3), np.uint8) + number[..., None, None, None]
    prompted = PromptedViews(
        Recorded(), pixels.astype(np.uint8), number[..., None].astype(np.float32)
    )
    batch = Batch(np.array([4, 0, 3]), np.array([1, 0, 0]), 1)
    encoded = prompted.encode(np.ones((1, 2), np.float32), batch)
    assert encoded[0, :, 0].tolist() == [2 + 9, 2 + 0, 2 + 3]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("border", (1, 3, S, S - 1), r"borders are .* expected \[P, 3, 24, 24\]"),
        ("border", (3, S, S), "borders are"),
        ("decoder", (1, N_VALUES - 1), r"decoder `values` is"),
        ("tokens", (1, 2, 127), r"image tokens are .* expected \[P, n, 128\]"),
        ("tokens", (1, 0, 128), "image tokens are"),
        ("tokens", (2, 128), "image tokens are"),
    ],
)
def test_candidates_of_another_shape_are_refused(
    kind: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(kind).encode(np.zeros(shape, np.float32), *images(2))


def test_a_bundle_without_the_graph_is_refused() -> None:
    without = msgspec.structs.replace(BUNDLE, visual=None)
    with pytest.raises(FormatError, match=r"has no image_prompted\.onnx.*`image_tokens`"):
        TokenPrompts(without, CPU)


def test_int8_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    bundle = quantize_bundle(BUNDLE, tmp_path / "int8", "int8")
    prompts = BorderPrompts(bundle, CPU)
    pixels, features = images(4)
    values = candidates("border", 1)
    together = prompts.encode(values, pixels, features)
    alone = [prompts.encode(values, pixels[i : i + 1], features) for i in range(4)]
    assert together.tobytes() == np.concatenate(alone, 1).tobytes()

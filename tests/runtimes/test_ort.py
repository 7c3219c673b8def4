"""ONNX Runtime on the embedded bundle, and providers that must not fail silently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import providers
from runtimes.bundle import load_bundle
from runtimes.ort import OrtImageEncoder, OrtPromptEncoder, OrtTextEncoder, parity_on_this_machine
from runtimes.prompts import context_of_words, template_tokens
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import ProviderError, ZtuneError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_picture_has_the_same_features_whatever_shares_its_batch() -> None:
    bundle = load_bundle(MINI)
    encoder = OrtImageEncoder(bundle, "cpu")
    rng = np.random.default_rng(0)
    shape = (16, bundle.image.size, bundle.image.size, 3)
    picture = rng.integers(0, 256, shape[1:], dtype=np.uint8)
    seen = set()
    for place in range(16):
        batch = rng.integers(0, 256, shape, dtype=np.uint8)
        batch[place] = picture
        seen.add(encoder.encode(batch)[place].tobytes())
    assert len(seen) == 1


def test_prompt_and_text_graphs_agree_on_the_same_words() -> None:
    bundle = load_bundle(MINI)
    tokenizer = Tokenizer(bundle)
    context = context_of_words(bundle, tokenizer, "a photo of the digit")
    by_prompt = OrtPromptEncoder(bundle, tokenizer, DIGITS, len(context), "cpu").encode(
        np.stack([context, context])
    )
    tokens = template_tokens(bundle, tokenizer, "a photo of the digit {}.", DIGITS)
    by_text = OrtTextEncoder(bundle, "cpu").encode(tokens)
    np.testing.assert_allclose(by_prompt[0], by_text, atol=1e-5)
    np.testing.assert_array_equal(by_prompt[0], by_prompt[1])


def test_many_candidates_are_sent_in_parts_of_a_fixed_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = load_bundle(MINI)
    tokenizer = Tokenizer(bundle)
    contexts = np.random.default_rng(1).standard_normal((7, 4, bundle.text.width))
    whole = OrtPromptEncoder(bundle, tokenizer, DIGITS, 4, "cpu").encode(
        contexts.astype(np.float32)
    )
    monkeypatch.setattr("runtimes.ort._TOKENS_PER_CALL", 2 * 40)
    parts = OrtPromptEncoder(bundle, tokenizer, DIGITS, 4, "cpu").encode(
        contexts.astype(np.float32)
    )
    np.testing.assert_allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize("graph", ["image", "text", "prompt"])
def test_the_embedded_bundle_is_what_torch_computed(graph: str) -> None:
    figures = parity_on_this_machine(load_bundle(MINI), graph, "cpu")
    assert figures["max_abs"] < 1e-5
    assert figures["cosine"] > 1 - 1e-6


class CpuOnly:
    """A session that was asked for CUDA and silently stayed on the CPU."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def pretend_cuda_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = providers.onnxruntime()
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)


def test_a_silent_fallback_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda_is_listed(monkeypatch)
    monkeypatch.setattr(providers.onnxruntime(), "InferenceSession", CpuOnly)
    with pytest.raises(ProviderError, match=r"cuda was asked for, but .* runs on CPUExecution"):
        providers.open_session(b"", "cuda")


def test_matrix_products_on_another_provider_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = providers.open_session
    monkeypatch.setattr(
        providers, "open_session", lambda graph, _, **more: real(graph, "cpu", **more)
    )
    with pytest.raises(ProviderError, match="ran elsewhere: MatMul on CPUExecutionProvider"):
        providers.probe("cuda")
    providers.probe("cpu")


def test_auto_falls_back_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda_is_listed(monkeypatch)
    monkeypatch.setattr(providers.onnxruntime(), "InferenceSession", CpuOnly)
    name, why = providers.resolve("auto")
    assert name == "cpu"
    assert "cuda did not run: provider cuda was asked for" in why


def test_a_provider_that_is_not_built_in_is_an_error() -> None:
    if "CUDAExecutionProvider" in providers.onnxruntime().get_available_providers():
        pytest.skip("this build of onnxruntime has CUDA")
    with pytest.raises(ProviderError, match="provider cuda is not in this build"):
        providers.resolve("cuda")


@pytest.mark.gpu
def test_cuda_really_runs_the_bundle() -> None:
    if "CUDAExecutionProvider" not in providers.onnxruntime().get_available_providers():
        pytest.skip("no onnxruntime-gpu here")
    providers.probe("cuda")
    bundle = load_bundle(MINI)
    for graph in ("image", "text", "prompt"):
        assert parity_on_this_machine(bundle, graph, "cuda")["max_abs"] < 1e-4
    encoder = OrtPromptEncoder(bundle, Tokenizer(bundle), DIGITS, 8, "cuda")
    assert np.isfinite(encoder.encode(np.zeros((3, 8, bundle.text.width), np.float32))).all()


def test_an_unreadable_graph_is_one_line(tmp_path: Path) -> None:
    graph = tmp_path / "x.onnx"
    graph.write_bytes(b"nothing")
    with pytest.raises(ProviderError, match=r"x\.onnx cannot be opened on cpu: ") as caught:
        providers.open_session(graph, "cpu")
    assert "\n" not in str(caught.value)


def test_a_graph_that_fails_while_running_is_named_in_one_line() -> None:
    bundle = load_bundle(MINI)
    S = bundle.image.size
    with pytest.raises(ZtuneError, match=r"image\.onnx failed while running: ") as caught:
        OrtImageEncoder(bundle, "cpu").encode(np.zeros((1, S + 1, S, 3), np.uint8))
    with pytest.raises(ZtuneError, match=r"text\.onnx failed while running: "):
        OrtTextEncoder(bundle, "cpu").encode(np.full((1, 3), 10**9))
    assert "\n" not in str(caught.value)


def test_features_are_kept_under_all_that_moves_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity() -> str:
        return OrtImageEncoder(load_bundle(MINI), "cpu").identity

    seen = {identity(), identity()}
    monkeypatch.setattr("runtimes.ort.PREPROCESS_VERSION", 2)
    seen.add(identity())
    monkeypatch.setattr("PIL.__version__", "0")
    seen.add(identity())
    assert len(seen) == 3

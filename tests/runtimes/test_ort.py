"""ONNX Runtime on the embedded bundle, and providers that must not fail silently."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import providers
from runtimes.bundle import load_bundle
from runtimes.ort import OrtImageEncoder, OrtPromptGraph, parity_on_this_machine
from runtimes.prompts import embed_words
from runtimes.providers import Execution
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI, SESSION_OPTIONS
from ztune.errors import ConfigError, ProviderError, ZtuneError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CPU = Execution("cpu")


def test_an_images_features_do_not_depend_on_its_batch() -> None:
    bundle = load_bundle(MINI)
    encoder = OrtImageEncoder(bundle, CPU)
    rng = np.random.default_rng(0)
    shape = (16, bundle.image.size, bundle.image.size, 3)
    image = rng.integers(0, 256, shape[1:], dtype=np.uint8)
    seen = set()
    for place in range(16):
        batch = rng.integers(0, 256, shape, dtype=np.uint8)
        batch[place] = image
        seen.add(encoder.encode(batch)[place].tobytes())
    assert len(seen) == 1


def prompt_graph(execution: Execution = CPU) -> OrtPromptGraph:
    bundle = load_bundle(MINI)
    return OrtPromptGraph(bundle, Tokenizer(bundle), execution)


@pytest.mark.parametrize("template", ["a photo of the digit {}.", "{}.", "the {}, drawn by hand."])
def test_prompt_and_text_graphs_agree_on_the_same_words(template: str) -> None:
    graph = prompt_graph()
    tokenizer = Tokenizer(graph.bundle)
    tokens = tokenizer.pad([tokenizer.sequence(template.format(name)) for name in DIGITS])
    text = providers.open_session(graph.bundle.file("text.onnx"), CPU)
    (expected,) = providers.run_graph(text, "text.onnx", ["features"], {"tokens": tokens})
    np.testing.assert_allclose(graph.encode_template(template, DIGITS), expected, atol=1e-5)


def test_words_as_a_context_are_the_template() -> None:
    graph = prompt_graph()
    context = embed_words(graph.bundle, Tokenizer(graph.bundle), "a photo of the digit")
    features = graph.encoder(DIGITS, len(context), 2).encode(np.stack([context, context]))
    expected = graph.encode_template("a photo of the digit {}.", DIGITS)
    np.testing.assert_allclose(features[0], expected, atol=1e-5)
    np.testing.assert_array_equal(features[0], features[1])


@pytest.mark.parametrize("limit", [2, 1])
def test_a_memory_limit_splits_the_candidate_batch_and_changes_no_result(limit: int) -> None:
    contexts = np.random.default_rng(1).standard_normal((10, 4, 64)).astype(np.float32)
    names = tuple(f"{a} {b}" for a in DIGITS for b in ("hand", "small drawn shape"))
    whole = prompt_graph().encoder(names, 4, 10)
    cut = prompt_graph(Execution("cpu", memory_limit=limit)).encoder(names, 4, 10)
    assert whole.plan.n_candidates == 10
    assert (cut.plan.n_candidates, len(cut.plan.groups)) != (10, 1)
    expected = whole.encode(contexts)
    np.testing.assert_allclose(cut.encode(contexts), expected, atol=1e-6)
    np.testing.assert_allclose(cut.encode(contexts[:3]), expected[:3], atol=1e-6)
    assert cut.encode(contexts).tobytes() == cut.encode(contexts).tobytes()


def test_returned_features_are_not_overwritten() -> None:
    encoder = prompt_graph().encoder(DIGITS, 4, 1)
    contexts = np.random.default_rng(2).standard_normal((2, 1, 4, 64)).astype(np.float32)
    first = encoder.encode(contexts[0])
    kept = first.copy()
    encoder.encode(contexts[1])
    assert first.tobytes() == kept.tobytes()


@pytest.mark.parametrize(("threads", "spins"), [(None, None), (1, "0")])
def test_a_given_number_of_threads_does_not_spin(
    threads: int | None, spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers.onnxruntime(), "SessionOptions", SESSION_OPTIONS)
    graph = load_bundle(MINI).file("prompt.onnx")
    options = providers.open_session(graph, Execution("cpu", threads)).get_session_options()
    assert options.intra_op_num_threads == (threads or 0)
    if spins:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    with pytest.raises(ConfigError, match=r"`threads` is 0, expected at least 1"):
        Execution("cpu", threads=0)
    with pytest.raises(ConfigError, match=r"`memory_limit` is -5, expected at least 1"):
        Execution("cpu", memory_limit=-5)


@pytest.mark.parametrize("graph", ["image", "text", "prompt"])
def test_the_embedded_bundle_is_what_torch_computed(graph: str) -> None:
    figures = parity_on_this_machine(load_bundle(MINI), graph, CPU)
    assert figures["max_abs"] < 1e-5
    assert figures["cosine"] > 1 - 1e-6


class CpuOnly:
    """A session that silently fell back from CUDA to the CPU."""

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
    with pytest.raises(ProviderError, match=r"cuda was requested, but .* runs on CPUExecution"):
        providers.open_session(b"", Execution("cuda"))


def test_matrix_products_on_another_provider_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = providers.open_session
    monkeypatch.setattr(providers, "open_session", lambda graph, _, *more: real(graph, CPU, *more))
    with pytest.raises(ProviderError, match="ran elsewhere: MatMul on CPUExecutionProvider"):
        providers.probe("cuda")
    providers.probe("cpu")


def test_auto_reports_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda_is_listed(monkeypatch)
    monkeypatch.setattr(providers.onnxruntime(), "InferenceSession", CpuOnly)
    name, why = providers.resolve("auto")
    assert name == "cpu"
    assert "cuda did not run: provider cuda was requested" in why


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
        assert parity_on_this_machine(bundle, graph, Execution("cuda"))["max_abs"] < 1e-4
    encoder = prompt_graph(Execution("cuda")).encoder(DIGITS, 8, 10)
    assert np.isfinite(encoder.encode(np.zeros((3, 8, bundle.text.width), np.float32))).all()


def test_an_unreadable_graph_is_one_line(tmp_path: Path) -> None:
    graph = tmp_path / "x.onnx"
    graph.write_bytes(b"nothing")
    with pytest.raises(ProviderError, match=r"x\.onnx cannot be opened on cpu: ") as caught:
        providers.open_session(graph, CPU)
    assert "\n" not in str(caught.value)


def test_a_graph_that_fails_while_running_is_named_in_one_line() -> None:
    bundle = load_bundle(MINI)
    S = bundle.image.size
    with pytest.raises(ZtuneError, match=r"image\.onnx failed while running: ") as caught:
        OrtImageEncoder(bundle, CPU).encode(np.zeros((1, S + 1, S, 3), np.uint8))
    with pytest.raises(ZtuneError, match=r"prompt\.onnx failed while running: "):
        prompt_graph().encoder(DIGITS, 4, 1).encode(np.zeros((1, 4, 63), np.float32))
    assert "\n" not in str(caught.value)


def test_the_identity_covers_everything_that_changes_a_pixel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def identity() -> str:
        return OrtImageEncoder(load_bundle(MINI), CPU).identity

    seen = {identity(), identity()}
    monkeypatch.setattr("runtimes.ort.PREPROCESS_VERSION", 0)
    seen.add(identity())
    monkeypatch.setattr("PIL.__version__", "0")
    seen.add(identity())
    assert len(seen) == 3

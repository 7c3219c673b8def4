"""CUDA graphs as far as a CPU can test: when to capture, fixed shapes, and wrong replays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import providers
from runtimes.binding import BoundCall
from runtimes.bundle import load_bundle
from runtimes.capture import capture, symbolic_sizes
from runtimes.ort import OrtPromptEncoder, OrtPromptGraph
from runtimes.plan import Plan, obstacle_to_capture
from runtimes.providers import Execution, Setup, open_session
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import ProviderError, ZtuneError
from ztune.types import F32

NAMES = ("zero", "one and a half", "seven")


def encoder(execution: Execution = Execution()) -> OrtPromptEncoder:  # noqa: B008 - frozen
    bundle = load_bundle(MINI)
    return OrtPromptGraph(bundle, Tokenizer(bundle), execution).encoder(NAMES, 4, 6)


def contexts(n: int, seed: int = 0) -> F32:
    width = load_bundle(MINI).text.width
    return np.random.default_rng(seed).standard_normal((n, 4, width)).astype(np.float32)


def plan(n_candidates: int, n_groups: int) -> Plan:
    groups = tuple(np.array([number]) for number in range(n_groups))
    return Plan(n_candidates, groups, 1.0)


def test_only_candidate_batches_of_equal_calls_on_cuda_are_captured() -> None:
    cuda = Execution("cuda")
    assert obstacle_to_capture(plan(10, 1), 10, cuda) is None
    assert obstacle_to_capture(plan(2, 1), 10, cuda) is None
    assert obstacle_to_capture(plan(10, 4), 10, cuda) == (
        "the classes need 4 calls of different shapes (raise `memory_limit`)"
    )
    assert "10 candidates need calls of different shapes" in str(
        obstacle_to_capture(plan(4, 1), 10, cuda)
    )
    assert obstacle_to_capture(plan(10, 1), 10, Execution("cuda", cuda_graph=False)) == "disabled"
    for other in ("cpu", "tensorrt"):
        assert (
            obstacle_to_capture(plan(10, 1), 10, Execution(other))
            == f"provider {other} does not support CUDA graphs here"
        )


def test_a_cpu_does_not_report_cuda_graphs() -> None:
    own = encoder()
    for seed in range(3):
        own.encode(contexts(6, seed))
    assert own.cuda_graph is None


def test_the_second_candidate_batch_uses_a_session_of_fixed_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Setup] = []

    def record(graph: Path, execution: Execution, setup: Setup | None = None) -> Any:
        opened.append(setup or Setup())
        return open_session(graph, execution, setup)

    expected = [encoder().encode(contexts(6, seed)) for seed in range(4)]
    monkeypatch.setattr("runtimes.ort.obstacle_to_capture", lambda *_: None)
    monkeypatch.setattr("runtimes.ort.open_session", record)
    own = encoder()
    own._opened()
    assert len(opened) == 1
    got = [own.encode(contexts(6, 0)), own.encode(contexts(6, 1))]
    assert own.cuda_graph == "captured"
    (parts,) = own.encode_on_device(contexts(6, 2))
    got += [np.asarray(parts[0].numpy())[:, np.argsort(own.plan.groups[0])]]
    got += [own.encode(contexts(6, 3))]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(own.encode(contexts(6, 3)[:1]), expected[3][:1], atol=1e-6)
    assert len(opened) == 2
    assert opened[1].capture_sizes is not None
    assert {"P": 6, "m": 4, "C": 3}.items() <= opened[1].capture_sizes.items()
    assert set(opened[1].capture_sizes) == {"P", "m", "T", "C", "n"}


def test_symbolic_sizes_are_those_of_the_graph() -> None:
    session = open_session(load_bundle(MINI).file("text.onnx"), Execution())
    assert symbolic_sizes(session, {"tokens": (5, 24)}) == {"B": 5}
    fixed = open_session(
        load_bundle(MINI).file("text.onnx"), Execution(), Setup(capture_sizes={"B": 5})
    )
    assert fixed.get_inputs()[0].shape == [5, 24]


class Stale:
    """A replay that always returns the captured features, or given ones."""

    def __init__(self, always: F32 | None = None):
        self.encoder = encoder()
        self.features = always

    def run(self, inputs: dict[str, F32]) -> None:
        if self.features is None:
            self.features = self.encoder.encode(inputs["contexts"])

    def __call__(self, inputs: dict[str, F32]) -> F32:
        self.run(inputs)
        assert self.features is not None
        return self.features


@pytest.mark.parametrize("given", [contexts(6), np.zeros((6, 4, 64), np.float32)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replay_that_ignores_its_input_is_not_used(given: F32, precision: str) -> None:
    expected = encoder().encode(given)
    stale: Any = Stale()
    call, said = capture(lambda: stale, given, expected, precision)
    assert call is None
    assert said.startswith("not captured: a replay differs from an ordinary call by ")
    broken: Any = Stale(np.full_like(expected, np.nan))
    assert capture(lambda: broken, given, expected, precision)[0] is None
    right: Any = Stale(expected)
    assert capture(lambda: right, given, expected, precision) == (right, "captured")


def test_a_failed_capture_is_reported_and_the_run_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ProviderError("prompt.onnx cannot be opened on cuda: a node is on the host")

    expected = encoder().encode(contexts(6))
    own = encoder()
    own._opened()
    own._to_capture = True
    monkeypatch.setattr("runtimes.ort.open_session", refuse)
    for _ in range(3):
        np.testing.assert_array_equal(own.encode(contexts(6)), expected)
    assert own.cuda_graph == (
        "not captured: prompt.onnx cannot be opened on cuda: a node is on the host"
    )


def test_a_failed_allocation_names_the_graph() -> None:
    graph = load_bundle(MINI).file("text.onnx")
    session = open_session(graph, Execution())
    with pytest.raises(ZtuneError, match=r"text\.onnx failed while running: "):
        BoundCall(session, graph, "cpu", {"no such input": np.zeros(1)}, {}, (1, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_candidate_batch_is_captured_on_cuda(precision: str, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in providers.onnxruntime().get_available_providers():
        pytest.skip("no onnxruntime-gpu here")
    from export.quantize import quantize_bundle

    bundle = load_bundle(MINI)
    if precision == "fp16":
        bundle = quantize_bundle(bundle, tmp_path / "fp16", "fp16")
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), Execution("cuda"))
    own = graph.encoder(NAMES, 4, 6)
    for seed in range(4):
        expected = encoder().encode(contexts(6, seed))
        tolerance = 1e-4 if precision == "fp32" else 2e-3
        np.testing.assert_allclose(own.encode(contexts(6, seed)), expected, atol=tolerance)
    assert own.cuda_graph == "captured"

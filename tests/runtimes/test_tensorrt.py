"""TensorRT as far as it can be tested without it: provider options and errors."""

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtimes import providers, tensorrt
from runtimes.bundle import load_bundle
from runtimes.classifier import open_classifier
from runtimes.ort import OrtImageEncoder, OrtPromptGraph, parity_on_this_machine
from runtimes.providers import Execution, Setup, check_precision
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import ProviderError
from ztune.io.files import user_cache

GRAPH = MINI / "text.onnx"
BUILDING = "building the TensorRT engine for text.onnx; the first time this can take ten minutes"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pretend that TensorRT is built in; return the providers of opened sessions."""
    ort = providers.onnxruntime()
    names = list(providers.NAMES.values())
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    opened: list[Any] = []
    real = ort.InferenceSession

    def pretended(source: Any, sess_options: Any, providers: Any) -> Any:
        opened.append(providers)
        session = real(source, sess_options=sess_options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [name for name, _ in providers]
        return session

    monkeypatch.setattr(ort, "InferenceSession", pretended)
    return opened


def test_engines_are_private_to_the_user_and_building_is_reported_once() -> None:
    reported: list[str] = []
    calls = [{"tokens": (8, 24)}, {"tokens": (1, 24)}, {"tokens": (5, 24)}]
    options = tensorrt.options(GRAPH, calls, reported.append)
    assert reported == [BUILDING]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == user_cache("tensorrt") == Path(options["trt_timing_cache_path"])
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert options["trt_fp16_enable"] == "False"
    assert options["trt_profile_min_shapes"] == "tokens:1x24"
    assert options["trt_profile_max_shapes"] == "tokens:8x24"
    assert options["trt_profile_opt_shapes"] == "tokens:8x24"
    (folder / "TensorrtExecutionProvider_TRTKernel_1.engine").touch()
    assert tensorrt.options(GRAPH, calls, reported.append) == options
    assert reported == [BUILDING]
    assert "trt_profile_min_shapes" not in tensorrt.options(GRAPH, [], reported.append)
    assert reported == [BUILDING, BUILDING]


def test_profiles_name_every_input() -> None:
    calls = [{"a": (4, 2), "b": (7,)}, {"a": (1, 2), "b": (9,)}]
    options = tensorrt.options(GRAPH, calls, lambda _: None)
    assert options["trt_profile_min_shapes"] == "a:1x2,b:7"
    assert options["trt_profile_max_shapes"] == "a:4x2,b:9"
    assert options["trt_profile_opt_shapes"] == "a:4x2,b:7"


def test_an_engine_follows_place_weights_and_shapes(tmp_path: Path) -> None:
    graph = tmp_path / "text.onnx"
    graph.write_bytes(GRAPH.read_bytes())
    names = {tensorrt.engine_name(path, []) for path in (GRAPH, graph, graph)}
    assert len(names) == 2
    names.add(tensorrt.engine_name(graph, [{"tokens": (2, 24)}]))
    (tmp_path / "text.onnx.data").write_bytes(b"1")
    names.add(tensorrt.engine_name(graph, []))
    (tmp_path / "text.onnx.data").write_bytes(b"2")
    names.add(tensorrt.engine_name(graph, []))
    assert len(names) == 5
    assert all(name.startswith("text-") for name in names)


def test_fp16_is_enabled_for_fp16_graphs(tmp_path: Path) -> None:
    import onnx

    from export.half import to_half

    half = to_half(onnx.load(str(GRAPH)))
    onnx.save(half, str(tmp_path / "text.onnx"))
    for graph in (tmp_path / "text.onnx", half.SerializeToString()):
        assert tensorrt.options(graph, [], lambda _: None)["trt_fp16_enable"] == "True"


def test_a_cache_that_cannot_be_created_reports_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ProviderError, match=r"engine cache .*cannot be created .*set XDG_CACHE_HOME"
    ):
        tensorrt.options(GRAPH, [], lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert user_cache("tensorrt") == Path.home() / ".cache" / "ztune" / "tensorrt"


def test_cuda_follows_tensorrt_and_the_shapes_are_those_of_the_calls(listed: list[Any]) -> None:
    reported: list[str] = []
    execution = Execution("tensorrt", remark=reported.append)
    setup = Setup(calls=({"tokens": (3, 24)},))
    providers.open_session(GRAPH, execution, setup)
    (((first, own), (second, cuda)),) = listed
    assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert own["trt_profile_opt_shapes"] == "tokens:3x24"
    assert cuda["use_tf32"] == "0"
    assert reported == [BUILDING]


def test_prompt_graphs_are_built_for_the_plans_shapes(
    listed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.ort.require_placement", lambda *_: None)
    monkeypatch.setattr("runtimes.binding.DEVICES", {"tensorrt": "cpu", "cpu": "cpu"})
    bundle = load_bundle(MINI)
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), Execution("tensorrt"))
    assert not listed
    own = graph.encoder(("zero", "one hand"), 4, 10)
    ((_, options), _) = listed[0]
    assert options["trt_profile_min_shapes"].startswith("contexts:1x4x64,")
    assert options["trt_profile_opt_shapes"].startswith("contexts:10x4x64,")
    assert "eot_index:2" in options["trt_profile_max_shapes"]
    contexts = np.random.default_rng(0).standard_normal((10, 4, 64)).astype(np.float32)
    cpu = OrtPromptGraph(bundle, Tokenizer(bundle), Execution())
    expected = cpu.encoder(("zero", "one hand"), 4, 10).encode(contexts)
    for _ in range(2):
        np.testing.assert_allclose(own.encode(contexts), expected, atol=1e-6)
    assert own.cuda_graph == "not captured: provider tensorrt does not support CUDA graphs here"


class Profiled:
    """A session whose profile lists where operators ran."""

    def __init__(self, path: Path, ran: dict[str, str]):
        self.path, self.ran = path, ran

    def run(self, *_: Any) -> list[Any]:
        return []

    def end_profiling(self) -> str:
        events = [
            {"args": {"op_name": operator, "provider": where}}
            for operator, where in self.ran.items()
        ]
        self.path.write_text(json.dumps([*events, {"name": "no node"}]))
        return str(self.path)


ENGINE = "TRTKernel_graph_main_graph_123_0"
TRT, CUDA, CPU = providers.NAMES["tensorrt"], providers.NAMES["cuda"], providers.NAMES["cpu"]


@pytest.mark.parametrize(
    ("ran", "elsewhere"),
    [
        ({ENGINE: TRT}, None),
        ({ENGINE: TRT, "Gather": CUDA, "Shape": CPU}, None),
        ({ENGINE: TRT, "MatMul": CPU}, "MatMul on CPUExecutionProvider"),
        ({ENGINE: TRT, "Gemm": CUDA}, "Gemm on CUDAExecutionProvider"),
        ({"Shape": CPU}, "none"),
    ],
)
def test_engines_count_as_run_there_and_products_elsewhere_are_an_error(
    ran: dict[str, str], elsewhere: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Profiled(tmp_path / "profile.json", ran)
    monkeypatch.setattr(providers, "open_session", lambda *_: session)
    if elsewhere is None:
        providers.require_placement(GRAPH, Execution("tensorrt"), {})
    else:
        with pytest.raises(ProviderError, match=rf"ran elsewhere: {elsewhere} \("):
            providers.require_placement(GRAPH, Execution("tensorrt"), {})


def test_a_silent_fallback_to_cuda_is_an_error(
    listed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda:
        def __init__(self, *_: Any, **__: Any):
            pass

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    monkeypatch.setattr(providers.onnxruntime(), "InferenceSession", OnCuda)
    with pytest.raises(ProviderError, match=r"tensorrt was requested, but .* runs on CUDAExec"):
        providers.resolve("tensorrt")


def test_auto_never_takes_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers.onnxruntime(), "get_available_providers", lambda: [TRT, CPU])
    assert providers.resolve("auto")[0] == "cpu"


def test_a_build_without_it_and_precisions_that_it_cannot_run_are_errors(tmp_path: Path) -> None:
    if TRT not in providers.onnxruntime().get_available_providers():
        with pytest.raises(ProviderError, match="provider tensorrt is not in this build"):
            providers.resolve("tensorrt")
    with pytest.raises(ProviderError, match="expected auto, cpu, cuda or tensorrt"):
        providers.resolve("trt")
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(ProviderError, match=f"an int8 bundle cannot run on {provider}"):
            check_precision("int8", provider)
    check_precision("fp16", "tensorrt")
    packed, value = tmp_path / "c.onnx", onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [[value(name, onnx.TensorProto.FLOAT, [1])] for name in "xy"]
    graph = onnx.helper.make_graph([node], "packed", *ends)

    def write(precision: str) -> None:
        model = onnx.helper.make_model(graph)
        model.metadata_props.add(key="ztune", value=f'{{"precision":"{precision}"}}')
        packed.write_bytes(model.SerializeToString())

    write("int8")
    with pytest.raises(ProviderError, match="an int8 bundle cannot run on tensorrt"):
        open_classifier(packed, Execution("tensorrt"))
    write("fp16")
    with pytest.raises(ProviderError, match="an fp16 bundle cannot run on cpu"):
        open_classifier(packed, Execution())


@pytest.mark.gpu
def test_tensorrt_really_runs_the_bundle() -> None:
    if TRT not in providers.onnxruntime().get_available_providers():
        pytest.skip("no onnxruntime with TensorRT here")
    try:
        providers.probe("tensorrt")
    except ProviderError as error:
        pytest.skip(f"TensorRT does not run here: {error}")
    bundle = load_bundle(MINI)
    reported: list[str] = []
    execution = Execution("tensorrt", remark=reported.append)
    for graph in ("image", "text", "prompt"):
        assert parity_on_this_machine(bundle, graph, execution)["max_abs"] < 1e-3
    pixels = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    expected = OrtImageEncoder(bundle, Execution()).encode(pixels)
    got = OrtImageEncoder(bundle, execution).encode(pixels)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    contexts = np.random.default_rng(0).standard_normal((10, 4, 64)).astype(np.float32)
    encoders = [
        OrtPromptGraph(bundle, Tokenizer(bundle), e).encoder(("zero", "one hand"), 4, 10)
        for e in (Execution(), execution)
    ]
    expected, got = (encoder.encode(contexts) for encoder in encoders)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert any("image.onnx" in line for line in reported)

"""Model repositories: every configuration parses, and says what the server must do."""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export import triton
from export.quantize import quantize_bundle
from export.triton import ACCELERATORS, ACCESS, BACKENDS, Serving, export_triton
from export.weights import write_graph
from runtimes.bundle import Bundle, load_bundle
from tests.conftest import MINI
from ztune.errors import ConfigError, FormatError

PRECISIONS = ("fp32", "int8", "fp16")
TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(int64)": "TYPE_INT64",
    "tensor(uint8)": "TYPE_UINT8",
}


def possible(precision: str, backend: str, accelerator: str) -> bool:
    if backend == "python" and accelerator == "tensorrt":
        return False
    return {
        "fp32": True,
        "int8": accelerator == "none",
        "fp16": accelerator != "none",
    }[precision]


COMBINATIONS = [
    words
    for words in itertools.product(PRECISIONS, BACKENDS, ACCELERATORS, ACCESS, (1, 2))
    if possible(*words[:3])
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    fp32 = load_bundle(MINI)
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "fp32": fp32,
        **{name: quantize_bundle(fp32, folder / name, name) for name in ("int8", "fp16")},
    }


def parsed(folder: Path) -> Any:
    """Return a model's configuration as Triton reads it."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = (folder / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def model_type(number: int) -> str:
    from tritonclient.grpc import model_config_pb2

    return str(model_config_pb2.DataType.Name(number))


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def accelerators(config: Any) -> dict[str, dict[str, str]]:
    listed = config.optimization.execution_accelerators.gpu_execution_accelerator
    return {one.name: dict(one.parameters) for one in listed}


@pytest.mark.parametrize(
    ("precision", "backend", "accelerator", "access", "instances"),
    COMBINATIONS,
    ids=lambda value: str(value),
)
def test_configurations_say_what_they_must(
    bundles: dict[str, Bundle],
    tmp_path: Path,
    precision: str,
    backend: str,
    accelerator: str,
    access: str,
    instances: int,
) -> None:
    bundle, out = bundles[precision], tmp_path / "repository"
    serving = Serving(
        backend=backend,
        accelerator=accelerator,
        access=access,
        instances=instances,
        threads=3 if instances == 2 else None,
    )
    names = export_triton(bundle, out, "my-model", serving)
    parts = ["image", "text", "prompt", "score", "client"]
    if access != "features":
        parts = ["image", "score", "client"]
    assert names == [f"my-model_{part}" for part in parts]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for part in parts:
        folder = out / f"my-model_{part}"
        config = parsed(folder)
        parsed_parameters = parameters(config)
        assert config.name == folder.name
        assert config.backend == backend
        assert config.platform == ""
        assert config.version_policy.latest.num_versions == 1
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]
        files = {path.name for path in (folder / "1").iterdir()}
        assert files == {"model.onnx"} | ({"model.py"} if backend == "python" else set())

        batched = part in ("image", "text")
        size = (1 if precision == "int8" else 8) if batched else 0
        assert config.max_batch_size == size
        assert config.HasField("dynamic_batching") == (size > 1)
        if size > 1:
            assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000
            assert not config.dynamic_batching.preferred_batch_size
        assert not config.HasField("sequence_batching")

        on_gpu = accelerator != "none" and part != "client"
        (group,) = config.instance_group
        assert group.count == instances
        assert group.kind == (group.KIND_GPU if on_gpu else group.KIND_CPU)

        given = accelerators(config)
        if backend == "python" or not on_gpu:
            assert given == {}
        else:
            whole = accelerator == "tensorrt" and batched
            assert list(given) == (["tensorrt", "cuda"] if whole else ["cuda"])
            assert given["cuda"] == {"use_tf32": "0"}
            assert parsed_parameters["cudnn_conv_algo_search"] == "1"

        assert parsed_parameters["bundle_digest"] == bundle.digest
        assert parsed_parameters["model_id"] == bundle.model_id
        assert parsed_parameters["precision"] == precision
        threads = "3" if instances == 2 and not on_gpu else None
        assert parsed_parameters.get("intra_op_thread_count") == threads
        check_tensors(config, folder, access, run=precision != "fp16")


def check_tensors(config: Any, folder: Path, access: str, *, run: bool) -> None:
    """Compare a configuration with its graph, and run the warm-up on it."""
    options = onnxruntime.SessionOptions()
    if not run:  # 16 bit is for GPUs: the graph is only read here
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = onnxruntime.InferenceSession(
        str(folder / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    batched = config.max_batch_size > 0

    def described(values: Any) -> dict[str, tuple[str, list[int]]]:
        return {
            value.name: (
                TYPES[value.type],
                [d if isinstance(d, int) else -1 for d in value.shape][batched:],
            )
            for value in values
        }

    def configured(values: Any) -> dict[str, tuple[str, list[int]]]:
        return {value.name: (model_type(value.data_type), list(value.dims)) for value in values}

    inputs, outputs = configured(config.input), configured(config.output)
    assert inputs == described(graph.get_inputs())
    assert outputs == described(graph.get_outputs())
    assert not any(value.optional for value in config.input)
    assert outputs["digest"] == ("TYPE_UINT8", [32])
    if config.name.endswith("_score"):
        assert ("logits" in outputs) == (access != "losses")
        assert outputs["losses"] == ("TYPE_FP64", [-1])
        assert outputs["correct"] == ("TYPE_INT64", [-1])

    (warmup,) = config.model_warmup
    assert warmup.batch_size == max(config.max_batch_size, 1)
    feeds = {}
    for name, tensor in warmup.inputs.items():
        kind, dims = inputs[name]
        assert model_type(tensor.data_type) == kind
        assert tensor.zero_data
        assert len(tensor.dims) == len(dims)
        assert all(found > 0 for found in tensor.dims)
        assert all(wanted in (-1, found) for found, wanted in zip(tensor.dims, dims, strict=True))
        shape = [warmup.batch_size] * batched + list(tensor.dims)
        dtype = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64}[kind]
        feeds[name] = np.zeros(shape, dtype=dtype)
    assert set(feeds) == set(described(graph.get_inputs()))
    if run:
        graph.run(None, feeds)


def test_tensorrt_builds_for_one_to_all_rows_and_one_bundle(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    paths = set()
    for precision in ("fp32", "fp16"):
        bundle = bundles[precision]
        out = tmp_path / precision
        export_triton(bundle, out, "m", Serving(accelerator="tensorrt"))
        for part, one in (("image", "pixels:{}x3x24x24"), ("text", "tokens:{}x24")):
            config = parsed(out / f"m_{part}")
            settings = accelerators(config)["tensorrt"]
            assert config.max_batch_size == 8
            assert settings["precision_mode"] == precision.upper()
            assert settings["trt_engine_cache_enable"] == "1"
            for which, rows in (("min", 1), ("opt", 8), ("max", 8)):
                assert settings[f"trt_profile_{which}_shapes"] == one.format(rows)
            paths.add(settings["trt_engine_cache_path"])
            # One folder deep: ONNX Runtime makes no more than that.
            assert re.fullmatch(r"/tmp/[^/]+", settings["trt_engine_cache_path"])
    assert len(paths) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "torch"}, r'`backend` is "torch", expected onnxruntime, python$'),
        ({"accelerator": "gpu"}, r'`accelerator` is "gpu", expected none, cuda, tensorrt$'),
        ({"access": "loss"}, r'`access` is "loss", expected features, logits, losses$'),
        ({"instances": 0}, r"`instances` is 0, expected at least 1$"),
        ({"threads": -1}, r"`threads` is -1, expected at least 1$"),
        (
            {"backend": "python", "accelerator": "tensorrt"},
            r"`accelerator=tensorrt` needs `backend=onnxruntime`",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Serving(**settings)


@pytest.mark.parametrize(
    ("precision", "accelerator", "message"),
    [
        ("fp16", "none", r"fp16 bundle cannot run on cpu: .* \(use `accelerator` cuda, or serve"),
        ("int8", "cuda", r"int8 bundle cannot run on cuda: .* \(use `accelerator` none, or serve"),
        ("int8", "tensorrt", r"int8 bundle cannot run on tensorrt: "),
    ],
)
def test_a_precision_that_the_accelerator_cannot_run(
    bundles: dict[str, Bundle], tmp_path: Path, precision: str, accelerator: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_triton(bundles[precision], tmp_path / "out", "m", Serving(accelerator=accelerator))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "a/b", "..", "_a", "a.b", "a b", 'a"b', "ä", "a\n"])
def test_names_that_are_no_models(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected letters, digits, - and _"):
        export_triton(load_bundle(MINI), tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_models_are_named_after_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MINI)
    names = export_triton(load_bundle(Path()), tmp_path / "out", serving=Serving(access="losses"))
    assert names == ["mini_image", "mini_score", "mini_client"]


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_triton(load_bundle(MINI), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def damaged(source: Path, folder: Path) -> Iterator[Path]:
    for name in ("text.onnx", "token_table.npy"):
        copy = folder / name.partition(".")[0]
        copy.mkdir()
        for path in source.iterdir():
            content = path.read_bytes()
            (copy / path.name).write_bytes(content[:-1] + b"?" if path.name == name else content)
        yield copy


def test_a_damaged_bundle_leaves_no_half_repository(tmp_path: Path) -> None:
    for number, bundle in enumerate(damaged(MINI, tmp_path)):
        out = tmp_path / f"out{number}"
        with pytest.raises(FormatError, match="SHA-256 differs"):
            export_triton(load_bundle(bundle), out)
        assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_large_weights_stand_beside_their_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "write_graph", functools.partial(write_graph, threshold=10_000))
    bundle, out = load_bundle(MINI), tmp_path / "out"
    for name in export_triton(bundle, out, serving=Serving(backend="python")):
        version = out / name / "1"
        assert {path.name for path in version.iterdir()} == {
            "model.onnx", "model.onnx.data", "model.py",
        }  # fmt: skip
        graph = onnxruntime.InferenceSession(
            str(version / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        if name == "mini_client":
            (first,) = graph.run(["bytes"], {"slice": np.array([0, 1], dtype=np.int64)})
            assert first.tobytes() == b"{"


def test_the_same_bundle_gives_the_same_repository(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        export_triton(load_bundle(MINI), tmp_path / name, "m", Serving(backend="python"))
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1]

"""Export a bundle as a Triton model repository: graphs and complete configurations."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto

from export.served import client_graph, image_graph, prompt_graph, score_graph, text_graph
from export.weights import write_graph
from runtimes.bundle import Bundle
from runtimes.providers import check_precision
from runtimes.remote.contract import BATCH
from ztune.errors import ConfigError, ProviderError
from ztune.io.files import new_folder

BACKENDS = ("onnxruntime", "python")
ACCELERATORS = {"none": "cpu", "cuda": "cuda", "tensorrt": "tensorrt"}
ACCESS = ("features", "logits", "losses")
"""What the server exposes of the text side: everything, logits and losses, or only losses."""
_QUEUE_MICROSECONDS = 1000
_PYTHON_BACKEND = Path(__file__).with_name("python_backend.py")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.UINT8: "TYPE_UINT8",
}


@dataclass(frozen=True)
class Serving:
    """How a server runs the models."""

    backend: str = "onnxruntime"
    """onnxruntime, or python: the same graphs inside Triton's Python backend."""
    accelerator: str = "none"
    instances: int = 1
    """Instances of each model."""
    threads: int | None = None
    """Threads of an instance on CPUs; None: all cores."""
    access: str = "features"

    def __post_init__(self) -> None:
        for name, known in (
            ("backend", BACKENDS),
            ("accelerator", tuple(ACCELERATORS)),
            ("access", ACCESS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f'`{name}` is "{value}", expected {", ".join(known)}')
        for name in ("instances", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}, expected at least 1")
        if self.backend == "python" and self.accelerator == "tensorrt":
            raise ConfigError(
                "`accelerator=tensorrt` needs `backend=onnxruntime` (the Python backend runs "
                "graphs on CPU or CUDA)"
            )


class EnumName(str):
    """The name of an enumeration's value, written without quotation marks."""

    __slots__ = ()


Value = bool | int | str | Sequence["Value"] | Mapping[str, "Value"]


@dataclass(frozen=True)
class _Model:
    part: str
    graph: Callable[[Bundle], ModelProto]
    largest: Mapping[str, Sequence[int]]
    """Shapes of the warm-up; the first dimension of a batched model is the batch."""
    batched: bool = False
    on_cpu: bool = False
    whole: bool = False
    """Whether TensorRT can run the graph: no output sizes that depend on values."""


def export_triton(
    bundle: Bundle,
    out: Path,
    name: str | None = None,
    serving: Serving | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write the model repository of a bundle to the new folder `out`; return the models' names.

    Raises: ConfigError for an invalid name, an `out` that is not empty, or a precision that the
        accelerator cannot run.
    """
    serving = serving or Serving()
    name = bundle.path.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f'invalid model name "{name}", expected letters, digits, - and _ (use `name=NAME`)'
        )
    _check_accelerator(bundle, serving)
    names = []
    with new_folder(out) as work:
        for model in _models(bundle, serving):
            full = f"{name}_{model.part}"
            progress(f"{full}: writing")
            _write(bundle, model, work / full, full, serving)
            names.append(full)
    return names


def _check_accelerator(bundle: Bundle, serving: Serving) -> None:
    try:
        check_precision(bundle.precision, ACCELERATORS[serving.accelerator])
    except ProviderError as error:
        reason, _, _ = str(error).partition(" (")
        other = "none" if bundle.precision == "int8" else "cuda"
        raise ConfigError(
            f"{reason} (use `accelerator` {other}, or serve the fp32 bundle)"
        ) from None


def _models(bundle: Bundle, serving: Serving) -> Iterator[_Model]:
    batch, S, e = _batch(bundle), bundle.image.size, bundle.embed_dim
    texts = {"contexts": [2, 4, bundle.text.width], "tokens": [2, 3]}
    yield _Model("image", image_graph, {"pixels": [batch, 3, S, S]}, batched=True, whole=True)
    if serving.access == "features":
        length = bundle.text.context_length
        yield _Model("text", text_graph, {"tokens": [batch, length]}, batched=True, whole=True)
        yield _Model("prompt", prompt_graph, texts)

    def scores(bundle: Bundle) -> ModelProto:
        return score_graph(bundle, logits=serving.access != "losses")

    yield _Model("score", scores, {**texts, "features": [2, e], "labels": [2]})
    yield _Model("client", client_graph, {"slice": [2]}, on_cpu=True)


def _batch(bundle: Bundle) -> int:
    # Dynamic int8 scales activations over a whole call, so images are encoded one by one.
    return 1 if bundle.precision == "int8" else BATCH


def _write(bundle: Bundle, model: _Model, folder: Path, name: str, serving: Serving) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    graph = model.graph(bundle)
    config = _config(bundle, model, graph, name, serving)
    (folder / "config.pbtxt").write_text("".join(f"{line}\n" for line in _lines(config)))
    write_graph(graph, version / "model.onnx")
    if serving.backend == "python":
        shutil.copyfile(_PYTHON_BACKEND, version / "model.py")


def _config(
    bundle: Bundle, model: _Model, graph: ModelProto, name: str, serving: Serving
) -> dict[str, Value]:
    on_gpu = serving.accelerator != "none" and not model.on_cpu
    batch = _batch(bundle) if model.batched else 0
    group: dict[str, Value] = {
        "count": serving.instances,
        "kind": EnumName("KIND_GPU" if on_gpu else "KIND_CPU"),
    }
    config: dict[str, Value] = {
        "name": name,
        "backend": serving.backend,
        "max_batch_size": batch,
        "input": [_tensor(value, model.batched) for value in graph.graph.input],
        "output": [_tensor(value, model.batched) for value in graph.graph.output],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [group],
    }
    if batch > 1:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": _QUEUE_MICROSECONDS}
    if on_gpu and serving.backend == "onnxruntime":
        config["optimization"] = {
            "execution_accelerators": {
                "gpu_execution_accelerator": _accelerators(bundle, model, name, serving)
            }
        }
    config["model_warmup"] = [_warmup(model, graph)]
    parameters = {
        "bundle_digest": bundle.digest,
        "model_id": bundle.model_id,
        "precision": bundle.precision,
    }
    if on_gpu and serving.backend == "onnxruntime":
        # With any parameters given, the backend reads it only from here; 1 is HEURISTIC.
        parameters["cudnn_conv_algo_search"] = "1"
    if serving.threads is not None and not on_gpu:
        parameters["intra_op_thread_count"] = str(serving.threads)
    config["parameters"] = [
        {"key": key, "value": {"string_value": value}} for key, value in parameters.items()
    ]
    return config


def _accelerators(bundle: Bundle, model: _Model, name: str, serving: Serving) -> list[Value]:
    cuda: dict[str, Value] = {"name": "cuda", "parameters": _pairs({"use_tf32": "0"})}
    if serving.accelerator == "cuda" or not model.whole:
        return [cuda]
    settings = {
        # FP16 only for fp16 graphs, whose norms stay in FP32.
        "precision_mode": "FP16" if bundle.precision == "fp16" else "FP32",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        # ONNX Runtime identifies engines by the graph's structure, not by its weights.
        "trt_engine_cache_path": f"/tmp/ztune-{name}-{bundle.digest[:16]}",
    }
    for which, n in (("min", 1), ("opt", BATCH), ("max", BATCH)):
        shapes = [
            f"{name}:{'x'.join(str(size) for size in (n, *shape[1:]))}"
            for name, shape in model.largest.items()
        ]
        settings[f"trt_profile_{which}_shapes"] = ",".join(shapes)
    return [{"name": "tensorrt", "parameters": _pairs(settings)}, cuda]


def _pairs(settings: Mapping[str, str]) -> list[Value]:
    return [{"key": key, "value": value} for key, value in settings.items()]


def _tensor(value: Any, batched: bool) -> dict[str, Value]:
    kind = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    return {
        "name": value.name,
        "data_type": EnumName(_TYPES[kind.elem_type]),
        "dims": dims[1:] if batched else dims,
    }


def _warmup(model: _Model, graph: ModelProto) -> dict[str, Value]:
    """Return a call of typical size with zeros, which are valid ids, labels and pixels."""
    types = {value.name: _TYPES[value.type.tensor_type.elem_type] for value in graph.graph.input}
    inputs: list[Value] = []
    for name, shape in model.largest.items():
        given: dict[str, Value] = {
            "data_type": EnumName(types[name]),
            "dims": list(shape[1:] if model.batched else shape),
            "zero_data": True,
        }
        inputs.append({"key": name, "value": given})
    batch = next(iter(model.largest.values()))[0] if model.batched else 1
    return {"name": "usual", "batch_size": batch, "inputs": inputs}


def _lines(message: Mapping[str, Value], indent: str = "") -> Iterator[str]:
    """Yield the lines of a protobuf message in text format."""
    for key, value in message.items():
        values: Sequence[Value] = [value]
        if isinstance(value, Sequence) and not isinstance(value, str):
            values = value
        for one in values:
            if isinstance(one, Mapping):
                yield f"{indent}{key} {{"
                yield from _lines(one, f"{indent}  ")
                yield f"{indent}}}"
            elif isinstance(one, bool):
                yield f"{indent}{key}: {str(one).lower()}"
            elif isinstance(one, int | EnumName):
                yield f"{indent}{key}: {one}"
            else:
                quoted = str(one).replace("\\", "\\\\").replace('"', '\\"')
                yield f'{indent}{key}: "{quoted}"'

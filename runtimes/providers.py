"""Execution providers: the requested one runs the matrix products, or an error is raised."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes import tensorrt
from ztune.errors import ConfigError, ProviderError, ZtuneError, how_to_install
from ztune.printing import reason_of
from ztune.progress import SILENCE, Progress
from ztune.types import F32

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Environment variable that disables ONNX Runtime's telemetry. As of 1.32 the Linux wheel otherwise
looks up a host, and stores a device id and events in the user's cache folder."""
_MOST_THREADS = 1024  # each has a stack: a typo must not exhaust memory
_HEAVY = {"MatMul", "Gemm", "FusedMatMul", "Conv", "FusedConv", "Attention", "MultiHeadAttention"}
# Full precision, and the same convolution algorithm on every run.
_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    },
}


def _say_nothing(line: str) -> None:
    pass


@dataclass(frozen=True)
class Execution:
    """How graphs run on this machine; saved with a run and fixed on resume."""

    provider: str = "cpu"
    threads: int | None = None
    """None: all cores, with spin-waiting threads. A number: that many threads, without
    spin-waiting, for a shared machine."""
    memory_limit: int | None = None
    """MB (10⁶ bytes) for the prompt graph above its weights; None: the provider's default."""
    cuda_graph: bool = True
    """Whether to capture and replay a candidate batch's call as a CUDA graph."""
    remark: Callable[[str], None] = field(default=_say_nothing, compare=False, repr=False)
    """Called before slow steps."""

    def __post_init__(self) -> None:
        for name in ("threads", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}, expected at least 1")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise ConfigError(f"`threads` is {self.threads}, expected at most {_MOST_THREADS}")


@dataclass(frozen=True)
class Setup:
    """Options of one session."""

    profile_prefix: Path | None = None
    """Where the profiler writes; None disables it."""
    calls: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    """Input shapes by name for every call to come, the usual call first: TensorRT builds an engine
    for their range."""
    capture_sizes: Mapping[str, int] | None = None
    """The size of every symbolic dimension, for a session whose call CUDA captures."""
    plain: bool = False
    """Only basic optimisations: higher levels have crashed with fp16 graphs on a CPU."""


def onnxruntime() -> Any:
    """Import ONNX Runtime, with its CUDA libraries preloaded and telemetry disabled.

    Use this instead of importing it: telemetry must be disabled before the library is loaded. An
    environment that already sets TELEMETRY is respected.

    Raises: ProviderError when it is not installed.
    """
    os.environ.setdefault(TELEMETRY, "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime cannot be imported ({error}); install it with: {how_to_install('cpu')} "
            "(for a GPU: '.[gpu]'; on a Jetson: NVIDIA's wheel)"
        ) from None
    ort.set_default_logger_severity(4)  # ztune reports failures in one line
    if "CUDAExecutionProvider" in ort.get_available_providers() and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(None):
            ort.preload_dlls()
    return ort


def open_session(graph: Path | bytes, execution: Execution, setup: Setup | None = None) -> Any:
    """Open an ONNX Runtime session.

    Raises: ProviderError when the provider is unknown, not built in, or did not load.
    """
    ort = onnxruntime()
    setup = setup or Setup()
    provider = execution.provider
    if provider not in NAMES:
        raise ProviderError(f'unknown provider "{provider}", expected cpu, cuda or tensorrt')
    wanted = NAMES[provider]
    if wanted not in ort.get_available_providers():
        raise ProviderError(
            f"provider {provider} is not in this build of onnxruntime {ort.__version__} (it has "
            f"{', '.join(ort.get_available_providers())}); uninstall onnxruntime and install the "
            f"build for GPUs ({how_to_install('gpu')}), or use `provider=cpu`"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Otherwise a file named *.ort is read in a format that check_graph does not know.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.use_deterministic_compute = True
    # Without the arena, buffers return to the system at once: at ViT-B/32 size and 100 classes the
    # peak is 371 MB instead of 484, at the same speed.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    if execution.threads is not None:
        options.intra_op_num_threads = execution.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if setup.profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(setup.profile_prefix)
    if setup.plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for name, size in (setup.capture_sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    source = str(graph) if isinstance(graph, Path) else graph
    providers = _providers(graph, execution, setup)
    try:
        session = ort.InferenceSession(source, sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many types
        raise ProviderError(
            f"{_display_name(graph)} cannot be opened on {provider}: {reason_of(error)}"
        ) from None
    # A CUDA provider without its libraries silently leaves a CPU session.
    if session.get_providers()[0] != wanted:
        raise ProviderError(
            f"provider {provider} was requested, but {_display_name(graph)} runs on "
            f"{session.get_providers()[0]}: its libraries or the device are missing "
            "(run: ztune doctor)"
        )
    return session


def _providers(
    graph: Path | bytes, execution: Execution, setup: Setup
) -> list[tuple[str, dict[str, str]]]:
    """Return the providers to open a graph with, the requested one first, and their options."""
    provider = execution.provider
    options = dict(_OPTIONS["cpu" if provider == "cpu" else "cuda"])
    if setup.capture_sizes is not None:
        options["enable_cuda_graph"] = "1"
    if provider != "tensorrt":
        return [(NAMES[provider], options)]
    # Operators that TensorRT lacks run on CUDA; require_placement limits which.
    own = tensorrt.options(graph, setup.calls, execution.remark)
    return [(NAMES["tensorrt"], own), (NAMES["cuda"], options)]


def run_graph(
    session: Any, graph: Path | str, outputs: list[str] | None, feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run an open session of `graph`.

    Raises: ZtuneError naming the graph when ONNX Runtime fails.
    """
    with explain_graph_errors(graph):
        return [np.asarray(output) for output in session.run(outputs, dict(feeds))]


@contextlib.contextmanager
def explain_graph_errors(graph: Path | str) -> Iterator[None]:
    """Re-raise ONNX Runtime's exceptions as a ZtuneError that names the graph."""
    try:
        yield
    except Exception as error:  # ONNX Runtime raises many types
        raise ZtuneError(f"{graph} failed while running: {reason_of(error)}") from None


def check_precision(precision: str, provider: str) -> None:
    """Refuse a precision that a provider cannot run safely.

    Raises: ProviderError with the reason and the alternative.
    """
    if precision == "int8" and provider != "cpu":
        raise ProviderError(
            f"an int8 bundle cannot run on {provider}: dynamic quantization is for CPUs "
            "(use the fp32 bundle, or `provider=cpu`)"
        )
    if precision == "fp16" and provider == "cpu":
        raise ProviderError(
            "an fp16 bundle cannot run on cpu: ONNX Runtime is known to crash with fp16 graphs on "
            "CPUs (use the fp32 or int8 bundle, or `provider=cuda`)"
        )


def require_placement(
    graph: Path | bytes,
    execution: Execution,
    feeds: Mapping[str, Any],
    setup: Setup | None = None,
) -> None:
    """Run `graph` once under the profiler and check where its matrix products ran.

    Raises: ProviderError naming the operators that ran elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiled = replace(setup or Setup(), profile_prefix=Path(folder) / "placement")
        session = open_session(graph, execution, profiled)
        run_graph(session, _display_name(graph), None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    wanted = NAMES[execution.provider]
    elsewhere: dict[str, str] = {}
    n_heavy = 0
    for event in events:
        arguments = event.get("args", {})
        operator, ran_on = arguments.get("op_name", ""), arguments.get("provider")
        # The profiler shows each TensorRT engine as one node.
        heavy = operator in _HEAVY or operator.startswith("QLinear") or "TRTKernel" in operator
        if ran_on and heavy:
            n_heavy += 1
            if ran_on != wanted:
                elsewhere[operator] = ran_on
    if elsewhere or not n_heavy:
        found = ", ".join(f"{op} on {where}" for op, where in elsewhere.items()) or "none"
        raise ProviderError(
            f"provider {execution.provider} was requested, but matrix products of "
            f"{_display_name(graph)} ran elsewhere: {found} (run: ztune doctor)"
        )


def probe(provider: str) -> None:
    """Run a small matrix product on `provider`.

    Raises: ProviderError with the reason why it did not run there.
    """
    feeds = {"x": np.ones((2, 8), dtype=np.float32)}
    require_placement(_small_graph(), Execution(provider), feeds)


def resolve(provider: str) -> tuple[str, str]:
    """Return the provider to use and the reason in one line; `auto` takes the best that works.

    Raises: ProviderError when the requested one does not run.
    """
    if provider == "cpu":
        return provider, "provider cpu (as requested)"
    if provider in ("cuda", "tensorrt"):
        probe(provider)
        return provider, f"provider {provider} (as requested; a probe ran on it)"
    if provider != "auto":
        raise ProviderError(f'unknown provider "{provider}", expected auto, cpu, cuda or tensorrt')
    if NAMES["cuda"] not in onnxruntime().get_available_providers():
        return "cpu", "provider cpu (this build of onnxruntime has no CUDA)"
    try:
        probe("cuda")
    except ProviderError as error:
        return "cpu", f"provider cpu (cuda did not run: {error})"
    return "cuda", "provider cuda (the best that works here)"


def resolve_execution(
    provider: str,
    threads: int | None,
    progress: Progress = SILENCE,
    memory_limit: int | None = None,
) -> Execution:
    """Return how to run, reporting the provider and the reason.

    Raises: ProviderError when the requested provider does not run, ConfigError for other arguments.
    """
    asked = Execution(threads=threads, memory_limit=memory_limit, remark=progress.remark)
    name, why = resolve(provider)
    progress.remark(why)
    return replace(asked, provider=name)


def product_in_graph() -> Callable[[F32, F32], F32]:
    """Return a function that multiplies matrices f32[m, k] and f32[k, n] on the CPU.

    Raises: ProviderError without ONNX Runtime.
    """
    session = open_session(_product_graph([None, None], None), Execution())

    def product(a: F32, b: F32) -> F32:
        return run_graph(session, "a matrix product", ["y"], {"x": a, "w": b})[0]

    return product


def _small_graph() -> bytes:
    return _product_graph([2, 8], np.eye(8, dtype=np.float32))


def _product_graph(shape: list[int | None], weights: F32 | None) -> bytes:
    """Return a graph of the product of `x` of a shape with `weights`, or with an input `w`."""
    from onnx import TensorProto, helper, numpy_helper

    def matrix(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "probe",
        [matrix("x")] if weights is not None else [matrix("x"), matrix("w")],
        [matrix("y")],
        [] if weights is None else [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _display_name(graph: Path | bytes) -> str:
    return str(graph) if isinstance(graph, Path) else "a small graph"

"""Execution providers: one that was asked for runs the matrix products, or it is an error."""

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

NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""The variable by which ONNX Runtime's library keeps its telemetry off. As of 1.32 the Linux wheel
otherwise looks up a host, and keeps a device id and events in the user's cache folder."""
_MOST_THREADS = 1024  # each has a stack: a slip of the finger must not take all memory
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
    """How graphs run on this machine: configuration, saved with a run and fixed on resume."""

    provider: str = "cpu"
    threads: int | None = None
    """None: every core, and threads that spin while they wait. A number: so many, and none spins,
    for a machine that does something else too."""
    memory_limit: int | None = None
    """MB (10⁶ bytes) that the prompt graph may take above its weights; None: the provider's own."""
    cuda_graph: bool = True
    """Whether CUDA may capture the calls of a round and replay them; a benchmark compares."""
    remark: Callable[[str], None] = field(default=_say_nothing, compare=False, repr=False)
    """Told what takes long, before it begins."""

    def __post_init__(self) -> None:
        for name in ("threads", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}, expected at least 1")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise ConfigError(f"`threads` is {self.threads}, expected at most {_MOST_THREADS}")


@dataclass(frozen=True)
class Setup:
    """What is particular to one session of a graph."""

    profile_prefix: Path | None = None
    """Where the profiler writes, if it is to run."""
    calls: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    """The shapes of inputs by name in each call to come, the usual call first: TensorRT builds an
    engine for their range."""
    captured_at: Mapping[str, int] | None = None
    """The size of every symbolic dimension, where CUDA is to capture the one call of that size."""
    plain: bool = False
    """Only basic optimisations: those above have crashed on 16-bit graphs on a CPU."""


def onnxruntime() -> Any:
    """Import ONNX Runtime, whichever build is installed, with its CUDA libraries preloaded.

    Nothing else imports it, since its telemetry is switched off before the library is loaded, here
    and in processes that this one starts. An environment that sets the variable is respected.

    Raises: ProviderError when none is installed.
    """
    os.environ.setdefault(TELEMETRY, "1")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime cannot be imported ({error}); install it with: {how_to_install('cpu')} "
            "(for a GPU: '.[gpu]'; on a Jetson: NVIDIA's own wheel)"
        ) from None
    ort.set_default_logger_severity(4)  # a provider that fails is reported by us, in one line
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
    options.use_deterministic_compute = True
    # Buffers go back to the system as soon as they are free: at ViT-B/32 size and 100 classes the
    # process peaks at 371 MB instead of 484, at the same speed.
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
    for name, size in (setup.captured_at or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    source = str(graph) if isinstance(graph, Path) else graph
    providers = _providers(graph, execution, setup)
    try:
        session = ort.InferenceSession(source, sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime raises many types, all of them final here
        raise ProviderError(
            f"{_shown(graph)} cannot be opened on {provider}: {reason_of(error)}"
        ) from None
    # A CUDA provider that cannot load its libraries leaves a CPU session and no exception.
    if session.get_providers()[0] != wanted:
        raise ProviderError(
            f"provider {provider} was asked for, but {_shown(graph)} runs on "
            f"{session.get_providers()[0]}: its libraries or the device are missing "
            "(see: ztune doctor)"
        )
    return session


def _providers(
    graph: Path | bytes, execution: Execution, setup: Setup
) -> list[tuple[str, dict[str, str]]]:
    """Return the providers to open a graph with, the one asked for first, and their options."""
    provider = execution.provider
    options = dict(_OPTIONS["cpu" if provider == "cpu" else "cuda"])
    if setup.captured_at is not None:
        options["enable_cuda_graph"] = "1"
    if provider != "tensorrt":
        return [(NAMES[provider], options)]
    # What TensorRT has no operator for runs on CUDA; the check of placement sees that it is little.
    own = tensorrt.options(graph, setup.calls, execution.remark)
    return [(NAMES["tensorrt"], own), (NAMES["cuda"], options)]


def run_graph(
    session: Any, graph: Path | str, outputs: list[str] | None, feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Run an open session of `graph`.

    Raises: ZtuneError naming the graph when ONNX Runtime cannot, be it for want of memory.
    """
    with running(graph):
        return [np.asarray(output) for output in session.run(outputs, dict(feeds))]


@contextlib.contextmanager
def running(graph: Path | str) -> Iterator[None]:
    """Name the graph in whatever ONNX Runtime raises inside."""
    try:
        yield
    except Exception as error:  # ONNX Runtime raises many types, all of them final here
        raise ZtuneError(f"{graph} failed while running: {reason_of(error)}") from None


def check_precision(precision: str, provider: str) -> None:
    """Refuse what a provider cannot run, or cannot run safely.

    Raises: ProviderError saying why, and what to use instead.
    """
    if precision == "int8" and provider != "cpu":
        raise ProviderError(
            f"an int8 bundle cannot run on {provider}: its dynamic quantization is made for CPUs "
            "(use the fp32 bundle there, or `provider=cpu`)"
        )
    if precision == "fp16" and provider == "cpu":
        raise ProviderError(
            "an fp16 bundle cannot run on cpu: ONNX Runtime is known to crash on such graphs there "
            "(use the fp32 or int8 bundle, or `provider=cuda`)"
        )


def require_placement(
    graph: Path | bytes,
    execution: Execution,
    feeds: Mapping[str, Any],
    setup: Setup | None = None,
) -> None:
    """Run `graph` once under the profiler and see where its matrix products ran.

    Raises: ProviderError naming the operators that ran elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiled = replace(setup or Setup(), profile_prefix=Path(folder) / "placement")
        session = open_session(graph, execution, profiled)
        run_graph(session, _shown(graph), None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    wanted = NAMES[execution.provider]
    elsewhere: dict[str, str] = {}
    n_heavy = 0
    for event in events:
        arguments = event.get("args", {})
        operator, ran_on = arguments.get("op_name", ""), arguments.get("provider")
        # TensorRT shows its engines as one node each, whatever they are made of.
        heavy = operator in _HEAVY or operator.startswith("QLinear") or "TRTKernel" in operator
        if ran_on and heavy:
            n_heavy += 1
            if ran_on != wanted:
                elsewhere[operator] = ran_on
    if elsewhere or not n_heavy:
        found = ", ".join(f"{op} on {where}" for op, where in elsewhere.items()) or "none"
        raise ProviderError(
            f"provider {execution.provider} was asked for, but of the matrix products in "
            f"{_shown(graph)} these ran elsewhere: {found}"
        )


def probe(provider: str) -> None:
    """Run a small matrix product on `provider`.

    Raises: ProviderError with the reason why it did not run there.
    """
    feeds = {"x": np.ones((2, 8), dtype=np.float32)}
    require_placement(_small_graph(), Execution(provider), feeds)


def resolve(provider: str) -> tuple[str, str]:
    """Return the provider to use and one line that says why; `auto` takes the best that works.

    Raises: ProviderError when the one asked for does not really run.
    """
    if provider == "cpu":
        return provider, "provider cpu (as asked for)"
    if provider in ("cuda", "tensorrt"):
        probe(provider)
        return provider, f"provider {provider} (as asked for; a probe ran on it)"
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
    """Return how to run, saying which provider and why.

    Raises: ProviderError when the one asked for does not really run, ConfigError for the others.
    """
    asked = Execution(threads=threads, memory_limit=memory_limit, remark=progress.remark)
    name, why = resolve(provider)
    progress.remark(why)
    return replace(asked, provider=name)


def _small_graph() -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _shown(graph: Path | bytes) -> str:
    return str(graph) if isinstance(graph, Path) else "a small graph"

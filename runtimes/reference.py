"""A bundle's prompt graph in higher precision, run in a separate process on the CPU.

The reference for a precision's error. It is derived from the bundle's graph; the weights are
unchanged and cast inside the graph:

    int8 -> fp32   products with the dequantized weights and unquantized activations
    fp16 -> fp32   the same weights, computed in single precision
    fp32 -> fp64   the same weights, computed in double precision, except operators without a
                   double CPU kernel in ONNX Runtime (Gelu, Erf and a few more)

It takes several times the memory of the tuning graph for about a second: the separate process frees
that memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, load_bundle
from runtimes.plan import Sizes, make_plan
from runtimes.prompts import feeds, name_lengths, token_table
from runtimes.providers import Execution, onnxruntime, run_graph
from runtimes.weights import WEIGHTS
from ztune.errors import FormatError, ZtuneError
from ztune.io.children import python_command
from ztune.io.files import remove_leftovers, temporary_folder
from ztune.io.schema import Record, convert, plain
from ztune.io.tensors import read_tensors, write_tensors
from ztune.printing import reason_of
from ztune.types import F32, F64

REFERENCE_PRECISION = {"int8": "fp32", "fp16": "fp32", "fp32": "fp64"}
"""The precision of the reference, by the measured precision."""
# Without a double kernel on ONNX Runtime's CPU, as of 1.32.
_SINGLE_ONLY = {
    "Attention", "Conv", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
    "PRelu", "Softplus", "Softsign",
}  # fmt: skip
_FOLDER = ".ztune-reference-"
_REQUEST, _RESPONSE = "request.safetensors", "response.safetensors"
_PROGRAM = "from runtimes.reference import main; sys.exit(main(sys.argv[1]))"


class ReferenceRequest(Record, frozen=True):
    """The input of the process besides its arrays; see `reference_features`."""

    bundle: str
    n_together: int
    bundle_precision: bool
    threads: int | None
    memory_limit: int | None


def reference_features(
    bundle: Bundle,
    names: Sequence[tuple[int, ...]],
    contexts: F32,
    n_together: int,
    execution: Execution,
    *,
    bundle_precision: bool = False,
) -> F64:
    """Return unit text features f64[P, C, e] of contexts f32[P, m, d] in the reference precision.

    `names` are checked ids by class; `n_together` is the size of a round, which determines the
    calls. `execution` gives threads and the memory limit, where doubles take twice what is counted.
    `bundle_precision` runs the graph in the bundle's precision instead.

    Raises: ZtuneError in one line for any failure of the process.
    """
    asked = ReferenceRequest(
        bundle=str(bundle.path.resolve()),
        n_together=n_together,
        bundle_precision=bundle_precision,
        threads=execution.threads,
        memory_limit=execution.memory_limit,
    )
    remove_leftovers(Path(tempfile.gettempdir()).glob(f"{_FOLDER}????????"))
    with temporary_folder(_FOLDER) as folder:
        arrays = {
            "contexts": contexts,
            "tokens": np.concatenate([np.array(ids, dtype=np.int64) for ids in names]),
            "lengths": np.array([len(ids) for ids in names]),
        }
        write_tensors(folder / _REQUEST, arrays, plain(asked))
        code, said = _run_process(python_command(_PROGRAM, str(folder)))
        if code:
            lines = said.strip().splitlines()
            why = lines[-1] if lines and code > 0 else _exit_reason(code)
            raise ZtuneError(f'reference of bundle "{bundle.path}" in higher precision: {why}')
        answer, _ = read_tensors(folder / _RESPONSE, "reference")
    return np.asarray(answer["features"], dtype=np.float64)


def _run_process(command: list[str]) -> tuple[int, str]:
    """Run a process; return its exit code and stderr.

    It never outlives this process: an interrupt kills it, and if this process is killed, it exits
    at the end of its stdin.
    """
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=nowhere, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.read()
            return process.wait(), said
        except BaseException:
            process.kill()
            raise


def _exit_reason(code: int) -> str:
    if code < 0:
        return f"its process was killed by signal {-code} (perhaps out of memory)"
    return f"its process exited with code {code} and no message"


def main(folder: str) -> int:
    """Process the request in `folder`; on failure return 1 with one line on stderr."""
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    try:
        _answer(Path(folder))
    except (ZtuneError, OSError, MemoryError) as error:
        sys.stderr.write(f"{reason_of(error, most=2000)}\n")
        return 1
    return 0


def _exit_with_parent(folder: str) -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when the parent is gone
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(folder: Path) -> None:
    arrays, document = read_tensors(folder / _REQUEST, "reference")
    asked = convert(document, ReferenceRequest, "reference")
    bundle = load_bundle(Path(asked.bundle))
    parts = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
    names = [tuple(part.tolist()) for part in parts]
    session = _open(bundle, asked.bundle_precision, asked.threads)
    features = _encode(
        session, bundle, names, arrays["contexts"], asked.n_together, asked.memory_limit
    )
    write_tensors(folder / _RESPONSE, {"features": features}, {})


def _encode(
    session: Any,
    bundle: Bundle,
    names: Sequence[tuple[int, ...]],
    contexts: F32,
    n_together: int,
    limit: int | None,
) -> F64:
    """Return features f64[P, C, e], in the calls planned for rounds of `n_together`."""
    spec, n_context = bundle.text, contexts.shape[1]
    sizes = Sizes(n_context, spec.width, bundle.embed_dim, spec.graph == "prefix")
    plan = make_plan(name_lengths(spec, names), sizes, n_together, "cpu", limit)
    table = token_table(bundle)
    features = np.empty((len(contexts), len(names), bundle.embed_dim))
    for group in plan.groups:
        constants = feeds(spec, table, [names[index] for index in group], n_context)
        for first in range(0, len(contexts), plan.n_candidates):
            part = slice(first, first + plan.n_candidates)
            given: Mapping[str, Any] = {**constants, "contexts": contexts[part]}
            features[part, group] = run_graph(session, "the reference", ["features"], given)[0]
    return features


def _open(bundle: Bundle, bundle_precision: bool, threads: int | None) -> Any:
    import onnx

    path = bundle.file("prompt.onnx")
    model = onnx.load(str(path), load_external_data=False)
    if not bundle_precision:
        model = to_reference_graph(model, bundle.precision)
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Fusions are made for single precision; constant folding casts the weights once.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if {f"{path.name}.data", WEIGHTS} & bundle.files.keys():
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    try:
        return ort.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises many types
        raise ZtuneError(f"cannot be opened: {reason_of(error)}") from None


def to_reference_graph(model: Any, precision: str) -> Any:
    """Convert the prompt graph of a bundle in `precision` to its reference, in place; return it.

    Raises: FormatError for a graph that the exporter and quantizer do not produce.
    """
    from onnx import TensorProto

    del model.graph.value_info[:]  # types that no longer hold
    if precision == "int8":
        _dequantize(model.graph)
    elif precision == "fp16":
        _widen(model.graph, TensorProto.FLOAT16, TensorProto.FLOAT)
    else:
        _widen(model.graph, TensorProto.FLOAT, TensorProto.DOUBLE)
    return model


def _dequantize(graph: Any) -> None:
    """Replace each dynamically quantized product by one in fp32 with (weight − zero) · scale.

    The pattern is that of ONNX Runtime's quantize_dynamic: x is quantized by DynamicQuantizeLinear,
    multiplied by MatMulInteger, cast, and multiplied by the scales of x and of the weight.
    """
    from onnx import TensorProto, helper

    made_by = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}

    def only_user(name: str, operator: str) -> Any:
        found = users.get(name, [])
        if len(found) != 1 or found[0].op_type != operator:
            raise FormatError(f"int8 prompt graph: {name!r} is not followed by a single {operator}")
        return found[0]

    weights: list[Any] = []
    products: dict[int, Any] = {}
    replaced: set[int] = set()
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        quantize = made_by.get(node.input[0])
        if quantize is None or quantize.op_type != "DynamicQuantizeLinear":
            raise FormatError(f"int8 prompt graph: {node.input[0]!r} is not quantized in it")
        cast = only_user(node.output[0], "Cast")
        rescale = only_user(cast.output[0], "Mul")
        scales = made_by[next(name for name in rescale.input if name != cast.output[0])]
        scale = next((name for name in scales.input if name in constants), None)
        if scale is None or quantize.output[1] not in scales.input:
            raise FormatError(
                f"int8 prompt graph: {rescale.output[0]!r} has an unknown scale (quantize again)"
            )
        wide = f"{rescale.output[0]}:weight"
        of_weight = node.input[1]
        weights.append(
            helper.make_node("Cast", [of_weight], [f"{wide}:cast"], to=TensorProto.FLOAT)
        )
        centred = f"{wide}:cast"
        if len(node.input) > 3 and node.input[3]:
            zero = [node.input[3]], [f"{wide}:zero"]
            weights.append(helper.make_node("Cast", *zero, to=TensorProto.FLOAT))
            weights.append(helper.make_node("Sub", [centred, f"{wide}:zero"], [f"{wide}:centred"]))
            centred = f"{wide}:centred"
        weights.append(helper.make_node("Mul", [centred, scale], [wide]))
        products[id(rescale)] = helper.make_node(
            "MatMul", [quantize.input[0], wide], [rescale.output[0]]
        )
        replaced |= {id(part) for part in (node, quantize, cast, scales)}
    if not products:
        raise FormatError("int8 prompt graph: no MatMulInteger (quantize again)")
    kept = [products.get(id(node), node) for node in graph.node if id(node) not in replaced]
    nodes = [*weights, *kept]
    del graph.node[:]
    graph.node.extend(nodes)


def _widen(graph: Any, narrow: int, wide: int) -> None:
    """Replace type `narrow` by `wide` in the graph; inputs are in single precision."""
    from onnx import TensorProto, helper

    renamed: dict[str, str] = {}
    nodes: list[Any] = []

    def widened(name: str) -> None:
        renamed[name] = f"{name}:wide"
        nodes.append(helper.make_node("Cast", [name], [renamed[name]], to=wide))

    for tensor in graph.initializer:
        if tensor.data_type == narrow:
            widened(tensor.name)
    for value in graph.input:
        kind = value.type.tensor_type
        if kind.elem_type == narrow:
            kind.elem_type = TensorProto.FLOAT
            if wide != TensorProto.FLOAT:
                widened(value.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == narrow:
                attribute.i = wide
            elif attribute.type == attribute.TENSOR and attribute.t.data_type == narrow:
                attribute.t.CopyFrom(_as_type(attribute.t, wide))
        if wide == TensorProto.DOUBLE and node.op_type in _SINGLE_ONLY:
            nodes.extend(_in_single_precision(node))
        else:
            nodes.append(node)
    for value in graph.output:
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    del graph.node[:]
    graph.node.extend(nodes)


def _as_type(tensor: Any, kind: int) -> Any:
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(values, tensor.name)


def _in_single_precision(node: Any) -> list[Any]:
    """Return casts down, the node, and casts up again."""
    from onnx import TensorProto, helper

    down, up = [], []
    for index, name in enumerate(node.input):
        if name:
            narrow = f"{node.output[0]}:in{index}"
            down.append(helper.make_node("Cast", [name], [narrow], to=TensorProto.FLOAT))
            node.input[index] = narrow
    for index, name in enumerate(node.output):
        narrow = f"{name}:single"
        up.append(helper.make_node("Cast", [narrow], [name], to=TensorProto.DOUBLE))
        node.output[index] = narrow
    return [*down, node, *up]

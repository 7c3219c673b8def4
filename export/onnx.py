"""Export a torch module as an ONNX file, with its weights in a file that graphs share."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from export.half_store import to_exact_half
from export.shared import LEAST, SharedWeights

OPSET = 20  # has Gelu as one operator; onnxruntime 1.20 runs up to 21
_MASKED = -1e4


@dataclass(frozen=True)
class Input:
    """An example of a graph input, and the names of its dynamic dimensions."""

    example: Tensor
    dims: Mapping[int, str]


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Input],
    path: Path,
    weights: SharedWeights | None = None,
    *,
    half: bool = False,
) -> None:
    """Write `module` to `path`, and its weights to `weights` or `path`.data.

    With `half`, weights that are exact in fp16 are stored in it, and cast to fp32 when the graph is
    opened. The graph's only output is `features`. The files contain no traces of this machine.
    """
    names = {name for given in inputs.values() for name in given.dims.values()}
    symbols = {name: torch.export.Dim(name, min=1) for name in sorted(names)}
    shapes = tuple(
        {axis: symbols[name] for axis, name in given.dims.items()} for given in inputs.values()
    )
    examples = tuple(given.example for given in inputs.values())
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # torch's fused attention of eager mode has no ONNX form.
        torch.backends.mha.set_fastpath_enabled(False)
        with _silence(), torch.no_grad():
            program: Any = torch.onnx.export(
                module.eval(),
                examples,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(inputs),
                output_names=["features"],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    model: onnx_ir.Model = program.model
    _scrub(model)
    _transpose_weights(model)
    if half:
        _store_as_half(model)
    _move_weights(model, weights or SharedWeights(path.with_name(f"{path.name}.data")))
    onnx_ir.save(model, path)


def _transpose_weights(model: onnx_ir.Model) -> None:
    """Store the weights of Gemm as [in, out], like those of MatMul, so that graphs share them.

    Without it the same layer is stored as [out, in] by a graph that calls it with matrices.
    """
    for node in model.graph.all_nodes():
        transposed = node.attributes.get("transB")
        weight: Any = node.inputs[1] if node.op_type == "Gemm" else None
        if transposed is None or not transposed.as_int() or weight.const_value is None:
            continue
        if len(weight.uses()) == 1:
            values = np.ascontiguousarray(weight.const_value.numpy().T)
            weight.const_value = onnx_ir.tensor(values, name=weight.name)
            weight.shape = onnx_ir.Shape(values.shape)
            node.attributes.pop("transB")


def _store_as_half(model: onnx_ir.Model) -> None:
    """Store the large weights that are exact in fp16 in it, with a cast to fp32.

    ONNX Runtime computes the casts of constants once, when a session is opened.
    """
    graph: Any = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor.dtype != onnx_ir.DataType.FLOAT or tensor.nbytes < LEAST:
            continue
        rounded = to_exact_half(tensor.numpy())
        if rounded is None:
            continue
        name = f"{value.name}.fp16"
        stored = onnx_ir.Value(
            name=name,
            shape=value.shape,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16),
            const_value=onnx_ir.tensor(rounded, name=name),
        )
        graph.initializers.pop(value.name)
        graph.register_initializer(stored)
        cast = onnx_ir.node("Cast", [stored], {"to": int(onnx_ir.DataType.FLOAT)})
        cast.outputs[0].name = value.name
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _move_weights(model: onnx_ir.Model, weights: SharedWeights) -> None:
    """Replace large weights by references to a file."""
    for value in model.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor.nbytes >= LEAST:
            value.const_value = onnx_ir.ExternalTensor(
                weights.path.name,
                weights.add(tensor.tobytes()),
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=str(value.name),
                base_dir=weights.path.parent,
            )


def _scrub(model: onnx_ir.Model) -> None:
    """Remove traces of this machine, and replace infinite mask values."""
    model.producer_name, model.doc_string = "ztune", None
    model.metadata_props.clear()
    graph: Any = model.graph
    nodes: list[Any] = list(graph.all_nodes())
    values: list[Any] = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    values += [value for node in nodes for value in node.outputs]
    for part in (graph, *nodes, *values):
        part.doc_string = None
        part.metadata_props.clear()
    for node in nodes:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
            node.attributes["value"] = onnx_ir.AttrTensor("value", _finite(tensor))
    for value in graph.initializers.values():
        value.const_value = _finite(value.const_value)


def _finite(tensor: Any) -> Any:
    """Return a tensor with -inf replaced by a value whose exp is 0, in fp16 too."""
    if tensor.dtype != onnx_ir.DataType.FLOAT:
        return tensor
    values = tensor.numpy()
    if not np.isneginf(values).any():
        return tensor
    finite = np.where(np.isneginf(values), np.float32(_MASKED), values)
    return onnx_ir.tensor(finite, name=tensor.name)


@contextlib.contextmanager
def _silence() -> Any:
    """Suppress the exporter's output, warnings and debug log, but not its exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.DEBUG))  # a tenth of the time
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)

"""Export a torch module as an ONNX file, with external data when it is large."""

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

from runtimes.bundle import EXTERNAL_THRESHOLD

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
    external_threshold: int = EXTERNAL_THRESHOLD,
) -> tuple[Path, ...]:
    """Write `module` to `path` and return the files written: `path`, and `path`.data if large.

    The graph's only output is `features`. The files contain no traces of this machine.
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
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    if size <= external_threshold:
        onnx_ir.save(model, path)
        return (path,)
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=data.name)
    return (path, data)


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

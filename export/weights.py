"""Read and write graphs, with large weights in an external data file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from export.shared import SharedWeights
from ztune.errors import FormatError
from ztune.printing import reason_of

# Bytes of weights above which a single graph has external data: ONNX Runtime maps that file, but
# holds a graph's own bytes twice while opening. A ViT-B/32 image pass peaks at 545 MB, not 770.
EXTERNAL_THRESHOLD = 16_000_000


def read_graph(path: Path) -> onnx.ModelProto:
    """Return a graph with all its weights in memory, those stored as fp16 in fp32.

    Raises: FormatError when it is not a valid ONNX graph.
    """
    try:
        onnx.checker.check_model(str(path))
        return _widen_stored(onnx.load(str(path)))
    except (onnx.checker.ValidationError, DecodeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path} is not a valid ONNX graph: {reason_of(error)} (export again)"
        ) from None


def _widen_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each fp16 weight that is only cast to fp32 by the result."""
    graph = model.graph
    half = {w.name: w for w in graph.initializer if w.data_type == TensorProto.FLOAT16}
    computed = {name for node in graph.node if node.op_type != "Cast" for name in node.input}
    for node in [node for node in graph.node if node.op_type == "Cast"]:
        name = node.input[0]
        if name in computed or name not in half or node.attribute[0].i != TensorProto.FLOAT:
            continue
        weight = half[name]
        values = numpy_helper.to_array(weight).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)
    return model


def write_graph(model: onnx.ModelProto, path: Path, threshold: int = EXTERNAL_THRESHOLD) -> None:
    """Write a graph to `path`, and its weights to `path`.data if they exceed `threshold` bytes.

    In that case `model` is modified.
    """
    if sum(len(weight.raw_data) for weight in model.graph.initializer) > threshold:
        SharedWeights(path.with_name(f"{path.name}.data")).move(model)
    path.write_bytes(model.SerializeToString())

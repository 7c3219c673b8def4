"""Read and write graphs, with large weights in an external data file."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.external_data_helper import set_external_data

from runtimes.bundle import EXTERNAL_THRESHOLD
from ztune.errors import FormatError
from ztune.printing import reason_of

# Bytes: smaller tensors stay in the graph, since shape inference needs some of them.
_LEAST = 1024
# Bytes: weights are aligned to pages for memory mapping.
_PAGE = 4096


def read_graph(path: Path) -> onnx.ModelProto:
    """Return a graph with all its weights in memory.

    Raises: FormatError when it is not a valid ONNX graph.
    """
    try:
        onnx.checker.check_model(str(path))
        return onnx.load(str(path))
    except (onnx.checker.ValidationError, DecodeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{path} is not a valid ONNX graph: {reason_of(error)} (export again)"
        ) from None


def write_graph(model: onnx.ModelProto, path: Path, threshold: int = EXTERNAL_THRESHOLD) -> None:
    """Write a graph to `path`, and its weights to `path`.data if they exceed `threshold` bytes.

    In that case `model` is modified.
    """
    weights = [w for w in model.graph.initializer if len(w.raw_data) >= _LEAST]
    if sum(len(weight.raw_data) for weight in weights) > threshold:
        data = path.with_name(f"{path.name}.data")
        with data.open("wb") as file:
            for weight in weights:
                file.write(bytes(-file.tell() % _PAGE))
                length = len(weight.raw_data)
                set_external_data(weight, data.name, file.tell(), length)
                file.write(weight.raw_data)
                weight.ClearField("raw_data")
                weight.data_location = TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())

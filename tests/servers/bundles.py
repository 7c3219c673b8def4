"""A bundle's models for the fake server, their graphs run by ONNX Runtime in this process."""

from collections.abc import Callable
from typing import Any

import onnxruntime

from export.served import client_graph, image_graph, prompt_graph, score_graph, text_graph
from runtimes.bundle import Bundle
from tests.servers.fake import Arrays, FakeModel, Tensor

_KINDS = {
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
}
GRAPHS: dict[str, Callable[[Bundle], Any]] = {
    "image": image_graph,
    "text": text_graph,
    "prompt": prompt_graph,
    "score": lambda bundle: score_graph(bundle, logits=True),
    "client": client_graph,
}


def model_of(graph: Any) -> FakeModel:
    """Serve a graph by ONNX Runtime in this process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = graph.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]

    def run(given: Arrays) -> Arrays:
        return dict(zip(outputs, session.run(outputs, given), strict=True))

    def described(values: Any) -> list[Tensor]:
        shapes = [[d if isinstance(d, int) else -1 for d in value.shape] for value in values]
        names = [(value.name, _KINDS[value.type]) for value in values]
        return [Tensor(*name, shape) for name, shape in zip(names, shapes, strict=True)]

    return FakeModel(described(session.get_inputs()), described(session.get_outputs()), run)


def models_of(bundle: Bundle) -> dict[str, FakeModel]:
    """Return all models of a bundle, called mini_image and so on."""
    return {f"mini_{part}": model_of(graph(bundle)) for part, graph in GRAPHS.items()}

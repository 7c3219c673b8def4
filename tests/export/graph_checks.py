"""Checks of a bundle's graphs that several tests make."""

import numpy as np
import onnx
import onnxruntime

from runtimes.bundle import Bundle
from runtimes.ort import parity_inputs
from runtimes.reference import to_reference_graph


def check_double_reference(bundle: Bundle) -> None:
    """Run the prompt graph in double precision, and compare it with torch."""
    given, expected = parity_inputs(bundle.file("parity.safetensors"), "prompt")
    model = to_reference_graph(onnx.load(bundle.file("prompt.onnx")), "fp32")
    double = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    features = double.run(None, given)[0]
    assert features.dtype == np.float64
    assert 0 < np.abs(features - expected).max() < 1e-6

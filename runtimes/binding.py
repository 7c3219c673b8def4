"""Run a graph at fixed shapes: constants are bound once, other inputs are copied in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.providers import explain_graph_errors, onnxruntime
from ztune.types import F32

DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}


class BoundCall:
    """A call of a graph with output `features`, whose buffers are reused between runs."""

    def __init__(
        self,
        session: Any,
        graph: Path,
        provider: str,
        constants: Mapping[str, np.ndarray],
        inputs: Mapping[str, tuple[int, ...]],
        output: tuple[int, ...],
    ):
        """Bind `constants`, and f32 buffers for `inputs` and the output by shape."""
        self._session, self._graph = session, graph
        with explain_graph_errors(graph):
            self._bind(DEVICES[provider], constants, inputs, output)

    def _bind(
        self,
        device: str,
        constants: Mapping[str, np.ndarray],
        inputs: Mapping[str, tuple[int, ...]],
        output: tuple[int, ...],
    ) -> None:
        value = onnxruntime().OrtValue
        self._binding = self._session.io_binding()
        # A binding does not keep bound values alive.
        self._constants = [
            value.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
            for array in constants.values()
        ]
        for name, bound in zip(constants, self._constants, strict=True):
            self._binding.bind_ortvalue_input(name, bound)
        self._inputs = {
            name: value.ortvalue_from_shape_and_type(shape, np.float32, device, 0)
            for name, shape in inputs.items()
        }
        for name, bound in self._inputs.items():
            self._binding.bind_ortvalue_input(name, bound)
        self._output = value.ortvalue_from_shape_and_type(output, np.float32, device, 0)
        self._binding.bind_ortvalue_output("features", self._output)

    def run(self, inputs: Mapping[str, F32]) -> Any:
        """Return the output as an OrtValue on its device; the next call overwrites it.

        Raises: ZtuneError naming the graph when ONNX Runtime fails.
        """
        with explain_graph_errors(self._graph):
            for name, array in inputs.items():
                self._inputs[name].update_inplace(np.ascontiguousarray(array, dtype=np.float32))
            self._session.run_with_iobinding(self._binding)
        return self._output

    def __call__(self, inputs: Mapping[str, F32]) -> F32:
        """Return the output; on a CPU the next call overwrites it.

        Raises: ZtuneError naming the graph when ONNX Runtime fails.
        """
        return np.asarray(self.run(inputs).numpy(), dtype=np.float32)

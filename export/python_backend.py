"""A model for Triton's Python backend that runs the ONNX graph in the same folder.

`ztune export-triton --backend python` copies this file into a model's folder as model.py. It does
not import ztune, which the server does not have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

# Must precede the import: ONNX Runtime 1.32 otherwise looks up a telemetry host.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

_PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}


class TritonPythonModel:
    """One instance of a model: its graph."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph on the configured device."""
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.use_deterministic_compute = True
        if "intra_op_thread_count" in parameters:
            options.intra_op_num_threads = int(parameters["intra_op_thread_count"])
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        kind = args["model_instance_kind"]
        provider: Any = _PROVIDERS[kind]
        if kind == "GPU":
            getattr(onnxruntime, "preload_dlls", lambda: None)()
            device = {"device_id": args["model_instance_device_id"], "use_tf32": "0"}
            provider = (provider, device | {"cudnn_conv_algo_search": "HEURISTIC"})
        self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        # ONNX Runtime silently continues without a provider that fails to load.
        if _PROVIDERS[kind] not in self._session.get_providers():
            raise RuntimeError(
                f"instance kind {kind} is configured, but onnxruntime has no provider for it"
            )
        self._inputs = [given.name for given in self._session.get_inputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run each request separately, since batching may change rounding."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        feeds = {
            name: backend.get_input_tensor_by_name(request, name).as_numpy()
            for name in self._inputs
        }
        wanted = list(request.requested_output_names())
        try:
            values = self._session.run(wanted, feeds)
        except Exception as error:  # onnxruntime raises its own types for invalid inputs
            words = " ".join(str(error).split())[:500]
            refusal = backend.TritonError(words, backend.TritonError.INVALID_ARG)
            return backend.InferenceResponse(output_tensors=[], error=refusal)
        tensors = [
            backend.Tensor(name, np.ascontiguousarray(value))
            for name, value in zip(wanted, values, strict=True)
        ]
        return backend.InferenceResponse(output_tensors=tensors)

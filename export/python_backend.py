"""A model for Triton's Python backend that runs the ONNX graph in the same folder.

`ztune export-triton --backend python` copies this file into a model's folder as model.py. It does
not import ztune, which the server does not have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

# Must precede the import: ONNX Runtime 1.32 otherwise looks up a telemetry host.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

_PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}
Arrays = dict[str, np.ndarray[Any, Any]]


class TritonPythonModel:
    """One instance of a model: its graph, and the image features that clients have stored."""

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
        self._digest = np.frombuffer(bytes.fromhex(parameters["bundle_digest"]), dtype=np.uint8)
        self._cache = (
            FeatureCache(int(parameters["keep_bytes"])) if "keep_bytes" in parameters else None
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run each request separately, since batching may change rounding."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        names = [*self._inputs, *(FeatureCache.INPUTS if self._cache else ())]
        given = {name: backend.get_input_tensor_by_name(request, name) for name in names}
        feeds = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
        wanted = list(request.requested_output_names())
        try:
            if self._cache is not None and self._cache.store(feeds):
                # Nothing is computed; the digest confirms that the images are stored.
                return backend.InferenceResponse([backend.Tensor("digest", self._digest)])
            if self._cache is not None:
                feeds = self._cache.expand(feeds)
            values = self._run(wanted, feeds)
        except _RequestError as error:
            return _error_response(str(error), error.code)
        except Exception as error:  # onnxruntime raises its own types for invalid inputs
            return _error_response(str(error), backend.TritonError.INVALID_ARG)
        tensors = [backend.Tensor(n, v) for n, v in zip(wanted, values, strict=True)]
        return backend.InferenceResponse(output_tensors=tensors)

    def _run(self, wanted: list[str], feeds: Arrays) -> list[np.ndarray[Any, Any]]:
        missing = sorted(set(self._inputs) - set(feeds))
        if missing:
            raise _RequestError(f"missing inputs: {', '.join(missing)}")
        return [np.ascontiguousarray(value) for value in self._session.run(wanted, feeds)]


class FeatureCache:
    """Image features and labels that clients send once and then refer to by SHA-256 (LRU)."""

    INPUTS = ("kept", "rows")

    def __init__(self, most_bytes: int):
        self._most = most_bytes
        self._sets: OrderedDict[bytes, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
        self._sets = OrderedDict()

    def store(self, feeds: Arrays) -> bool:
        """Store a request's features and labels; return False for a request to compute."""
        given = {"features", "labels"} & set(feeds)
        if "kept" not in feeds or not given:
            return False
        if len(given) == 1 or len(feeds["features"]) != len(feeds["labels"]):
            raise _RequestError("`kept` needs equal numbers of features and labels")
        name = feeds["kept"].tobytes()
        features, labels = np.array(feeds["features"]), np.array(feeds["labels"])
        if hashlib.sha256(features.tobytes() + labels.tobytes()).digest() != name:
            raise _RequestError("`kept` is not the SHA-256 of features and labels")
        if features.nbytes + labels.nbytes > self._most:
            raise _RequestError(f"features and labels exceed {self._most} bytes")
        self._sets.pop(name, None)
        self._sets[name] = features, labels
        while (
            sum(first.nbytes + second.nbytes for first, second in self._sets.values()) > self._most
        ):
            self._sets.popitem(last=False)
        return True

    def expand(self, feeds: Arrays) -> Arrays:
        """Return a request's inputs with the rows that it selects from a stored set."""
        if "kept" not in feeds:
            return feeds
        feeds = dict(feeds)
        name, rows = feeds.pop("kept").tobytes(), feeds.pop("rows", None)
        if name not in self._sets:
            raise _RequestError("no images are kept under this name", backend.TritonError.NOT_FOUND)
        self._sets.move_to_end(name)
        features, labels = self._sets[name]
        if rows is None or rows.ndim != 1 or rows.size == 0:
            raise _RequestError("`kept` needs `rows` i64[N]")
        if rows.min() < 0 or rows.max() >= len(features):
            raise _RequestError(f"`rows` must be between 0 and {len(features) - 1}")
        return {**feeds, "features": features[rows], "labels": labels[rows]}


class _RequestError(Exception):
    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = backend.TritonError.INVALID_ARG if code is None else code


def _error_response(message: str, code: int) -> Any:
    error = backend.TritonError(" ".join(message.split())[:500], code)
    return backend.InferenceResponse(output_tensors=[], error=error)

"""A server of the KServe v2 protocol over gRPC in this process, which says what a test wants."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype
from typing_extensions import Self

from tests.servers.process import LOOPBACK

Arrays = dict[str, npt.NDArray[Any]]


class Tensor(NamedTuple):
    """What a model's metadata says of one input or output; -1 is an open dimension."""

    name: str
    datatype: str
    shape: Sequence[int]


class FakeModel(NamedTuple):
    """A model: what its metadata says, and a function that need not keep to it."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    function: Callable[[Arrays], Arrays]


class FailedError(Exception):
    """Raised by a model's function or a hook: the call ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(details)
        self.code = code
        self.details = details


# Given the request and its honest answer (both messages of service_pb2), returns what is sent.
Hook = Callable[[Any, Any], Any]


class FakeServer:
    """Models by name, served from construction until `close`.

    `token` is what a caller must bear. `hook` may change or replace an answer, or raise
    FailedError. Both, and `extensions`, may be set again at any time.
    """

    def __init__(
        self,
        models: Mapping[str, FakeModel],
        *,
        token: str | None = None,
        extensions: Sequence[str] = (),
        hook: Hook | None = None,
        name: str = "fake",
        version: str = "1.0",
    ) -> None:
        self.models = dict(models)
        self.token = token
        self.extensions = list(extensions)
        self.hook = hook
        self.name = name
        self.version = version
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self.told: set[str] = set()
        """What callers have borne as authorization."""
        self._pool = ThreadPoolExecutor(max_workers=4)
        self._server = grpc.server(
            self._pool,
            interceptors=[_Guard(self)],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ],
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(self), self._server)
        self._port = self._server.add_insecure_port(f"{LOOPBACK}:0")
        self._server.start()

    @property
    def grpc(self) -> str:
        """The address for gRPC, as HOST:PORT."""
        return f"{LOOPBACK}:{self._port}"

    @property
    def calls(self) -> dict[str, int]:
        """How often each method was called, refused calls included."""
        with self._lock:
            return dict(self._calls)

    def called(self, method: str) -> None:
        """Count a call."""
        with self._lock:
            self._calls[method] += 1

    def close(self) -> None:
        """End every call and stop listening."""
        self._server.stop(grace=None).wait(10)
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Guard(grpc.ServerInterceptor):
    """Counts calls, and turns away who does not bear the token."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        self._server.called(details.method.rpartition("/")[2])
        token = self._server.token
        given = dict(details.invocation_metadata).get("authorization")
        if given is not None:
            self._server.told.add(given)
        if token is None or given == f"Bearer {token}":
            return continuation(details)

        def refuse(request: Any, context: Any) -> NoReturn:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
            raise AssertionError

        return grpc.unary_unary_rpc_method_handler(refuse)


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        server = self._server
        return service_pb2.ServerMetadataResponse(
            name=server.name, version=server.version, extensions=server.extensions
        )

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name in self._server.models)

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = self._model(request.name, context)
        message = service_pb2.ModelMetadataResponse(
            name=request.name, versions=["1"], platform="fake"
        )
        for tensor in model.inputs:
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        for tensor in model.outputs:
            message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        return message

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = self._model(request.model_name, context)
        try:
            honest = answer(request, model)
            return honest if self._server.hook is None else self._server.hook(request, honest)
        except FailedError as error:
            context.abort(error.code, error.details)

    def _model(self, name: str, context: Any) -> FakeModel:
        model = self._server.models.get(name)
        if model is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {name!r}")
            raise AssertionError
        return model


def answer(request: Any, model: FakeModel) -> Any:
    """Run a model on a request with raw contents and return the answer, with raw contents too."""
    wrong = grpc.StatusCode.INVALID_ARGUMENT
    names = [tensor.name for tensor in request.inputs]
    if sorted(names) != sorted(tensor.name for tensor in model.inputs):
        raise FailedError(wrong, f"not the model's inputs: {names}")
    if len(request.raw_input_contents) != len(names):
        raise FailedError(wrong, "inputs must come as raw contents")
    given: Arrays = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        try:
            flat = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))
            given[tensor.name] = flat.reshape(tuple(tensor.shape))
        except ValueError as error:
            raise FailedError(wrong, f"{tensor.name}: {error}") from error
    results = model.function(given)
    wanted = [tensor.name for tensor in request.outputs] or [t.name for t in model.outputs]
    message = service_pb2.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id
    )
    for name in wanted:
        if name not in results:
            raise FailedError(wrong, f"no output {name!r}")
        put(message, name, results[name])
    return message


def put(message: Any, name: str, value: npt.NDArray[Any]) -> None:
    """Put an output into an answer, in place of one of that name if there is one."""
    for index, tensor in enumerate(message.outputs):
        if tensor.name == name:
            del message.outputs[index]
            del message.raw_output_contents[index]
            break
    message.outputs.add(name=name, datatype=np_to_triton_dtype(value.dtype), shape=value.shape)
    message.raw_output_contents.append(np.ascontiguousarray(value).tobytes())

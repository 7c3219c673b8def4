"""One request to one server and its answer, over gRPC or HTTP: the KServe-v2 protocol.

Whatever goes wrong is one CallError, for both.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import os
import re
import selectors
import socket
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from runtimes.endpoint import Connection, Endpoint
from ztune.errors import ConfigError, ServerError, ZtuneError
from ztune.types import Json

LARGEST_ANSWER = 1_000_000_000
"""Bytes of an answer that are read at most."""
_LARGEST_METADATA = 10_000_000
_PIECE = 1 << 20
DATATYPES: Mapping[str, str] = {
    "float32": "FP32",
    "float64": "FP64",
    "int64": "INT64",
    "uint8": "UINT8",
}
Array = np.ndarray[Any, Any]
_BROKEN_OFF = "the server broke it off (does it want a certificate, or another one?)"
# What gRPC's words on TLS begin with, and what is said instead of the rest.
_TLS_WORDS = {
    "CERTIFICATE_VERIFY_FAILED: ": "",
    "Hostname Verification Check failed": "the certificate is another host's",
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS",
    "TSI_DATA_CORRUPTED": _BROKEN_OFF,
    "Tls handshake failed": "",
    "Ssl handshake failed": "",
}
_ALERTS = {
    "WRONG_VERSION_NUMBER": _TLS_WORDS["WRONG_VERSION_NUMBER"],
    "RECORD_LAYER_FAILURE": _TLS_WORDS["WRONG_VERSION_NUMBER"],
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server wants a certificate of this client",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know this client's authority",
    "TLSV1_ALERT_BAD_CERTIFICATE": "the server does not take this client's certificate",
}


class CallError(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind
        """away: no answer; busy: the server says later; broken: it failed inside, or what it says
        cannot be read; forgotten: what was left with it is there no longer; missing: no such model;
        denied: who we are; refused: the request itself."""

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered later."""
        return self.kind in ("away", "busy", "broken", "forgotten")


@dataclass(frozen=True)
class Region:
    """A part of a shared memory region of the server's host."""

    name: str
    n_bytes: int
    offset: int


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    version: str = ""
    inputs_at: Mapping[str, Region] = field(default_factory=dict)
    """Inputs that stand in shared memory; they are not sent."""
    outputs_at: Mapping[str, Region] = field(default_factory=dict)
    """Outputs that the server writes into shared memory; they are not in the answer."""


class Transport(Protocol):
    """A connection to one server; `infer` may be called from several threads."""

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is."""

    def ready(self, seconds: float) -> bool:
        """Return whether the server is live and ready.

        Raises: CallError when it does not answer.
        """

    def server(self, seconds: float) -> dict[str, Json]:
        """Return the server's metadata: name, version, extensions."""

    def model(self, name: str, version: str, seconds: float) -> dict[str, Json]:
        """Return a model's metadata: name, versions, platform, inputs, outputs.

        Raises: CallError of kind missing when there is none, or it is not ready.
        """

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        """Return the outputs as the server sent them.

        Of one in shared memory, zeros of the type and shape that the server says it has there.

        Raises: CallError.
        """

    def share(self, name: str, key: str, n_bytes: int, seconds: float) -> None:
        """Have the server open a shared memory region of its host."""

    def unshare(self, name: str, seconds: float) -> None:
        """Have the server close a shared memory region."""

    def close(self) -> None:
        """Give the connection up; what is on its way ends at once, without an answer."""


def open_transport(endpoint: Endpoint, connection: Connection) -> Transport:
    """Return a connection of the address's protocol; nothing is sent yet.

    Raises: ConfigError for files or secrets that cannot be used, ZtuneError without tritonclient.
    """
    connection.check_files()
    try:
        if endpoint.protocol == "grpc":
            return GrpcTransport(endpoint, connection)
        return HttpTransport(endpoint, connection)
    except ImportError as error:
        raise ZtuneError(
            f"a server is spoken to with tritonclient ({error}); install it with: "
            "pip install 'ztune[triton]'"
        ) from None


class GrpcTransport:
    """KServe-v2 over gRPC."""

    def __init__(self, endpoint: Endpoint, connection: Connection):
        # Its own words on standard error say the same as the error that is raised, at length.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import tritonclient.grpc as client

        self.endpoint = endpoint
        self._client_module = client
        self._headers = connection.headers(endpoint)
        self._compression = None if connection.compression == "none" else connection.compression
        if endpoint.secure and connection.insecure:
            raise ConfigError(
                "gRPC checks certificates always: leave out --insecure (name the server's own "
                "certificate with --tls-ca, or use https://)"
            )
        if endpoint.secure:
            connection.ssl_context()  # gRPC itself tells of unusable files only when it connects
        options = [
            # These replace all defaults of the client, its message sizes among them.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", LARGEST_ANSWER),
            # A server that comes back is found within a second; by default, within two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # We send a request again ourselves, where it is counted.
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._lock = threading.Lock()
        self._opened: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False
        self._connect = functools.partial(
            client.InferenceServerClient,
            endpoint.address,
            ssl=endpoint.secure,
            root_certificates=connection.tls_ca,
            private_key=connection.tls_key,
            certificate_chain=connection.tls_cert,
            channel_args=options,
        )
        try:
            self._client = self._connect()
            self._opened.add(self._client)
        except Exception as error:  # grpc raises its own kinds, for certificates and keys
            raise ConfigError(
                f"the files of --tls-ca, --tls-cert and --tls-key cannot be used ({error})"
            ) from None

    def ready(self, seconds: float) -> bool:
        return bool(
            self._call("is_server_live", seconds) and self._call("is_server_ready", seconds)
        )

    def server(self, seconds: float) -> dict[str, Json]:
        return _object(self._call("get_server_metadata", seconds, as_json=True))

    def model(self, name: str, version: str, seconds: float) -> dict[str, Json]:
        metadata = _object(self._call("get_model_metadata", seconds, name, version, as_json=True))
        if not self._call("is_model_ready", seconds, name, version):
            raise CallError(f'{self.endpoint}: model "{name}" is not ready', "missing")
        return metadata

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        module = self._client_module
        inputs, outputs = _described(module, request)
        result = self._call(
            "infer",
            seconds,
            request.model,
            inputs,
            request.version,
            outputs,
            compression_algorithm=self._compression,
        )
        return _read(self.endpoint, result, request, _told_by_grpc)

    def share(self, name: str, key: str, n_bytes: int, seconds: float) -> None:
        self._call("register_system_shared_memory", seconds, name, key, n_bytes)

    def unshare(self, name: str, seconds: float) -> None:
        self._call("unregister_system_shared_memory", seconds, name)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for client in list(self._opened):
                client.close()

    def _leave(self, client: Any) -> None:
        """Ask over a new connection from now on: this one may be dead without a sign of it.

        What others still await of it goes on; it closes with the last of them.
        """
        with self._lock:
            if client is self._client and not self._closed:
                self._client = self._connect()
                self._opened.add(self._client)

    def _call(self, method: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        client = self._client
        try:
            return getattr(client, method)(
                *arguments, headers=self._headers, client_timeout=seconds, **options
            )
        except InferenceServerException as error:
            if str(error.status()).endswith("DEADLINE_EXCEEDED"):
                self._leave(client)
            raise self._failure(error) from None
        except ValueError as error:  # the channel is closed
            raise CallError(f"{self.endpoint}: {_line(error)}", "away") from None

    def _failure(self, error: Any) -> CallError:
        code, text = str(error.status()), _line(error.message())
        kinds = {
            "DEADLINE_EXCEEDED": "away",
            "UNAVAILABLE": "away",
            "CANCELLED": "away",
            "UNKNOWN": "broken",
            "INTERNAL": "broken",
            "ABORTED": "away",
            "RESOURCE_EXHAUSTED": "busy",
            "NOT_FOUND": "missing",
            "UNAUTHENTICATED": "denied",
            "PERMISSION_DENIED": "denied",
        }
        kind = kinds.get(code.rpartition(".")[2], "refused")
        if "Received message larger than max" in text:
            kind = "refused"
        kind = _kind_by_words(text, kind)
        if code.endswith("DEADLINE_EXCEEDED"):
            text = "no answer within the deadline"
        if code.endswith("UNIMPLEMENTED"):
            text = "it does not offer this (UNIMPLEMENTED)"
        for mark, words in _TLS_WORDS.items():
            if mark in str(error.message()):
                text = f"TLS failed: {words or text.removesuffix(': OK')}"
                break
        return CallError(f"{self.endpoint}: {text}", kind)


class HttpTransport:
    """KServe-v2 over HTTP/1.1 with the binary tensor extension, or without as JSON.

    Bodies are made and read by tritonclient; the connection is ours, one for each thread, since its
    own holds to no deadline over a whole answer and reads answers of any size.
    """

    def __init__(self, endpoint: Endpoint, connection: Connection):
        import tritonclient.http as client

        self.endpoint = endpoint
        self._client_module = client
        self._headers = connection.headers(endpoint)
        self._compression = connection.compression
        self._context = connection.ssl_context() if endpoint.secure else None
        self._own = threading.local()
        self._lock = threading.Lock()
        self._open: set[_Timed] = set()
        self._closed = False
        self.binary = True
        """Whether tensors go as bytes; False for servers without the extension."""

    def ready(self, seconds: float) -> bool:
        status, content, _ = self._exchange("GET", "/v2/health/live", seconds, failing=False)
        if status == 200:
            status, content, _ = self._exchange("GET", "/v2/health/ready", seconds, failing=False)
        if status in (401, 403):
            raise _http_failure(self.endpoint, status, content)
        return status == 200

    def server(self, seconds: float) -> dict[str, Json]:
        metadata = self._json("/v2", seconds)
        extensions = metadata.get("extensions")
        self.binary = isinstance(extensions, list) and "binary_tensor_data" in extensions
        return metadata

    def model(self, name: str, version: str, seconds: float) -> dict[str, Json]:
        path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
        metadata = self._json(path, seconds)
        status, _, _ = self._exchange("GET", f"{path}/ready", seconds, failing=False)
        if status != 200:
            raise CallError(f'{self.endpoint}: model "{name}" is not ready', "missing")
        return metadata

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        module = self._client_module
        inputs, outputs = _described(module, request, binary=self.binary)
        body, json_size = module.InferenceServerClient.generate_request_body(inputs, outputs)
        headers = {"Content-Type": "application/octet-stream" if json_size else "application/json"}
        if json_size:
            headers["Inference-Header-Content-Length"] = str(json_size)
        if self._compression != "none":
            body = _compressed(body, self._compression)
            headers["Content-Encoding"] = self._compression
            headers["Accept-Encoding"] = self._compression
        path = f"/v2/models/{request.model}"
        if request.version:
            path += f"/versions/{request.version}"
        _, content, answered = self._exchange("POST", f"{path}/infer", seconds, body, headers)
        length = answered.get("inference-header-content-length")
        try:
            result = module.InferenceServerClient.parse_response_body(
                content, header_length=None if length is None else int(length)
            )
        except Exception as error:  # tritonclient raises many kinds for a body that is none
            raise _unreadable(self.endpoint, error) from None
        return _read(self.endpoint, result, request, _told_by_http)

    def share(self, name: str, key: str, n_bytes: int, seconds: float) -> None:
        body = json.dumps({"key": key, "offset": 0, "byte_size": n_bytes}).encode()
        self._exchange("POST", f"/v2/systemsharedmemory/region/{name}/register", seconds, body)

    def unshare(self, name: str, seconds: float) -> None:
        self._exchange("POST", f"/v2/systemsharedmemory/region/{name}/unregister", seconds, b"")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in self._open:
                if not connection.busy:
                    connection.close()
                elif connection.sock is not None:
                    # Another thread is at it, wakes up and closes it. The plain socket's shutdown,
                    # since TLS would have a say in its own.
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _json(self, path: str, seconds: float) -> dict[str, Json]:
        _, content, _ = self._exchange("GET", path, seconds, largest=_LARGEST_METADATA)
        try:
            return _object(json.loads(content))
        except ValueError:
            raise CallError(f"{self.endpoint}{path}: the answer is no JSON", "refused") from None

    def _exchange(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        failing: bool = True,
        largest: int | None = None,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Return status, body and lower-case headers of the answer, read within the deadline.

        Raises: CallError, also for a status other than 200 where `failing`.
        """
        until = time.monotonic() + seconds
        largest = LARGEST_ANSWER if largest is None else largest
        try:
            status, content, answered = self._exchanged(
                method, path, until, body, {**self._headers, **(headers or {})}, largest
            )
        except BaseException as error:
            # Whatever is still to come on this connection must not be taken for another answer.
            used = self._drop()
            if isinstance(error, ConnectionError | ssl.SSLEOFError) and used is False:
                # Since TLS 1.3 a client's certificate is refused after its first request is sent.
                raise CallError(f"{self.endpoint}: TLS failed: {_BROKEN_OFF}", "away") from None
            if isinstance(error, Exception):
                raise self._failure(error) from None
            raise
        if not self._keeps():
            self._drop()
        content = self._unpacked(content, answered.get("content-encoding", ""), largest)
        if failing and status != 200:
            raise _http_failure(self.endpoint, status, content)
        return status, content, answered

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, TimeoutError):
            return CallError(f"{self.endpoint}: no answer within the deadline", "away")
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            reason = _ALERTS.get(reason, _line(reason))
            return CallError(f"{self.endpoint}: TLS failed: {reason}", "away")
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
            text = "what answers there speaks no HTTP (gRPC is spoken to with triton://)"
            return CallError(f"{self.endpoint}: {text}", "away")
        if isinstance(error, OSError | http.client.HTTPException | ValueError):
            text = _line(getattr(error, "strerror", None) or error) or type(error).__name__
            return CallError(f"{self.endpoint}: {text}", "away")
        return error

    def _exchanged(
        self,
        method: str,
        path: str,
        until: float,
        body: bytes | None,
        headers: Mapping[str, str],
        largest: int,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        connection = self._connected(until)
        connection.until = until
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        answered = {key.lower(): value for key, value in response.getheaders()}
        parts, n_bytes = [], 0
        while not response.isclosed():
            part = response.read1(_PIECE)
            n_bytes += len(part)
            if n_bytes > largest:
                raise CallError(
                    f"{self.endpoint}: an answer of more than {largest} bytes", "refused"
                )
            if not part:
                break
            parts.append(part)
        if response.length:  # closed before all that was announced
            raise http.client.IncompleteRead(b"", response.length)
        response.close()  # the connection stays, for the next request
        return response.status, b"".join(parts), answered

    def _connected(self, until: float) -> _Timed:
        """Return this thread's connection: the one it has, where the server has not closed it."""
        connection: _Timed | None = getattr(self._own, "connection", None)
        if connection is not None and _is_stale(connection):
            self._drop()
            connection = None
        if connection is None:
            seconds = max(0.001, until - time.monotonic())
            host, port = self.endpoint.host, self.endpoint.port
            if self._context is not None:
                connection = _TimedSecure(host, port, timeout=seconds, context=self._context)
            else:
                connection = _TimedPlain(host, port, timeout=seconds)
            connection.connect()
            self._own.connection = connection
        with self._lock:
            self._open.add(connection)
            connection.busy = True
            closed = self._closed
        if closed:
            raise http.client.NotConnected("the connection was given up")
        return connection

    def _keeps(self) -> bool:
        """Return whether this thread's connection stays for its next request."""
        self._own.connection.answered = True
        with self._lock:
            self._own.connection.busy = False
            return not self._closed

    def _drop(self) -> bool | None:
        """Close this thread's connection; return whether one with TLS had ever been answered."""
        connection: _Timed | None = getattr(self._own, "connection", None)
        if connection is None:
            return None
        self._own.connection = None
        with self._lock:
            self._open.discard(connection)
        connection.close()
        return connection.answered if isinstance(connection, _TimedSecure) else None

    def _unpacked(self, content: bytes, kind: str, largest: int) -> bytes:
        """Return a body without its compression, and never more of it than `largest` bytes."""
        if kind in ("", "identity"):
            return content
        unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, told by its first bytes
        try:
            unpacked = unpacker.decompress(content, largest + 1)
        except zlib.error as error:
            raise _unreadable(self.endpoint, error) from None
        if len(unpacked) > largest:
            raise CallError(f"{self.endpoint}: an answer of more than {largest} bytes", "refused")
        if not unpacker.eof:
            raise _unreadable(self.endpoint, f"{kind} without its end")
        return unpacked


class _Deadline(io.RawIOBase):
    """Reads a socket until a moment, however often something arrives before."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, until: float):
        self._raw, self._sock, self._until = raw, sock, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._until))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Timed(http.client.HTTPConnection):
    """A connection whose next exchange must be over, sent and read, by `until`."""

    until = 0.0
    busy = False
    """Whether a thread is using it."""
    answered = False
    """Whether a request had an answer by it."""

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(_left(self.until))
        super().send(data)

    def response_class(  # type: ignore[override]
        self, sock: socket.socket, *arguments: Any, **options: Any
    ) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, *arguments, **options)
        raw = response.fp.detach()
        response.fp = io.BufferedReader(_Deadline(raw, sock, self.until))
        return response


class _TimedPlain(_Timed):
    pass


class _TimedSecure(_Timed, http.client.HTTPSConnection):
    pass


def _left(until: float) -> float:
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _is_stale(connection: http.client.HTTPConnection) -> bool:
    """Return whether the server has closed it, or said something that nobody asked for."""
    if connection.sock is None:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(connection.sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _http_failure(endpoint: Endpoint, status: int, content: bytes) -> CallError:
    try:
        told = json.loads(content)
        text = str(told.get("error") or told["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        text = http.client.responses.get(status, "")
    text = f"{_line(text)} (HTTP {status})"
    kind = "refused"
    if status in (401, 403):
        kind = "denied"
    elif status == 404:
        kind = "missing"
    elif status == 429:
        kind = "busy"
    elif status in (408, 502, 503, 504):
        kind = "away"
    elif status >= 500:
        kind = "broken"
    return CallError(f"{endpoint}: {text}", _kind_by_words(text, kind))


def _kind_by_words(text: str, kind: str) -> str:
    """Return the kind of a failure whose code says less than its words; codes differ by server."""
    if kind in ("refused", "missing", "broken"):
        if "no pictures are kept" in text or "unable to find" in text.lower():
            return "forgotten"
        if "unknown model" in text:
            return "missing"
    return kind


def _described(module: Any, request: Request, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return a request's inputs and outputs as tritonclient wants them."""
    inputs = []
    for name, array in request.inputs.items():
        given = module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        region = request.inputs_at.get(name)
        if region is not None:
            given.set_shared_memory(region.name, region.n_bytes, region.offset)
        elif "binary" in options:
            given.set_data_from_numpy(np.ascontiguousarray(array), binary_data=options["binary"])
        else:
            given.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(given)
    outputs = []
    for name in request.outputs:
        if "binary" in options:
            wanted = module.InferRequestedOutput(name, binary_data=options["binary"])
        else:
            wanted = module.InferRequestedOutput(name)
        region = request.outputs_at.get(name)
        if region is not None:
            wanted.set_shared_memory(region.name, region.n_bytes, region.offset)
        outputs.append(wanted)
    return inputs, outputs


def _read(
    endpoint: Endpoint, result: Any, request: Request, told: Callable[[Any], tuple[Any, Any]]
) -> dict[str, Array]:
    """Return the outputs that were asked for; `told` gives datatype and shape of one.

    Raises: CallError.
    """
    arrays = {}
    for name in request.outputs:
        try:
            output = result.get_output(name)
            array: Array | None = None
            if output is not None and name in request.outputs_at:
                datatype, shape = told(output)
                dtype = {ours: numpy for numpy, ours in DATATYPES.items()}[datatype]
                array = np.broadcast_to(np.zeros((), dtype), [int(size) for size in shape])
            elif output is not None:
                array = result.as_numpy(name)
        except Exception as error:  # bytes that do not fill the shape, no shape, no known type
            raise _unreadable(endpoint, error) from None
        if array is None:
            raise CallError(f'{endpoint}: {request.model}: the answer lacks "{name}"', "refused")
        arrays[name] = array
    return arrays


def _told_by_grpc(output: Any) -> tuple[Any, Any]:
    return output.datatype, output.shape


def _told_by_http(output: Any) -> tuple[Any, Any]:
    return output["datatype"], output["shape"]


def _unreadable(endpoint: Endpoint, reason: object) -> CallError:
    return CallError(f"{endpoint}: unreadable answer ({_line(reason)})", "broken")


def _compressed(body: bytes, kind: str) -> bytes:
    bits = 31 if kind == "gzip" else 15
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(body) + packer.flush()


def _object(value: Any) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise CallError("metadata is no object", "refused")
    return value


def _line(text: object) -> str:
    """Return an error's own words in one line: of gRPC's, what the last of its causes says."""
    # What a server says may be anything: no control characters reach a terminal.
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    words = " ".join(printable.split())
    for mark in ("last error: ", "CERTIFICATE_VERIFY_FAILED: "):
        if mark in words:
            words = words.rpartition(mark)[2]
    return re.sub(r"^[A-Z]+: (ipv4|ipv6):\S+: ", "", words)[:300]


def server_error(error: CallError) -> ServerError:
    """Return what a person reads of a CallError, and what to do about it."""
    hints = {
        "away": "is the address right, and the server up?",
        "busy": "the server has too much to do",
        "broken": "see the server's log",
        "denied": "give a token with ZTUNE_TOKEN or --token-file, or basic auth with "
        "ZTUNE_BASIC_AUTH or --basic-auth-file",
    }
    hint = hints.get(error.kind)
    if "TLS failed" in str(error):
        hint = "see --tls-ca, --tls-cert and --tls-key"
    return ServerError(f"{error} ({hint})" if hint else str(error))

"""Requests over HTTP/1.1: every byte of them within the deadline."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import selectors
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Mapping
from typing import Any

from runtimes.remote import transport
from runtimes.remote.endpoint import Connection, Endpoint
from runtimes.remote.transport import (
    BROKEN_OFF,
    NO_TLS,
    Array,
    CallError,
    Request,
    as_object,
    described,
    kind_by_words,
    one_line,
    read_arrays,
    unreadable,
    without_secrets,
)
from ztune.types import Json

_LARGEST_METADATA = 10_000_000
_PIECE = 1 << 20
# What is asked for a server's health, and the statuses of one that is not ready yet: Triton's is
# 400 to the second, a proxy's 503. Any other says what is wrong, or that no such server answers.
_HEALTH = {"/v2/health/live": (503,), "/v2/health/ready": (400, 503)}
_SETTINGS = "\x04"  # the type of the frame that begins HTTP/2, after three bytes of its length
_ALERTS = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server wants a certificate of this client",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know this client's authority",
    "TLSV1_ALERT_BAD_CERTIFICATE": "the server does not take this client's certificate",
}


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
        for path, not_yet in _HEALTH.items():
            status, content, _ = self._exchange("GET", path, seconds, failing=False)
            if status in not_yet:
                return False
            if status != 200:
                error = _http_failure(f"{self.endpoint}{path}", status, content)
                kind = error.kind if error.passing or error.kind == "denied" else "foreign"
                raise without_secrets(CallError(str(error), kind), self._headers)
        return True

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
            raise CallError(f'{self.endpoint}: model "{name}" is not ready', "loading")
        return metadata

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        module = self._client_module
        inputs, outputs = described(module, request, binary_data=self.binary)
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
            raise unreadable(self.endpoint, error) from None
        return read_arrays(self.endpoint, result, request)

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
            return as_object(json.loads(content))
        except (ValueError, RecursionError):
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
        largest = transport.LARGEST_ANSWER if largest is None else largest
        try:
            status, content, answered = self._exchanged(
                method, path, until, body, {**self._headers, **(headers or {})}, largest
            )
        except BaseException as error:
            # Whatever is still to come on this connection must not be taken for another answer.
            used = self._drop()
            if isinstance(error, ConnectionError | ssl.SSLEOFError) and used is False:
                # Since TLS 1.3 a client's certificate is refused after its first request is sent.
                raise CallError(f"{self.endpoint}: TLS failed: {BROKEN_OFF}", "away") from None
            if isinstance(error, Exception):
                raise self._failure(error) from None
            raise
        if not self._keeps():
            self._drop()
        content = self._unpacked(content, answered.get("content-encoding", ""), largest)
        if failing and status != 200:
            raise without_secrets(_http_failure(self.endpoint, status, content), self._headers)
        return status, content, answered

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, TimeoutError):
            return CallError(f"{self.endpoint}: no answer within the deadline", "away")
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            reason = _ALERTS.get(reason, one_line(reason))
            return CallError(f"{self.endpoint}: TLS failed: {reason}", "away")
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
            text = "what answers there does not speak HTTP"
            line = str(error.args[0])
            if line[:2] == "\0\0" and line[3:4] == _SETTINGS:
                scheme = "tritons" if self.endpoint.secure else "triton"
                text = f"the port speaks gRPC, not HTTP (use {scheme}://{self.endpoint.address})"
            return CallError(f"{self.endpoint}: {text}", "foreign")
        if isinstance(error, OSError | http.client.HTTPException | ValueError):
            text = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
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
            raise unreadable(self.endpoint, error) from None
        if len(unpacked) > largest:
            raise CallError(f"{self.endpoint}: an answer of more than {largest} bytes", "refused")
        if not unpacker.eof:
            raise unreadable(self.endpoint, f"{kind} without its end")
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


def _http_failure(where: Endpoint | str, status: int, content: bytes) -> CallError:
    try:
        told = json.loads(content)
        text = str(told.get("error") or told["detail"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = http.client.responses.get(status, "")
    text = f"{one_line(text)} (HTTP {status})"
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
    return CallError(f"{where}: {text}", kind_by_words(text, kind))


def _compressed(body: bytes, kind: str) -> bytes:
    bits = 31 if kind == "gzip" else 15
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(body) + packer.flush()

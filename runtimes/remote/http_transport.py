"""Requests over HTTP/1.1: tritonclient builds and parses bodies, aiohttp sends them.

tritonclient's own HTTP clients lack four guarantees, each tested in
tests/runtimes/remote/test_transport.py: a deadline for the whole answer
(test_a_deadline_is_over_the_whole_answer), a limit on the bytes of an answer before they are in
memory (test_an_http_answer_that_is_too_large, test_a_small_body_that_unpacks_to_a_large_one), no
redirect that sends tensors and token elsewhere (test_a_redirect_is_not_followed), and `close` from
another thread (test_closing_ends_an_http_call). aiohttp lacks one: a late answer must not be taken
for the next request's (test_what_comes_unasked_is_no_answer_to_the_next_question): `_Connector`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import io
import json
import os
import re
import socket
import ssl
import threading
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import aiohttp
import tritonclient.http as client

from runtimes.remote import transport
from runtimes.remote.endpoint import Connection, Endpoint
from runtimes.remote.transport import (
    BROKEN_OFF,
    NO_TLS,
    Array,
    CallError,
    Request,
    last_cause,
    read_arrays,
    redact,
    refine_kind,
    require_object,
    to_client_tensors,
    unreadable_answer,
)
from ztune.types import Json

_LARGEST_METADATA = 10_000_000
# Health paths and the statuses that mean not ready yet: Triton's 400 for the second, a proxy's 503.
# Other statuses are errors.
_HEALTH = {"/v2/health/live": (503,), "/v2/health/ready": (400, 503)}
# Start of the SETTINGS frame that a gRPC server sends, as quoted by aiohttp's error.
_SETTINGS = re.compile(r"\\x00\\x00.{1,4}\\x04")
_ALERTS = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server requires a client certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not trust the authority of the client certificate",
    "TLSV1_ALERT_BAD_CERTIFICATE": "the server rejects the client certificate",
}


class _Connector(aiohttp.TCPConnector):
    """Reuses a connection only if no unexpected bytes arrived on it."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._used: weakref.WeakSet[Any] = weakref.WeakSet()
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def close(self, **options: Any) -> None:
        """Close every socket now, also one whose request was cut off half sent."""
        await super().close(**options)
        for socket_transport in list(self._transports):
            socket_transport.abort()
        await asyncio.sleep(0)  # the event loop closes them in its next iteration

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        while True:
            connection = await super().connect(*arguments, **options)
            if connection.transport is not None:
                self._transports.add(connection.transport)
            if connection.protocol not in self._used:
                self._used.add(connection.protocol)
                return connection
            try:
                # The event loop reads pending bytes by its second iteration at the latest.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                connection.close()
                raise
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()


class HttpTransport:
    """KServe-v2 over HTTP/1.1, with binary tensors, or JSON for servers without that extension.

    Exchanges run in an event loop in a separate thread; callers wait for them.
    """

    def __init__(self, endpoint: Endpoint, connection: Connection):
        self.endpoint = endpoint
        self._headers = connection.headers(endpoint)
        self._compression = connection.compression
        self._context = connection.ssl_context() if endpoint.secure else None
        self.binary = True
        """Whether tensors are sent as bytes; False for servers without the extension."""
        self._answered = False
        self._lock = threading.Lock()
        self._closed = False
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ztune-http")
        self._thread.daemon = True
        self._thread.start()

    def ready(self, seconds: float) -> bool:
        for path, not_yet in _HEALTH.items():
            status, content, _ = self._exchange("GET", path, seconds, failing=False)
            if status in not_yet:
                return False
            if status != 200:
                error = _http_failure(f"{self.endpoint}{path}", status, content)
                kind = error.kind if error.retryable or error.kind == "denied" else "foreign"
                raise redact(CallError(str(error), kind), self._headers)
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
        inputs, outputs = to_client_tensors(client, request, binary_data=self.binary)
        body, json_size = client.InferenceServerClient.generate_request_body(inputs, outputs)
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
            result = client.InferenceServerClient.parse_response_body(
                content, header_length=None if length is None else int(length)
            )
        except Exception as error:  # tritonclient raises many types for invalid bodies
            raise unreadable_answer(self.endpoint, error) from None
        return read_arrays(self.endpoint, result, request)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _json(self, path: str, seconds: float) -> dict[str, Json]:
        _, content, _ = self._exchange("GET", path, seconds, largest=_LARGEST_METADATA)
        try:
            return require_object(json.loads(content))
        except (ValueError, RecursionError):
            raise CallError(f"{self.endpoint}{path}: the answer is not JSON", "refused") from None

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
        """Return status, body and headers of the answer, read within the deadline.

        Raises: CallError, also for a status other than 200 where `failing`.
        """
        largest = transport.LARGEST_ANSWER if largest is None else largest
        every = {"Accept-Encoding": "identity", **self._headers, **(headers or {})}
        with self._lock:
            if self._closed:
                raise CallError(f"{self.endpoint}: the connection was closed", "away")
            future = asyncio.run_coroutine_threadsafe(
                self._exchanged(method, path, seconds, body, every, largest), self._loop
            )
        try:
            status, content, answered = future.result()
        except Exception as error:  # aiohttp, TLS or the system: `_failure` tells which
            raise self._failure(error) from None
        finally:
            future.cancel()  # if the caller was interrupted
        self._answered = True
        content = self._unpacked(content, answered.get("content-encoding", ""), largest)
        if failing and status != 200:
            raise redact(_http_failure(self.endpoint, status, content), self._headers)
        return status, content, answered

    async def _exchanged(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None,
        headers: Mapping[str, str],
        largest: int,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=_Connector(limit=0, ssl=self._context or True),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        content = bytearray()
        async with self._session.request(
            method,
            f"{'https' if self.endpoint.secure else 'http'}://{self.endpoint.address}{path}",
            data=None if body is None else io.BytesIO(body),
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=max(0.001, seconds)),
        ) as response:
            async for piece in response.content.iter_any():
                content += piece
                if len(content) > largest:
                    raise self._too_large(largest)
            return response.status, bytes(content), response.headers

    def _too_large(self, largest: int) -> CallError:
        return CallError(f"{self.endpoint}: the answer is larger than {largest} bytes", "refused")

    def _failure(self, error: Exception) -> Exception:
        # Before 3.11 asyncio.TimeoutError is not the built-in one.
        if isinstance(error, asyncio.TimeoutError):
            return CallError(f"{self.endpoint}: no answer within the deadline", "away")
        if isinstance(error, concurrent.futures.CancelledError):
            return CallError(f"{self.endpoint}: the connection was closed", "away")
        if isinstance(error, aiohttp.ClientResponseError):
            kind, text = "foreign", "not an HTTP server"
            if _SETTINGS.search(error.message):
                scheme = "tritons" if self.endpoint.secure else "triton"
                text = f"the port speaks gRPC, not HTTP (use {scheme}://{self.endpoint.address})"
            return CallError(f"{self.endpoint}: {text}", kind)
        if not isinstance(error, aiohttp.ClientError | OSError):
            return error
        cause = error.__cause__ or error
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", "") or cause.reason or str(cause)
            reason = _ALERTS.get(reason, last_cause(reason))
            return CallError(f"{self.endpoint}: TLS failed: {reason}", "away")
        if self._context is not None and not self._answered:
            # With TLS 1.3 a client certificate is rejected after the first request is sent.
            broken = (aiohttp.ServerDisconnectedError, ConnectionResetError)
            if isinstance(error, broken) or isinstance(cause, broken):
                return CallError(f"{self.endpoint}: TLS failed: {BROKEN_OFF}", "away")
        text = str(error)
        if isinstance(cause, OSError) and cause.errno is not None:
            named = not isinstance(cause, socket.gaierror)
            text = os.strerror(cause.errno) if named else str(cause.strerror)
        return CallError(f"{self.endpoint}: {last_cause(text) or type(error).__name__}", "away")

    def _unpacked(self, content: bytes, kind: str, largest: int) -> bytes:
        """Decompress a body, up to `largest` bytes."""
        if kind in ("", "identity"):
            return content
        unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, by the first bytes
        try:
            unpacked = unpacker.decompress(content, largest + 1)
        except zlib.error as error:
            raise unreadable_answer(self.endpoint, error) from None
        if len(unpacked) > largest:
            raise self._too_large(largest)
        if not unpacker.eof:
            raise unreadable_answer(self.endpoint, f"truncated {kind}")
        return unpacked


def _http_failure(where: Endpoint | str, status: int, content: bytes) -> CallError:
    try:
        document = json.loads(content)
        text = str(document.get("error") or document["detail"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = http.client.responses.get(status, "")
    text = f"{last_cause(text)} (HTTP {status})"
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
    return CallError(f"{where}: {text}", refine_kind(text, kind))


def _compressed(body: bytes, kind: str) -> bytes:
    bits = 31 if kind == "gzip" else 15
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(body) + packer.flush()

"""Requests over gRPC, by tritonclient's own client.

ztune adds the kinds of failures, and a new connection after a deadline: a connection that a gateway
forgot must not be used again (tests/remote/test_faults.py::test_a_connection_that_has_gone_silent).
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import ssl
import threading
import weakref
from typing import Any

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
)
from ztune.errors import ConfigError
from ztune.types import Json

# gRPC's errors for a port of another protocol, and for a server that dies.
_NO_GRPC = ("SETTINGS frame", "Socket closed", "Connection reset")
# Starts of gRPC's TLS errors, and the text that replaces the rest.
_TLS_WORDS = {
    "CERTIFICATE_VERIFY_FAILED: ": "",
    "Hostname Verification Check failed": "the certificate is for another host",
    "WRONG_VERSION_NUMBER": NO_TLS,
    "TSI_DATA_CORRUPTED": BROKEN_OFF,
    "Tls handshake failed": "",
    "Ssl handshake failed": "",
}


class GrpcTransport:
    """KServe-v2 over gRPC."""

    def __init__(self, endpoint: Endpoint, connection: Connection):
        # gRPC would log on stderr what the raised error says.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import tritonclient.grpc as client

        self.endpoint = endpoint
        self._client_module = client
        self._context: ssl.SSLContext | None = None
        self._headers = connection.headers(endpoint)
        self._compression = None if connection.compression == "none" else connection.compression
        if endpoint.secure and connection.insecure:
            raise ConfigError(
                "`insecure` is not supported by gRPC, which always checks certificates (give the "
                "server's own certificate with `tls_ca`, or use https://)"
            )
        if endpoint.secure:
            # gRPC itself reports unusable files only when it connects.
            self._context = connection.ssl_context()
        options = [
            # These replace all defaults of the client, including its message sizes.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", transport.LARGEST_ANSWER),
            # Reconnect within a second of a restart; the default is two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Service retries, and counts it.
            ("grpc.enable_retries", 0),
            # No proxy: it would see what is not encrypted.
            ("grpc.enable_http_proxy", 0),
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
        except Exception as error:  # grpc raises its own types for certificates and keys
            raise ConfigError(
                f"invalid file of `tls_ca`, `tls_cert` or `tls_key`: {error}"
            ) from None

    def ready(self, seconds: float) -> bool:
        try:
            return bool(
                self._call("is_server_live", seconds) and self._call("is_server_ready", seconds)
            )
        except CallError as error:
            kind = "foreign" if "UNIMPLEMENTED" in str(error) else error.kind
            raise CallError(str(error), kind) from None

    def server(self, seconds: float) -> dict[str, Json]:
        return require_object(self._call("get_server_metadata", seconds, as_json=True))

    def model(self, name: str, version: str, seconds: float) -> dict[str, Json]:
        metadata = require_object(
            self._call("get_model_metadata", seconds, name, version, as_json=True)
        )
        if not self._call("is_model_ready", seconds, name, version):
            raise CallError(f'{self.endpoint}: model "{name}" is not ready', "loading")
        return metadata

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        module = self._client_module
        inputs, outputs = to_client_tensors(module, request)
        result = self._call(
            "infer",
            seconds,
            request.model,
            inputs,
            request.version,
            outputs,
            compression_algorithm=self._compression,
        )
        return read_arrays(self.endpoint, result, request)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for client in list(self._opened):
                client.close()

    def _reconnect(self, client: Any) -> None:
        """Replace a connection that may be dead; its pending calls continue."""
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
                self._reconnect(client)
            raise self._failure(error) from None
        except ValueError as error:  # the channel is closed
            raise CallError(f"{self.endpoint}: {last_cause(error)}", "away") from None

    def _failure(self, error: Any) -> CallError:
        code, text = str(error.status()), last_cause(error.message())
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
        kind = refine_kind(text, kind)
        if code.endswith("DEADLINE_EXCEEDED"):
            text = "no answer within the deadline"
        if code.endswith("UNIMPLEMENTED"):
            text = "the server does not implement this call (UNIMPLEMENTED)"
        if any(words in text for words in _NO_GRPC) and self._speaks_http:
            scheme = "https" if self.endpoint.secure else "http"
            text = f"the port speaks HTTP, not gRPC (use {scheme}://{self.endpoint.address})"
            kind = "foreign"
        elif "SETTINGS frame" in text:
            kind, text = "foreign", "not a gRPC server"
        for mark, words in _TLS_WORDS.items():
            if mark in str(error.message()):
                text = f"TLS failed: {words or text.removesuffix(': OK')}"
                break
        return redact(CallError(f"{self.endpoint}: {text}", kind), self._headers)

    @functools.cached_property
    def _speaks_http(self) -> bool:
        """Whether the port answers an HTTP/1.1 request (sent without secrets)."""
        host, port = self.endpoint.host, self.endpoint.port
        probe = http.client.HTTPConnection(host, port, timeout=5)
        if self.endpoint.secure:
            probe = http.client.HTTPSConnection(host, port, timeout=5, context=self._context)
        with contextlib.closing(probe):
            try:
                probe.request("GET", "/v2/health/live")
                probe.getresponse()
            except (OSError, http.client.HTTPException, ValueError):
                return False
        return True

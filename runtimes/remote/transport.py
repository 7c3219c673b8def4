"""What the gRPC and HTTP transports of the KServe-v2 protocol share; both raise CallError."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtimes.remote.endpoint import Endpoint
from ztune.errors import ServerError
from ztune.types import Json

LARGEST_ANSWER = 1_000_000_000
"""Maximum bytes of an answer."""
DATATYPES: Mapping[str, str] = {
    "float32": "FP32",
    "float64": "FP64",
    "int64": "INT64",
    "uint8": "UINT8",
}
NUMPY_TYPES = {datatype: np.dtype(name) for name, datatype in DATATYPES.items()}
Array = np.ndarray[Any, Any]
BROKEN_OFF = "the server closed the connection (is a client certificate missing or wrong?)"
NO_TLS = "the server does not use TLS"


class CallError(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind
        """away: no answer; busy: retry later; broken: internal error or unreadable answer;
        foreign: not a KServe-v2 server; missing: no such model; loading: model not ready;
        denied: not authorised; refused: invalid request."""

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind in ("away", "busy", "broken", "foreign")


@dataclass(frozen=True)
class Request:
    """An inference request to one model."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    version: str = ""


class Transport(Protocol):
    """A connection to one server; `infer` may be called from several threads."""

    @property
    def endpoint(self) -> Endpoint:
        """The server's address."""

    def ready(self, seconds: float) -> bool:
        """Return whether the server is live and ready.

        Raises: CallError when it does not answer or is not a KServe-v2 server.
        """

    def server(self, seconds: float) -> dict[str, Json]:
        """Return the server's metadata: name, version, extensions."""

    def model(self, name: str, version: str, seconds: float) -> dict[str, Json]:
        """Return a model's metadata: name, versions, platform, inputs, outputs.

        Raises: CallError of kind missing when there is none, loading when it is not ready.
        """

    def infer(self, request: Request, seconds: float) -> dict[str, Array]:
        """Return the outputs as the server sent them.

        Raises: CallError.
        """

    def close(self) -> None:
        """Close the connection; pending requests end at once, without an answer."""


def to_client_tensors(module: Any, request: Request, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return a request's inputs and outputs as tritonclient's objects."""
    inputs = []
    for name, array in request.inputs.items():
        given = module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        given.set_data_from_numpy(np.ascontiguousarray(array), **options)
        inputs.append(given)
    return inputs, [module.InferRequestedOutput(name, **options) for name in request.outputs]


def read_arrays(endpoint: Endpoint, result: Any, request: Request) -> dict[str, Array]:
    """Return the requested outputs.

    Raises: CallError.
    """
    arrays = {}
    for name in request.outputs:
        try:
            array: Array | None = None
            if result.get_output(name) is not None:
                array = result.as_numpy(name)
        except Exception as error:  # wrong number of bytes, no shape, unknown type
            raise unreadable_answer(endpoint, error) from None
        if array is None:
            raise CallError(
                f'{endpoint}: {request.model}: no output "{name}" in the answer', "refused"
            )
        arrays[name] = array
    return arrays


def unreadable_answer(endpoint: Endpoint, reason: object) -> CallError:
    return CallError(f"{endpoint}: unreadable answer ({last_cause(reason)})", "broken")


def refine_kind(text: str, kind: str) -> str:
    """Refine an error's kind by its text, since codes differ by server."""
    return "missing" if kind in ("refused", "broken") and "unknown model" in text else kind


def redact(error: CallError, headers: Mapping[str, str]) -> CallError:
    """Remove the request's secrets from an error, in case the server repeats them."""
    text = str(error)
    for value in headers.values():
        for secret in (value, value.partition(" ")[2]):
            text = text.replace(secret, "…") if secret else text
    return CallError(text, error.kind)


def require_object(value: Any) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise CallError("metadata is not a JSON object", "refused")
    return value


def last_cause(text: object) -> str:
    """Return an error's text in one printable line; for gRPC and TLS that of its last cause."""
    # No control characters from a server may reach a terminal.
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    words = " ".join(printable.split())
    for mark in ("last error: ", "CERTIFICATE_VERIFY_FAILED: "):
        if mark in words:
            words = words.rpartition(mark)[2]
    return re.sub(r"^[A-Z]+: (ipv4|ipv6):\S+: ", "", words)[:300]


def to_server_error(error: CallError) -> ServerError:
    """Convert a CallError, adding what to do about it."""
    hints = {
        "away": "check the address, and that the server is running",
        "busy": "the server is overloaded; retry later",
        "broken": "see the server's log",
        "foreign": "expected a KServe-v2 server; check the address",
        "denied": "give a token with ZTUNE_TOKEN or `token_file`, or basic auth with "
        "ZTUNE_BASIC_AUTH or `basic_auth_file`",
    }
    hint = hints.get(error.kind)
    if "TLS failed" in str(error):
        hint = "check `tls_ca`, `tls_cert` and `tls_key`; runs do not save them"
    if NO_TLS in str(error):
        hint = "use triton:// or http:// for a server without TLS"
    if "(use " in str(error):
        hint = None
    return ServerError(f"{error} ({hint})" if hint else str(error))

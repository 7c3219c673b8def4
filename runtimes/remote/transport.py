"""One request to one server and its answer: what the KServe-v2 protocol's two transports share.

Whatever goes wrong is one CallError, for both.
"""

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
"""Bytes of an answer that are read at most."""
DATATYPES: Mapping[str, str] = {
    "float32": "FP32",
    "float64": "FP64",
    "int64": "INT64",
    "uint8": "UINT8",
}
NUMPY_TYPES = {ours: np.dtype(name) for name, ours in DATATYPES.items()}
Array = np.ndarray[Any, Any]
BROKEN_OFF = "the server broke it off (does it want a certificate, or another one?)"
NO_TLS = "what answers there speaks no TLS"


class CallError(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind
        """away: no answer; busy: the server says later; broken: it failed inside, or what it says
        cannot be read; foreign: what answers is not a KServe-v2 server; missing: no such model;
        loading: a model that is not ready; denied: who we are; refused: the request itself."""

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered later."""
        return self.kind in ("away", "busy", "broken", "foreign")


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str]
    version: str = ""


class Transport(Protocol):
    """A connection to one server; `infer` may be called from several threads."""

    @property
    def endpoint(self) -> Endpoint:
        """Where the server is."""

    def ready(self, seconds: float) -> bool:
        """Return whether the server is live and ready.

        Raises: CallError when it does not answer, or not as a KServe-v2 server.
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
        """Give the connection up; what is on its way ends at once, without an answer."""


def described(module: Any, request: Request, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return a request's inputs and outputs as tritonclient wants them."""
    inputs = []
    for name, array in request.inputs.items():
        given = module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
        given.set_data_from_numpy(np.ascontiguousarray(array), **options)
        inputs.append(given)
    return inputs, [module.InferRequestedOutput(name, **options) for name in request.outputs]


def read_arrays(endpoint: Endpoint, result: Any, request: Request) -> dict[str, Array]:
    """Return the outputs that were asked for.

    Raises: CallError.
    """
    arrays = {}
    for name in request.outputs:
        try:
            array: Array | None = None
            if result.get_output(name) is not None:
                array = result.as_numpy(name)
        except Exception as error:  # bytes that do not fill the shape, no shape, no known type
            raise unreadable(endpoint, error) from None
        if array is None:
            raise CallError(f'{endpoint}: {request.model}: the answer lacks "{name}"', "refused")
        arrays[name] = array
    return arrays


def unreadable(endpoint: Endpoint, reason: object) -> CallError:
    return CallError(f"{endpoint}: unreadable answer ({one_line(reason)})", "broken")


def kind_by_words(text: str, kind: str) -> str:
    """Return the kind of a failure whose code says less than its words; codes differ by server."""
    return "missing" if kind in ("refused", "broken") and "unknown model" in text else kind


def without_secrets(error: CallError, headers: Mapping[str, str]) -> CallError:
    """Return an error that repeats nothing of what authorised the request, should a server do."""
    text = str(error)
    for value in headers.values():
        for secret in (value, value.partition(" ")[2]):
            text = text.replace(secret, "…") if secret else text
    return CallError(text, error.kind)


def as_object(value: Any) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise CallError("metadata is no object", "refused")
    return value


def one_line(text: object) -> str:
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
        "foreign": "is this a KServe-v2 server, and the address right?",
        "denied": "give a token with ZTUNE_TOKEN or `token_file`, or basic auth with "
        "ZTUNE_BASIC_AUTH or `basic_auth_file`",
    }
    hint = hints.get(error.kind)
    if "TLS failed" in str(error):
        hint = "see `tls_ca`, `tls_cert` and `tls_key`, which no run keeps"
    if NO_TLS in str(error):
        hint = "use triton:// or http:// for a server without TLS"
    if "(use " in str(error):
        hint = None
    return ServerError(f"{error} ({hint})" if hint else str(error))

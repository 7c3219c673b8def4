"""The models of one bundle on a server, with retries until `give_up`.

Requests are idempotent, so retries are safe. Their content never depends on timing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from runtimes.remote.contract import IMAGE, PARTS, TEXT, Offer, Tensor, Tensors, parse_offer
from runtimes.remote.endpoint import Connection, Endpoint, Location
from runtimes.remote.transport import Array, CallError, Request, Transport, to_server_error
from ztune.errors import AwayError, ServerError, ZtuneError, how_to_install

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0
_HEALTH_SECONDS = 2.0
_START_SECONDS = 10.0
# Maximum server errors for one request: each may be billed.
_MOST_BROKEN = 4
_CLOSING_SECONDS = 2.0
_LEAST_SECONDS = 0.05
OnSend = Callable[[int, int], None]
"""Called before a request is sent, with its number in the round and its queries."""


@dataclass(frozen=True)
class ModelRequest:
    """A request to one of the bundle's models, with the expected outputs."""

    part: str
    inputs: Mapping[str, Array]
    outputs: Tensors
    n_queries: int = 0
    """Candidates evaluated; 0 if it is not charged."""

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.inputs.values())


Infer = Callable[[ModelRequest], dict[str, Array]]


@dataclass(frozen=True)
class _Slot:
    """The place of a request in its round."""

    number: int
    cancelled: threading.Event
    """Set when the round's answers are no longer needed."""


class Service:
    """Client of the models of one bundle on a server."""

    def __init__(
        self,
        location: Location,
        connection: Connection,
        remark: Callable[[str], None] = lambda line: None,
    ):
        """Validate the settings; nothing is sent yet.

        Raises: ConfigError for files, secrets or addresses that cannot be used.
        """
        self.location = location
        self.connection = connection
        self.offers: dict[str, Offer] = {}
        self.extensions: frozenset[str] = frozenset()
        """Protocol extensions that the server reports."""
        self.digest: bytes | None = None
        """Expected SHA-256 of the bundle's manifest in every answer."""
        self.on_send: OnSend | None = None
        self.verify: Callable[[Infer], object] | None = None
        """Checks a server without digests after a failure, before any other request."""
        self.requests = 0
        self.payload_bytes = [0, 0]
        """Bytes of tensors sent and received, without framing."""
        self._remark = remark
        self._transport = open_transport(location.endpoint, connection)
        self._failures = 0
        """Consecutive failures; after one, requests wait until the server reports ready."""
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        # Unseeded: no result depends on the pauses.
        self._jitter = np.random.default_rng()
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[dict[str, Array]]] = set()

    def model(self, part: str) -> str:
        return f"{self.location.name}_{part}"

    def start(self) -> None:
        """Read the metadata of the server's models.

        Raises: ServerError when it does not answer, is not ready, or has none of the models.
        """
        try:
            self._discover_models()
        except CallError as error:
            raise to_server_error(error) from None

    def _discover_models(self) -> None:
        transport, seconds = self._transport, min(_START_SECONDS, self.connection.deadline)
        where, loading = self.location.endpoint, []
        if not transport.ready(seconds):
            text = f"{where} is not ready (its models are loading, or have failed)"
            raise CallError(text, "broken")
        listed = transport.server(seconds).get("extensions")
        self.extensions = frozenset(map(str, listed if isinstance(listed, list) else []))
        for part in PARTS:
            try:
                metadata = transport.model(self.model(part), self.location.version, seconds)
            except CallError as error:
                if error.kind not in ("missing", "loading"):
                    raise
                loading += [self.model(part)] * (error.kind == "loading")
                continue
            self.offers[part] = parse_offer(metadata, f'{where}: model "{self.model(part)}"')
        if not self.offers and loading:
            raise ServerError(
                f"{where} has {', '.join(loading)}, but none is ready (wait until they are loaded; "
                "if loading failed, see the server's log)"
            )
        if not self.offers:
            version = self.location.version
            raise ServerError(
                f'{where} has no model of "{self.location.name}"'
                f"{f' in version {version}' if version else ''} (expected "
                f"{', '.join(self.model(part) for part in PARTS)}, or some of them)"
            )

    def infer(self, requests: Sequence[ModelRequest]) -> list[dict[str, Array]]:
        """Return the answers in order; several requests are sent concurrently.

        Raises: AwayError after `give_up` seconds without an answer, ServerError for an invalid
            answer.
        """
        cancelled = threading.Event()
        if len(requests) == 1:
            return [self._infer_with_retries(_Slot(0, cancelled), requests[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.connection.max_inflight, "ztune-request")
        futures: list[Future[dict[str, Array]]] = [
            self._pool.submit(self._infer_with_retries, _Slot(number, cancelled), request)
            for number, request in enumerate(requests)
        ]
        self._running.update(futures)
        try:
            return [future.result() for future in futures]
        except CancelledError:  # by `close`
            raise AwayError("stopped") from None
        finally:
            # After an error or interrupt, nothing more of this round is sent.
            cancelled.set()
            for future in futures:
                future.cancel()
            self._running = {future for future in self._running if not future.done()}

    def close(self) -> None:
        """Close the connection; pending requests end at once."""
        self._stopped.set()
        running = [f for f in self._running if not f.cancel() and not f.done()]
        self._transport.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        wait(running, _CLOSING_SECONDS)

    def _infer_with_retries(self, slot: _Slot, request: ModelRequest) -> dict[str, Array]:
        """Send a request until it is answered or `give_up` has passed."""
        until = time.monotonic() + self.connection.give_up
        last, n_broken = "the server is not ready", 0
        while True:
            self._require_active(slot)
            if self._is_available(slot):
                try:
                    answer = self._send(slot, request, until)
                except CallError as error:
                    n_broken += error.kind == "broken"
                    if not error.retryable or n_broken > _MOST_BROKEN:
                        raise to_server_error(error) from None
                    last = str(error)
                    self._record_failure(last)
                else:
                    self._record_success()
                    return answer
            now = time.monotonic()
            if now >= until:
                raise AwayError(f"no answer for {self.connection.give_up:g} s ({last})")
            self._stopped.wait(max(0.0, min(self._retry_at, until) - now))

    def _require_active(self, slot: _Slot) -> None:
        if self._stopped.is_set() or slot.cancelled.is_set():
            raise AwayError("stopped")

    def _is_available(self, slot: _Slot) -> bool:
        """Return whether a request may be sent: after a failure, once the server reports ready."""
        if self._failures == 0:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            back = self._transport.ready(min(_HEALTH_SECONDS, self.connection.deadline))
            reason = f"{self.location.endpoint} is not ready"
            if back and self.verify is not None and not self._reports_digest:
                self.verify(lambda request: self._send(slot, request))
        except CallError as error:
            if not error.retryable:
                raise to_server_error(error) from None
            back, reason = False, str(error)
        if not back:
            self._record_failure(reason)
        return back

    @property
    def _reports_digest(self) -> bool:
        return all(offer.reports_digest for offer in self.offers.values())

    def _record_failure(self, reason: str) -> None:
        with self._lock:
            if self._failures and time.monotonic() < self._retry_at:
                return  # another thread has recorded the same failure
            self._failures += 1
            seconds = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(self._failures, 20))
            self._retry_at = time.monotonic() + seconds * self._jitter.uniform(0.5, 1.0)
            if self._failures == 2:  # a single failure is not worth a message
                self._remark(f"{reason}; retrying for up to {self.connection.give_up:g} s")

    def _record_success(self) -> None:
        with self._lock:
            if self._failures > 1:
                self._remark(f"{self.location.endpoint} answers again")
            self._failures = 0

    def _send(
        self, slot: _Slot, request: ModelRequest, until: float = float("inf")
    ) -> dict[str, Array]:
        """Send a request once, within the deadline and `until`, and check its answer.

        Raises: CallError; ServerError for an answer of the wrong shape, type or bundle.
        """
        expected = dict(request.outputs)
        if self.offers[request.part].reports_digest:
            rows = (len(next(iter(request.inputs.values()))),)
            shape = (*(rows if request.part in (IMAGE, TEXT) else ()), 32)
            expected["digest"] = Tensor("UINT8", shape)
        sent = Request(
            self.model(request.part), request.inputs, tuple(expected), self.location.version
        )
        sending = self.on_send
        # Nothing is sent whose answer is not needed, or that could no longer be journaled.
        self._require_active(slot)
        if sending is not None and request.n_queries:
            sending(slot.number, request.n_queries)
        left = min(self.connection.deadline, until - time.monotonic())
        answer = self._transport.infer(sent, max(_LEAST_SECONDS, left))
        with self._lock:
            self.requests += 1
            self.payload_bytes[0] += request.n_bytes
            self.payload_bytes[1] += sum(array.nbytes for array in answer.values())
        self._check_answer(sent.model, answer, expected)
        return {name: answer[name] for name in request.outputs}

    def _check_answer(self, model: str, answer: Mapping[str, Array], expected: Tensors) -> None:
        where = f"{self.location.endpoint}: {model}"
        for name, output in expected.items():
            got = answer[name]
            if got.dtype != output.dtype or got.shape != output.shape:
                raise ServerError(
                    f'{where}: "{name}" is {got.dtype}{list(got.shape)}, expected '
                    f"{output.dtype}{list(output.shape)}"
                )
        if "digest" in answer and self.digest is not None:
            for row in answer["digest"].reshape(-1, 32):
                if row.tobytes() != self.digest:
                    raise ServerError(
                        f"{where} now serves bundle {row.tobytes().hex()[:12]}…, expected "
                        f"{self.digest.hex()[:12]}… (restore that bundle, or start a new run)"
                    )


def open_transport(endpoint: Endpoint, connection: Connection) -> Transport:
    """Return the transport of the address's protocol; nothing is sent yet.

    Raises: ConfigError for invalid files or secrets, ZtuneError without tritonclient.
    """
    connection.check_files()
    try:
        if endpoint.protocol == "grpc":
            from runtimes.remote.grpc_transport import GrpcTransport

            return GrpcTransport(endpoint, connection)
        from runtimes.remote.http_transport import HttpTransport

        return HttpTransport(endpoint, connection)
    except ImportError as error:
        raise ZtuneError(
            f"servers need tritonclient ({error}); install it with: {how_to_install('triton')}"
        ) from None

"""The models of one bundle on a server: requests that are sent again until they are answered.

A request is evaluated any number of times with the same answer, so one that got none is sent again,
inside a stated time. What is in a request never depends on timing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from runtimes.remote.contract import IMAGE, PARTS, TEXT, Offer, Tensor, Tensors, offer_of
from runtimes.remote.endpoint import Connection, Endpoint, Location
from runtimes.remote.transport import Array, CallError, Request, Transport, server_error
from ztune.errors import AwayError, ServerError, ZtuneError, how_to_install

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0
_HEALTH_SECONDS = 2.0
_START_SECONDS = 10.0
# Times that a server may fail at one request: each may be billed.
_MOST_BROKEN = 4
_CLOSING_SECONDS = 2.0
_LEAST_SECONDS = 0.05
Sending = Callable[[int, int], None]
"""Called before a request is sent: its number in the round, and the queries in it."""


@dataclass(frozen=True)
class Question:
    """One request: a model's part, what it is given and what it must answer."""

    part: str
    inputs: Mapping[str, Array]
    outputs: Tensors
    n_queries: int = 0
    """Candidates evaluated by it; 0 for what is not a query."""

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.inputs.values())


Ask = Callable[[Question], dict[str, Array]]


@dataclass(frozen=True)
class _Turn:
    """A question's place in its round."""

    number: int
    abandoned: threading.Event
    """Set when nobody waits for the round's answers any more."""


class Service:
    """Answers questions to the models of one bundle."""

    def __init__(
        self,
        location: Location,
        connection: Connection,
        remark: Callable[[str], None] = lambda line: None,
    ):
        """Connect to nothing yet.

        Raises: ConfigError for files, secrets or addresses that cannot be used.
        """
        self.location = location
        self.connection = connection
        self.offers: dict[str, Offer] = {}
        self.extensions: frozenset[str] = frozenset()
        """What the server says it can do beyond the protocol's minimum."""
        self.digest: bytes | None = None
        """SHA-256 of the bundle's manifest that every answer must come from."""
        self.sending: Sending | None = None
        self.prove: Callable[[Ask], object] | None = None
        """Called with what asks the server, when it was away and reports no digest, before it is
        asked anything else."""
        self.requests = 0
        self.payload_bytes = [0, 0]
        """Of tensors sent and received, without framing."""
        self._remark = remark
        self._transport = open_transport(location.endpoint, connection)
        self._failures = 0
        """In a row; after any the server is asked only once it has said that it is ready."""
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        # Waiting times need not be the same in two runs: nothing depends on them.
        self._jitter = np.random.default_rng()
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[dict[str, Array]]] = set()

    def model(self, part: str) -> str:
        return f"{self.location.name}_{part}"

    def start(self) -> None:
        """See what the server's models offer.

        Raises: ServerError where it is away or not ready, or offers nothing.
        """
        try:
            self._look()
        except CallError as error:
            raise server_error(error) from None

    def _look(self) -> None:
        transport, seconds = self._transport, min(_START_SECONDS, self.connection.deadline)
        where, loading = self.location.endpoint, []
        if not transport.ready(seconds):
            text = f"{where} is not ready (its models are loading, or have failed)"
            raise CallError(text, "broken")
        told = transport.server(seconds).get("extensions")
        self.extensions = frozenset(map(str, told if isinstance(told, list) else []))
        for part in PARTS:
            try:
                metadata = transport.model(self.model(part), self.location.version, seconds)
            except CallError as error:
                if error.kind not in ("missing", "loading"):
                    raise
                loading += [self.model(part)] * (error.kind == "loading")
                continue
            self.offers[part] = offer_of(metadata, f'{where}: model "{self.model(part)}"')
        if not self.offers and loading:
            raise ServerError(
                f"{where} has {', '.join(loading)}, but none is ready (wait until they are loaded; "
                "if they failed to load, see the server's log)"
            )
        if not self.offers:
            version = self.location.version
            raise ServerError(
                f'{where} has no model of "{self.location.name}"'
                f"{f' in version {version}' if version else ''} (expected "
                f"{', '.join(self.model(part) for part in PARTS)}, or some of them)"
            )

    def ask(self, questions: Sequence[Question]) -> list[dict[str, Array]]:
        """Return the answers in order; several questions are asked at once.

        Raises: AwayError after the agreed time without an answer, ServerError for an answer that
            cannot be used.
        """
        abandoned = threading.Event()
        if len(questions) == 1:
            return [self._answer(_Turn(0, abandoned), questions[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.connection.max_inflight, "ztune-request")
        futures: list[Future[dict[str, Array]]] = [
            self._pool.submit(self._answer, _Turn(number, abandoned), question)
            for number, question in enumerate(questions)
        ]
        self._running.update(futures)
        try:
            return [future.result() for future in futures]
        except CancelledError:  # by `close`
            raise AwayError("stopped") from None
        finally:
            # After an error, or by the user's will, nothing more of this round is sent.
            abandoned.set()
            for future in futures:
                future.cancel()
            self._running = {future for future in self._running if not future.done()}

    def close(self) -> None:
        """Close the connection; requests in progress end at once."""
        self._stopped.set()
        running = [f for f in self._running if not f.cancel() and not f.done()]
        self._transport.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        wait(running, _CLOSING_SECONDS)

    def _answer(self, turn: _Turn, question: Question) -> dict[str, Array]:
        """Ask until there is an answer."""
        until = time.monotonic() + self.connection.give_up
        last, n_broken = "the server is not ready", 0
        while True:
            self._require_wanted(turn)
            if self._is_available(turn):
                try:
                    answer = self._once(turn, question, until)
                except CallError as error:
                    n_broken += error.kind == "broken"
                    if not error.passing or n_broken > _MOST_BROKEN:
                        raise server_error(error) from None
                    last = str(error)
                    self._failed(last)
                else:
                    self._succeeded()
                    return answer
            now = time.monotonic()
            if now >= until:
                raise AwayError(f"no answer for {self.connection.give_up:g} s ({last})")
            self._stopped.wait(max(0.0, min(self._retry_at, until) - now))

    def _require_wanted(self, turn: _Turn) -> None:
        if self._stopped.is_set() or turn.abandoned.is_set():
            raise AwayError("stopped")

    def _is_available(self, turn: _Turn) -> bool:
        """Return whether the server may be asked: after a failure, once it says it is ready.

        Its readiness is asked for free of charge.
        """
        if self._failures == 0:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            back = self._transport.ready(min(_HEALTH_SECONDS, self.connection.deadline))
            reason = f"{self.location.endpoint} is not ready"
            if back and self.prove is not None and not self._tells_digest:
                self.prove(lambda question: self._once(turn, question))
        except CallError as error:
            if not error.passing:
                raise server_error(error) from None
            back, reason = False, str(error)
        if not back:
            self._failed(reason)
        return back

    @property
    def _tells_digest(self) -> bool:
        return all(offer.tells_digest for offer in self.offers.values())

    def _failed(self, reason: str) -> None:
        with self._lock:
            if self._failures and time.monotonic() < self._retry_at:
                return  # others have met with the same failure
            self._failures += 1
            seconds = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(self._failures, 20))
            self._retry_at = time.monotonic() + seconds * self._jitter.uniform(0.5, 1.0)
            if self._failures == 2:  # once is nothing to speak of
                self._remark(f"{reason}; trying again for {self.connection.give_up:g} s")

    def _succeeded(self) -> None:
        with self._lock:
            if self._failures > 1:
                self._remark(f"{self.location.endpoint} answers again")
            self._failures = 0

    def _once(
        self, turn: _Turn, question: Question, until: float = float("inf")
    ) -> dict[str, Array]:
        """Send one request, within the deadline and `until`, and check its answer.

        Raises: CallError; ServerError for an answer of another shape, type or bundle.
        """
        expected = dict(question.outputs)
        if self.offers[question.part].tells_digest:
            rows = (len(next(iter(question.inputs.values()))),)
            shape = (*(rows if question.part in (IMAGE, TEXT) else ()), 32)
            expected["digest"] = Tensor("UINT8", shape)
        request = Request(
            self.model(question.part), question.inputs, tuple(expected), self.location.version
        )
        sending = self.sending
        # Nothing is sent that nobody waits for, nor after those who write it down have gone.
        self._require_wanted(turn)
        if sending is not None and question.n_queries:
            sending(turn.number, question.n_queries)
        left = min(self.connection.deadline, until - time.monotonic())
        answer = self._transport.infer(request, max(_LEAST_SECONDS, left))
        with self._lock:
            self.requests += 1
            self.payload_bytes[0] += question.n_bytes
            self.payload_bytes[1] += sum(array.nbytes for array in answer.values())
        self._check(request.model, answer, expected)
        return {name: answer[name] for name in question.outputs}

    def _check(self, model: str, answer: Mapping[str, Array], expected: Tensors) -> None:
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
                        f"{where} answers with another model than the run began with (bundle "
                        f"{row.tobytes().hex()[:12]}…, expected {self.digest.hex()[:12]}…; put the "
                        "former one back, or start a new run)"
                    )


def open_transport(endpoint: Endpoint, connection: Connection) -> Transport:
    """Return a connection of the address's protocol; nothing is sent yet.

    Raises: ConfigError for files or secrets that cannot be used, ZtuneError without tritonclient.
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
            f"a server is reached through tritonclient ({error}); install it with: "
            f"{how_to_install('triton')}"
        ) from None

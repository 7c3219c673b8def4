"""The models of one bundle on one server or several: requests with retries, by a fixed plan.

A request is evaluated any number of times with the same answer, so one that got none is sent again,
inside a stated time. Which request goes where, and what is in it, never depends on timing: the
n-th of a round goes to the n-th server, and to another only while that one does not answer.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from runtimes.contract import PARTS, SCORE, Offer, offer_of
from runtimes.endpoint import Connection, Endpoint, Location
from runtimes.shared_memory import Expected, SharedMemory
from runtimes.transport import Array, CallError, Request, Transport, open_transport, server_error
from ztune.errors import AwayError, ServerError
from ztune.types import F32, I64

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0
_HEALTH_SECONDS = 2.0
_START_SECONDS = 10.0
# Times that a server may fail at one request: each may be billed.
_MOST_BROKEN = 4
Sending = Callable[[int, int], None]
"""Called before a request goes: its number in the round, and the queries in it."""


@dataclass(frozen=True)
class KeptPictures:
    """Features f32[R, e] and labels i64[R] that a server may keep, and their name."""

    features: F32
    labels: I64
    name: bytes

    @classmethod
    def of(cls, features: F32, labels: I64) -> KeptPictures:
        features = np.ascontiguousarray(features, dtype=np.float32)
        labels = np.ascontiguousarray(labels, dtype=np.int64)
        return cls(features, labels, hashlib.sha256(features.tobytes() + labels.tobytes()).digest())


@dataclass(frozen=True)
class Question:
    """One request: a model's part, what it is given and what it must answer."""

    part: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Expected]
    n_queries: int = 0
    """Candidates evaluated by it; 0 for what is no query."""
    kept: KeptPictures | None = None
    """What `kept` among the inputs names."""


@dataclass
class _Server:
    """One of the servers, and how it has fared."""

    transport: Transport
    shared: SharedMemory | None = None
    failures: int = 0
    """In a row; a server with any is asked only after it has said that it is ready."""
    retry_at: float = 0.0
    kept: set[bytes] = field(default_factory=set)


class Service:
    """Answers questions to the models of one bundle."""

    def __init__(
        self,
        location: Location,
        others: Iterable[Endpoint],
        connection: Connection,
        remark: Callable[[str], None] = lambda line: None,
    ):
        """Connect to nothing yet.

        Raises: ConfigError for files, secrets or addresses that cannot be used.
        """
        self.location = location
        self.connection = connection
        self.offers: dict[str, Offer] = {}
        self.digest: bytes | None = None
        """SHA-256 of the bundle's manifest that every answer must come from."""
        self.sending: Sending | None = None
        self.returned: Callable[[], None] | None = None
        """Called when a server is back that does not tell whose answers it gives."""
        self.requests = 0
        self.payload_bytes = [0, 0]
        """Of tensors sent and received, without framing."""
        self._remark = remark
        endpoints = list(dict.fromkeys([location.endpoint, *others]))
        self._servers = [_Server(open_transport(e, connection)) for e in endpoints]
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        # Waiting times need not be the same in two runs: nothing depends on them.
        self._jitter = np.random.default_rng()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def n_servers(self) -> int:
        return len(self._servers)

    def model(self, part: str) -> str:
        return f"{self.location.name}_{part}"

    def start(self) -> None:
        """See that every server is ready, and what its models offer.

        Raises: ServerError for one that is not, offers nothing, or another thing than the first.
        """
        for number, server in enumerate(self._servers):
            offers = self._offers(server.transport)
            if number == 0:
                self.offers = offers
            elif offers != self.offers:
                raise ServerError(
                    f"{server.transport.endpoint} offers other models than "
                    f"{self._servers[0].transport.endpoint}"
                )

    def _offers(self, transport: Transport) -> dict[str, Offer]:
        seconds = min(_START_SECONDS, self.connection.deadline)
        where, offers = transport.endpoint, {}
        try:
            if not transport.ready(seconds):
                raise ServerError(f"{where} is not ready (its models are loading, or have failed)")
            self._extensions(transport, seconds)
            for part in PARTS:
                try:
                    metadata = transport.model(self.model(part), self.location.version, seconds)
                except CallError as error:
                    if error.kind == "missing":
                        continue
                    raise
                offers[part] = offer_of(metadata, f'{where}: model "{self.model(part)}"')
        except CallError as error:
            raise server_error(error) from None
        if not offers:
            version = self.location.version
            raise ServerError(
                f'{where} has no model of "{self.location.name}"'
                f"{f' in version {version}' if version else ''} (expected "
                f"{', '.join(self.model(part) for part in PARTS)}, or some of them)"
            )
        return offers

    def _extensions(self, transport: Transport, seconds: float) -> None:
        """See what the first server can do besides the protocol's least."""
        extensions = transport.server(seconds).get("extensions", [])
        self.extensions = (
            {str(one) for one in extensions} if isinstance(extensions, list) else set[str]()
        )

    def share_memory(self) -> None:
        """From now on send tensors through shared memory.

        Raises: ServerError where server or host does not allow it.
        """
        for server in self._servers:
            where = server.transport.endpoint
            if "system_shared_memory" not in self.extensions:
                raise ServerError(f"{where} does not offer system_shared_memory")
            if not where.local:
                raise ServerError(f"{where} is another host: it shares no memory with this one")
            server.shared = SharedMemory(server.transport)

    def unshare_memory(self) -> None:
        for server in self._servers:
            if server.shared is not None:
                server.shared.close()
                server.shared = None

    @property
    def shares_memory(self) -> bool:
        return any(server.shared is not None for server in self._servers)

    def ask(self, questions: Sequence[Question], first: int = 0) -> list[dict[str, Array]]:
        """Return the answers in order; several questions are on their way at once.

        The first goes to the server numbered `first`, the others to those behind it in turn.

        Raises: AwayError after the agreed time without an answer, ServerError for an answer that
            cannot be used.
        """
        if len(questions) == 1:
            return [self._answer(first, questions[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.connection.max_inflight, "ztune-request")
        futures: list[Future[dict[str, Array]]] = [
            self._pool.submit(self._answer, number, question)
            for number, question in enumerate(questions, first)
        ]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """Give all connections up; what is on its way ends at once."""
        self._stopped.set()
        for server in self._servers:
            if server.shared is not None:
                server.shared.close()
            server.transport.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, number: int, question: Question) -> dict[str, Array]:
        """Ask until there is an answer."""
        failed_since: float | None = None
        last, n_broken = "", 0
        while True:
            server = self._available(number)
            if server is not None:
                try:
                    answer = self._once(server, number, question)
                except CallError as error:
                    n_broken += error.kind == "broken"
                    if not error.passing or n_broken > _MOST_BROKEN:
                        raise server_error(error) from None
                    last = str(error)
                    self._failed(server, last)
                else:
                    self._succeeded(server)
                    return answer
            now = time.monotonic()
            failed_since = failed_since or now
            if now - failed_since >= self.connection.give_up:
                raise AwayError(
                    f"no answer for {self.connection.give_up:g} s ({last or 'no server is ready'})"
                )
            if self._stopped.wait(self._pause(failed_since)):
                raise AwayError("stopped")

    def _pause(self, failed_since: float) -> float:
        """Return seconds until the next server may be tried, inside the agreed time."""
        now = time.monotonic()
        until = min(server.retry_at for server in self._servers)
        left = failed_since + self.connection.give_up - now
        return max(0.0, min(until - now, left))

    def _available(self, number: int) -> _Server | None:
        """Return the server whose turn it is, or the next one that answers; None for none."""
        n = len(self._servers)
        for turn in range(n):
            server = self._servers[(number + turn) % n]
            if server.failures == 0:
                return server
            if time.monotonic() >= server.retry_at and self._is_back(server):
                return server
        return None

    def _is_back(self, server: _Server) -> bool:
        """Ask a server that has failed whether it is ready: this is free of charge."""
        try:
            back = server.transport.ready(min(_HEALTH_SECONDS, self.connection.deadline))
        except CallError as error:
            if not error.passing:
                raise server_error(error) from None
            back = False
        if not back:
            self._failed(server, f"{server.transport.endpoint} is not ready")
            return False
        if self.returned is not None and not all(o.tells_digest for o in self.offers.values()):
            self.returned()
        return True

    def _failed(self, server: _Server, reason: str) -> None:
        with self._lock:
            server.failures += 1
            server.kept.clear()  # it may be another process by then
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(server.failures, 20))
            server.retry_at = time.monotonic() + wait * self._jitter.uniform(0.5, 1.0)
            if server.failures == 2:  # once is nothing to speak of
                self._remark(f"{reason}; trying again for {self.connection.give_up:g} s")

    def _succeeded(self, server: _Server) -> None:
        if server.failures:
            with self._lock:
                if server.failures > 1:
                    self._remark(f"{server.transport.endpoint} answers again")
                server.failures = 0

    def _once(self, server: _Server, number: int, question: Question) -> dict[str, Array]:
        """Send one request to one server and check its answer.

        Raises: CallError.
        """
        if question.kept is not None and question.kept.name not in server.kept:
            self._keep(server, question.kept)
        if self.sending is not None and question.n_queries:
            self.sending(number, question.n_queries)
        try:
            return self._exchange(server, question)
        except CallError as error:
            if error.kind == "missing" and question.kept is not None:
                # The server has begun anew, or others' pictures have taken the place of ours.
                server.kept.discard(question.kept.name)
                raise CallError(str(error), "busy") from None
            raise

    def _keep(self, server: _Server, kept: KeptPictures) -> None:
        inputs: dict[str, Array] = {
            "features": kept.features,
            "labels": kept.labels,
            "kept": np.frombuffer(kept.name, dtype=np.uint8),
        }
        self._exchange(server, Question(SCORE, inputs, {}))
        server.kept.add(kept.name)

    def _exchange(self, server: _Server, question: Question) -> dict[str, Array]:
        expected = dict(question.outputs)
        if self.offers[question.part].tells_digest:
            rows = question.outputs.get("features")
            batched = question.part in ("image", "text") and rows is not None
            shape = (rows.shape[0], 32) if batched and rows is not None else (32,)
            expected["digest"] = Expected("UINT8", shape)
        request = Request(
            self.model(question.part), question.inputs, tuple(expected), self.location.version
        )
        seconds = self.connection.deadline
        if server.shared is not None and not any(-1 in one.shape for one in expected.values()):
            answer = server.shared.infer(request, expected, seconds)
        else:
            answer = server.transport.infer(request, seconds)
        with self._lock:
            self.requests += 1
            self.payload_bytes[0] += sum(array.nbytes for array in question.inputs.values())
            self.payload_bytes[1] += sum(array.nbytes for array in answer.values())
        self._check(server, request, answer, expected)
        return {name: answer[name] for name in question.outputs}

    def _check(
        self,
        server: _Server,
        request: Request,
        answer: Mapping[str, Array],
        expected: Mapping[str, Expected],
    ) -> None:
        """Refuse an answer of another shape, type or bundle.

        Raises: ServerError.
        """
        where = f"{server.transport.endpoint}: {request.model}"
        for name, output in expected.items():
            got = answer[name]
            fits = len(got.shape) == len(output.shape) and all(
                w in (-1, g) for g, w in zip(got.shape, output.shape, strict=True)
            )
            if got.dtype != output.dtype or not fits:
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

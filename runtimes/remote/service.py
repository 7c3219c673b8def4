"""The models of one bundle on one server or several: requests with retries, by a fixed plan.

A request is evaluated any number of times with the same answer, so one that got none is sent again,
inside a stated time. Which request goes where, and what is in it, never depends on timing: the
n-th of a round goes to the n-th server, and to another only while that one does not answer.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import numpy as np

from runtimes.remote.clients import open_transport
from runtimes.remote.contract import PARTS, SCORE, Offer, offer_of
from runtimes.remote.endpoint import Connection, Endpoint, Location
from runtimes.remote.shared_memory import Expected, SharedMemory
from runtimes.remote.transport import Array, CallError, Request, Transport, server_error
from ztune.errors import AwayError, ServerError
from ztune.types import F32, I64

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0
_HEALTH_SECONDS = 2.0
_START_SECONDS = 10.0
# Times that a server may fail at one request: each may be billed.
_MOST_BROKEN = 4
# Times that a server may forget one request's images before they are sent with it: behind one
# address there may be several servers, and the one that has them is not the one that is asked.
_MOST_FORGOTTEN = 2
_CLOSING_SECONDS = 2.0
_LEAST_SECONDS = 0.05
Sending = Callable[[int, int], None]
"""Called before a request goes: its number in the round, and the queries in it."""


@dataclass(frozen=True)
class KeptImages:
    """Features f32[R, e] and labels i64[R] that a server may keep, and their name."""

    features: F32
    labels: I64
    name: bytes

    @classmethod
    def of(cls, features: F32, labels: I64) -> KeptImages:
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
    kept: KeptImages | None = None
    """What `kept` among the inputs names."""

    def in_full(self) -> Question:
        """Return the same question with the images that it names."""
        if self.kept is None:
            return self
        inputs, rows = dict(self.inputs), self.inputs["rows"]
        del inputs["kept"], inputs["rows"]
        inputs |= {"features": self.kept.features[rows], "labels": self.kept.labels[rows]}
        return replace(self, inputs=inputs, kept=None)


Ask = Callable[[Question], dict[str, Array]]
"""Asks one server one question."""


@dataclass
class _Server:
    """One of the servers, and how it has fared."""

    transport: Transport
    extensions: frozenset[str] = frozenset()
    shared: SharedMemory | None = None
    failures: int = 0
    """In a row; a server with any is asked only after it has said that it is ready."""
    retry_at: float = 0.0
    kept: set[bytes] = field(default_factory=set)
    keeps: bool = True
    """False once it has refused to keep images."""
    checked: bool = False
    """Whether its models were looked at: one that was away at the start is, when it is back."""
    keeping: threading.Lock = field(default_factory=threading.Lock)
    """Held while images are sent, so that they are sent once."""
    not_kept: int = 0
    """Times that sending them failed."""


@dataclass(frozen=True)
class _Turn:
    """Where a question goes."""

    number: int
    """Of the server, and of the question in its round."""
    alone: bool = False
    """Whether no other server may answer it."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the round's answers any more."""


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
        self.prove: Callable[[Ask], None] | None = None
        """Called with what asks one server alone, when it was away at the start or does not tell
        whose answers it gives, before it is asked anything else."""
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
        self._running: set[Future[dict[str, Array]]] = set()

    @property
    def n_servers(self) -> int:
        return len(self._servers)

    @property
    def extensions(self) -> frozenset[str]:
        """What every server can do besides the protocol's least."""
        return frozenset.intersection(*(server.extensions for server in self._servers))

    def model(self, part: str) -> str:
        return f"{self.location.name}_{part}"

    def start(self) -> None:
        """See what the servers' models offer; of several, some may be away for now.

        Raises: ServerError where none is ready, or one offers nothing or another thing than others.
        """
        away: ServerError | None = None
        for server in self._servers:
            try:
                self._look_at(server)
            except CallError as error:
                refusal = server_error(error)
                if not error.passing:
                    raise refusal from None
                away = away or refusal
                server.failures = 1
                if self.n_servers > 1:
                    self._remark(f"{error}; going on without it for now")
        if away is not None and not self.checked_servers:
            raise away

    @property
    def checked_servers(self) -> list[int]:
        """Numbers of the servers whose models were looked at."""
        return [number for number, server in enumerate(self._servers) if server.checked]

    def _look_at(self, server: _Server) -> None:
        """See that a server offers what the others do.

        Raises: ServerError, CallError when it does not answer.
        """
        offers = self._offers(server)
        if self.offers and offers != self.offers:
            raise ServerError(f"{server.transport.endpoint} offers other models than the others")
        self.offers, server.checked = offers, True

    def _offers(self, server: _Server) -> dict[str, Offer]:
        transport, seconds = server.transport, min(_START_SECONDS, self.connection.deadline)
        where, offers = transport.endpoint, {}
        if not transport.ready(seconds):
            text = f"{where} is not ready (its models are loading, or have failed)"
            raise CallError(text, "broken")
        told = transport.server(seconds).get("extensions")
        server.extensions = frozenset(map(str, told if isinstance(told, list) else []))
        loading = []
        for part in PARTS:
            try:
                metadata = transport.model(self.model(part), self.location.version, seconds)
            except CallError as error:
                if error.kind not in ("missing", "loading"):
                    raise
                loading += [self.model(part)] * (error.kind == "loading")
                continue
            offers[part] = offer_of(metadata, f'{where}: model "{self.model(part)}"')
        if not offers and loading:
            raise ServerError(
                f"{where} has {', '.join(loading)}, but none is ready (wait until they are loaded; "
                "if they failed to load, see the server's log)"
            )
        if not offers:
            version = self.location.version
            raise ServerError(
                f'{where} has no model of "{self.location.name}"'
                f"{f' in version {version}' if version else ''} (expected "
                f"{', '.join(self.model(part) for part in PARTS)}, or some of them)"
            )
        return offers

    def share_memory(self) -> None:
        """From now on send tensors through shared memory.

        Raises: ServerError where server or host does not allow it.
        """
        for server in self._servers:
            where = server.transport.endpoint
            if "system_shared_memory" not in server.extensions:
                raise ServerError(f"{where} does not offer system_shared_memory")
            if not where.local:
                raise ServerError(f"{where} is another host: it shares no memory with this one")
        for server in self._servers:
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
            return [self._answer(_Turn(first), questions[0])]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.connection.max_inflight, "ztune-request")
        abandoned = threading.Event()
        futures: list[Future[dict[str, Array]]] = [
            self._pool.submit(self._answer, _Turn(number, abandoned=abandoned), question)
            for number, question in enumerate(questions, first)
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

    def ask_server(self, number: int, question: Question) -> dict[str, Array]:
        """Return the answer of the server of this number, and of no other.

        Raises: as `ask`.
        """
        return self._answer(_Turn(number, alone=True), question)

    def close(self) -> None:
        """Give all connections up; what is on its way ends at once."""
        self._stopped.set()
        running = [f for f in self._running if not f.cancel() and not f.done()]
        if not running:
            self.unshare_memory()
        for server in self._servers:
            server.transport.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if running:
            # Their regions can only go when nobody reads or writes them here.
            wait(running, _CLOSING_SECONDS)
            self.unshare_memory()

    def _answer(self, turn: _Turn, question: Question) -> dict[str, Array]:
        """Ask until there is an answer."""
        began = time.monotonic()
        last, n_broken, n_forgotten, tell = "", 0, 0, True
        while True:
            if self._stopped.is_set() or turn.abandoned.is_set():
                raise AwayError("stopped")
            number = self._available(turn)
            if number is not None:
                server = self._servers[number]
                try:
                    left = began + self.connection.give_up - time.monotonic()
                    answer = self._once(server, turn, question, left, tell=tell)
                except CallError as error:
                    n_broken += error.kind == "broken"
                    if not error.passing or n_broken > _MOST_BROKEN:
                        raise server_error(error) from None
                    n_forgotten += error.kind == "forgotten"
                    if n_forgotten > _MOST_FORGOTTEN:
                        question = question.in_full()
                    last, tell = str(error), True
                    if error.kind == "forgotten" and n_forgotten <= _MOST_FORGOTTEN + 1:
                        tell = False  # it has said that it evaluated nothing
                        continue
                    self._failed(server, last)
                else:
                    self._succeeded(server)
                    return answer
            if time.monotonic() - began >= self.connection.give_up:
                raise AwayError(
                    f"no answer for {self.connection.give_up:g} s ({last or 'no server is ready'})"
                )
            self._stopped.wait(self._pause(turn, began))

    def _pause(self, turn: _Turn, began: float) -> float:
        """Return seconds until the next server may be tried, inside the agreed time."""
        now = time.monotonic()
        until = min(self._servers[number].retry_at for number in self._places(turn))
        left = began + self.connection.give_up - now
        return max(0.0, min(until - now, left))

    def _places(self, turn: _Turn) -> list[int]:
        """Return the servers that may answer, in their order."""
        n = len(self._servers)
        return [(turn.number + more) % n for more in range(1 if turn.alone else n)]

    def _available(self, turn: _Turn) -> int | None:
        """Return the server whose turn it is, or the next one that answers; None for none."""
        for number in self._places(turn):
            server = self._servers[number]
            if server.failures == 0:
                return number
            if time.monotonic() >= server.retry_at and self._is_back(server, turn):
                return number
        return None

    def _is_back(self, server: _Server, turn: _Turn) -> bool:
        """Ask a server that has failed whether it is ready: this is free of charge."""
        try:
            back = server.transport.ready(min(_HEALTH_SECONDS, self.connection.deadline))
            reason = f"{server.transport.endpoint} is not ready"
            if back and not server.checked:
                self._look_at(server)
                self._prove(server, turn)
            elif back and not self._tells_digest:
                self._prove(server, turn)
        except CallError as error:
            if not error.passing:
                raise server_error(error) from None
            back, reason = False, str(error)
        if not back:
            self._failed(server, reason)
        return back

    def _prove(self, server: _Server, turn: _Turn) -> None:
        if self.prove is not None:
            self.prove(lambda question: self._once(server, turn, question))

    @property
    def _tells_digest(self) -> bool:
        return all(offer.tells_digest for offer in self.offers.values())

    def _failed(self, server: _Server, reason: str) -> None:
        with self._lock:
            server.kept.clear()  # it may be another process by then
            if server.failures and time.monotonic() < server.retry_at:
                return  # others have met with the same failure
            server.failures += 1
            seconds = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(server.failures, 20))
            server.retry_at = time.monotonic() + seconds * self._jitter.uniform(0.5, 1.0)
            if server.failures == 2:  # once is nothing to speak of
                self._remark(f"{reason}; trying again for {self.connection.give_up:g} s")

    def _succeeded(self, server: _Server) -> None:
        if server.failures:
            with self._lock:
                if server.failures > 1:
                    self._remark(f"{server.transport.endpoint} answers again")
                server.failures = 0

    def _once(
        self,
        server: _Server,
        turn: _Turn,
        question: Question,
        left: float = math.inf,
        *,
        tell: bool = True,
    ) -> dict[str, Array]:
        """Send one request to one server, which has `left` seconds, and check its answer.

        `tell` says that queries in it are to be counted.

        Raises: CallError.
        """
        until = time.monotonic() + max(_LEAST_SECONDS, min(self.connection.deadline, left))
        if question.kept is not None and not self._keep(server, question.kept):
            question = question.in_full()
        sending = self.sending
        # Nothing is sent that nobody waits for, nor after those who write it down have gone.
        if self._stopped.is_set() or turn.abandoned.is_set():
            raise AwayError("stopped")
        if tell and sending is not None and question.n_queries:
            sending(turn.number, question.n_queries)
        try:
            return self._exchange(server, question, until - time.monotonic())
        except CallError as error:
            if error.kind in ("missing", "forgotten") and question.kept is not None:
                # The server has begun anew, or others' images have taken the place of ours.
                server.kept.discard(question.kept.name)
                raise CallError(str(error), "forgotten") from None
            raise

    def _keep(self, server: _Server, kept: KeptImages) -> bool:
        """See that a server has images; of several requests that need them, one sends them.

        Return False where the server does not keep them, so that they go with each request.
        """
        before = server.not_kept
        with server.keeping:
            if kept.name in server.kept or not server.keeps:
                return server.keeps
            if server.not_kept > before or self._stopped.is_set():
                # Who was here before could not send them: one deadline is enough.
                raise CallError(f"{server.transport.endpoint} did not take the images", "away")
            inputs: dict[str, Array] = {
                "features": kept.features,
                "labels": kept.labels,
                "kept": np.frombuffer(kept.name, dtype=np.uint8),
            }
            try:
                self._exchange(server, Question(SCORE, inputs, {}), self.connection.deadline)
            except CallError as error:
                if error.kind == "refused":
                    server.keeps = False
                    self._remark(f"{error}; images' features are sent with every request")
                    return False
                server.not_kept += 1
                raise
            except BaseException:
                server.not_kept += 1
                raise
            server.kept.add(kept.name)
            return True

    def _exchange(self, server: _Server, question: Question, seconds: float) -> dict[str, Array]:
        expected = dict(question.outputs)
        if self.offers[question.part].tells_digest:
            rows = question.outputs.get("features")
            batched = question.part in ("image", "text") and rows is not None
            shape = (rows.shape[0], 32) if batched and rows is not None else (32,)
            expected["digest"] = Expected("UINT8", shape)
        request = Request(
            self.model(question.part), question.inputs, tuple(expected), self.location.version
        )
        seconds = max(_LEAST_SECONDS, seconds)
        shared = server.shared
        if shared is not None and not any(-1 in one.shape for one in expected.values()):
            answer = shared.infer(request, expected, seconds)
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

"""The ways to evaluate a round: on this machine, or on a server by each transport, and their costs.

What is compared sees the same prompts and the same images, step by step.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.names import classes_named
from export.triton import Serving, export_triton
from runtimes.bundle import Bundle
from runtimes.ort import OrtPromptGraph
from runtimes.providers import Execution, onnxruntime
from runtimes.remote.connect import CheckedService, connect
from runtimes.remote.contract import PROMPT, SCORE
from runtimes.remote.endpoint import Connection
from runtimes.remote.served import ServerPromptEncoder, ServerRuntime
from runtimes.remote.service import Service
from runtimes.tokenizer import Tokenizer
from tests.servers.proxy import Proxy
from tests.servers.triton import TritonServer
from ztune.methods.base import Composition
from ztune.methods.zip import ZipConfig
from ztune.model import Model
from ztune.objective import BatchSampler, FewShotObjective, NumpyScores
from ztune.types import F32, I64, Batch, Oracle, PromptEncoder, Prompts, Scorer, Scores

NAME = "bench"
ZIP = ZipConfig()
IMAGES, SHOTS = 128, 16
LOCAL = "local"
GRPC, HTTP = TRANSPORTS = ("grpc", "http")
# Only what is in the repository is served, as its configurations say.
SERVER_OPTIONS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--disable-auto-complete-config",
)
# Rounds of many classes take longer than a tuning run would wait.
_DEADLINE, _START_SECONDS = 600.0, 300.0


@dataclass(frozen=True)
class Way:
    """How a server is asked for losses."""

    transport: str
    losses: str
    """here: text features cross the wire; server: images' features and losses do."""

    def __str__(self) -> str:
        return f"{self.transport}, {self.losses}"

    def served(self, connected: CheckedService) -> ServerRuntime:
        """Return the server at work."""
        return ServerRuntime(connected.service, connected.bundle, losses=self.losses)


WAYS = tuple(Way(transport, losses) for transport in TRANSPORTS for losses in ("here", "server"))


class Task:
    """Rounds of ZIP's candidates on texts, and images with random unit features."""

    def __init__(self, bundle: Bundle, n_classes: int, n_steps: int, config: ZipConfig = ZIP):
        """Draw the prompts and the images of some steps, which all ways go through in turn."""
        random = np.random.default_rng(0)
        self._config = config
        self.bundle, self.classes = bundle, classes_named(n_classes)
        n_images = max(IMAGES, SHOTS * n_classes)
        shape = (1, n_images, bundle.embed_dim)
        self.features: F32 = random.standard_normal(shape, dtype=np.float32)
        self.features /= np.linalg.norm(self.features, axis=-1, keepdims=True)
        self.labels: I64 = np.arange(n_images, dtype=np.int64) % n_classes
        prompt_map, optimizer = self.composition()
        start = optimizer.ask().points
        self.n_candidates = len(start)
        self._prompts = [
            prompt_map(start + 0.01 * random.standard_normal(start.shape)) for _ in range(n_steps)
        ]
        sampler = self.sampler()
        self._batches = [sampler.next() for _ in range(n_steps)]

    @property
    def n_context(self) -> int:
        contexts = self.step(0)[0].contexts
        assert contexts is not None
        return int(contexts.shape[1])

    def composition(self) -> Composition:
        """Return ZIP's map and optimizer at their start."""
        bundle = self.bundle
        towers = Model(bundle, Execution()).spec(bundle.embed_dim)
        return self._config.build(towers, queries=5000, seed=0)

    def sampler(self) -> BatchSampler:
        """Return what draws batches of the images."""
        return BatchSampler(self.features.shape[1], IMAGES, 1, np.random.default_rng(0))

    def step(self, number: int) -> tuple[Prompts, Batch]:
        """Return what a step evaluates."""
        return self._prompts[number % len(self._prompts)], self._batches[
            number % len(self._batches)
        ]

    def on_host(self, encoder: PromptEncoder) -> Oracle:
        """Return losses computed by numpy from an encoder's text features."""
        bundle = self.bundle
        scores = NumpyScores(encoder, self.features, bundle.logit_scale, bundle.logit_bias)
        return FewShotObjective(scores, self.labels)

    def locally(self, threads: int) -> Oracle:
        """Return losses as a run on this machine computes them."""
        graph = OrtPromptGraph(self.bundle, Tokenizer(self.bundle), Execution("cpu", threads))
        return self.on_host(graph.encoder(self.classes, self.n_context, self.n_candidates))

    def encoder(self, served: ServerRuntime) -> ServerPromptEncoder:
        """Return the encoder of a round on a server."""
        graph = served.prompts(Tokenizer(self.bundle))
        return graph.encoder(self.classes, self.n_context, self.n_candidates)

    def remotely(self, served: ServerRuntime) -> Oracle:
        """Return losses as a run on that server computes them."""
        encoder = self.encoder(served)
        scorer = served.scorer(encoder, self.features, self.labels, logits=False)
        return self.on_host(encoder) if scorer is None else FewShotObjective(scorer, self.labels)

    def computed(self, served: ServerRuntime, repository: Path, threads: int) -> Oracle:
        """Return the same losses by the served graphs themselves, opened in this process.

        Cut into the same calls, on as many threads, with the server's options: what a step takes
        beyond this is spent on asking.
        """
        encoder = self.encoder(served)
        if encoder.plan.losses == "here":
            return self.on_host(_Texts(encoder, _session(repository, PROMPT, threads)))
        session = _session(repository, SCORE, threads)
        scorer: Scorer = _Losses(encoder, session, self.features[0], self.labels)
        return FewShotObjective(scorer, self.labels)


def _session(repository: Path, part: str, threads: int) -> Any:
    """Open a served graph with the options of export/python_backend.py."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.use_deterministic_compute = True
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = repository / f"{NAME}_{part}" / "1" / "model.onnx"
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class _Texts:
    """The served prompt graph in this process (a PromptEncoder)."""

    encoder: ServerPromptEncoder
    session: Any

    def encode(self, contexts: F32) -> F32:
        asked, tokens = ["features", "digest"], self.encoder.tokens
        parts = [
            self.session.run(asked, {"contexts": part, "tokens": tokens})[0]
            for part in self.encoder.parts(contexts)
        ]
        return np.ascontiguousarray(np.concatenate(parts)[:, self.encoder.class_columns])


@dataclass(frozen=True)
class _Losses:
    """The served score graph in this process (a Scorer)."""

    encoder: ServerPromptEncoder
    session: Any
    features: F32
    labels: I64

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        encoder, contexts = self.encoder, prompts.contexts
        assert contexts is not None
        given = {
            "tokens": encoder.tokens,
            "features": self.features[batch.images],
            "labels": encoder.class_columns[labels],
        }
        asked = ["losses", "correct", "digest"]
        parts = [
            self.session.run(asked, {"contexts": part, **given}) for part in encoder.parts(contexts)
        ]
        losses, correct = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return Scores(losses, correct / len(labels))


def repository_of(bundle: Bundle, out: Path, threads: int) -> Path:
    """Write the bundle's Triton repository for the Python backend."""
    export_triton(bundle, out, NAME, Serving(backend="python", threads=threads))
    return out


def started(repository: Path) -> TritonServer:
    """Return a server of the repository that is ready."""
    return TritonServer(repository, args=SERVER_OPTIONS, wait_s=_START_SECONDS)


def address(transport: str, server: TritonServer) -> str:
    """Return where a transport finds a server, as HOST:PORT."""
    return server.http if transport == HTTP else server.grpc


@contextlib.contextmanager
def opened(bundle: Bundle, transport: str, place: str) -> Iterator[CheckedService]:
    """Connect to a server as `ztune tune` does, and check it."""
    scheme = "http" if transport == HTTP else "triton"

    def nothing(*_: object) -> None:
        pass

    connection = Connection(deadline=_DEADLINE)
    connected = connect(f"{scheme}://{place}/{NAME}", connection, bundle.path, nothing, nothing)
    try:
        yield connected
    finally:
        connected.service.close()


def wire_bytes(
    bundle: Bundle, server: TritonServer, classes: Sequence[int], n_steps: int
) -> dict[tuple[int, Way], dict[str, float]]:
    """Return bytes of a query as they pass a proxy, and of its tensors alone."""
    found: dict[tuple[int, Way], dict[str, float]] = {}
    for transport in TRANSPORTS:
        with (
            Proxy(address(transport, server)) as proxy,
            opened(bundle, transport, proxy.address) as connected,
        ):
            for n_classes in classes:
                task = Task(bundle, n_classes, min(3, n_steps))
                for way in WAYS:
                    if way.transport == transport:
                        oracle = task.remotely(way.served(connected))
                        found[n_classes, way] = _counted_bytes(
                            task, oracle, proxy, connected.service, n_steps
                        )
    return found


def _counted_bytes(
    task: Task, oracle: Oracle, proxy: Proxy, service: Service, n_steps: int
) -> dict[str, float]:
    def counts() -> list[int]:
        time.sleep(0.05)  # what passed last is counted after it was passed on
        return [proxy.sent, proxy.received, *service.payload_bytes]

    oracle(*task.step(0))
    begun = counts()
    for number in range(n_steps):
        oracle(*task.step(number))
    n_bytes = [end - start for end, start in zip(counts(), begun, strict=True)]
    names = ("wire_sent", "wire_received", "payload_sent", "payload_received")
    each = n_steps * task.n_candidates
    return {f"{name}_bytes_per_query": n / each for name, n in zip(names, n_bytes, strict=True)}


@dataclass(frozen=True)
class Counted:
    """What Triton counts of its models, added up."""

    requests: int = 0
    request_ns: int = 0
    """From a request's arrival to its answer."""
    model_ns: int = 0
    """In the model: its process was asked, and has answered."""

    def __sub__(self, earlier: Counted) -> Counted:
        return Counted(*(a - b for a, b in zip(self._all, earlier._all, strict=True)))

    def __add__(self, other: Counted) -> Counted:
        return Counted(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, int, int]:
        return self.requests, self.request_ns, self.model_ns

    def figures(self) -> dict[str, float | None]:
        """Return milliseconds of a request, mean; None where none was made."""
        n = self.requests
        return {
            "server_request_ms": round(self.request_ns / n / 1e6, 3) if n else None,
            "server_model_ms": round(self.model_ns / n / 1e6, 3) if n else None,
        }


def counted(server: TritonServer) -> Counted:
    """Ask Triton for its own account of what evaluates rounds."""
    total = Counted()
    for part in (PROMPT, SCORE):
        for one in told(server, f"/v2/models/{NAME}_{part}/stats")["model_stats"]:
            whole, model = (one["inference_stats"][k] for k in ("success", "compute_infer"))
            total += Counted(int(whole["count"]), int(whole["ns"]), int(model["ns"]))
    return total


def told(server: TritonServer, path: str) -> dict[str, Any]:
    """Return what a server answers to one plain question."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()

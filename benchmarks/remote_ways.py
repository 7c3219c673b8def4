"""The ways to evaluate a round: locally, or on a server over each transport.

All ways evaluate the same prompts and images in each step.
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
# Serve exactly the repository with its configurations.
SERVER_OPTIONS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--disable-auto-complete-config",
)
# Rounds of many classes take longer than a run's default deadline.
_DEADLINE, _START_SECONDS = 600.0, 300.0


@dataclass(frozen=True)
class Way:
    """How losses are computed with a server."""

    transport: str
    losses: str
    """here: the server sends text features; server: it gets image features and sends losses."""

    def __str__(self) -> str:
        return f"{self.transport}, {self.losses}"

    def served(self, connected: CheckedService) -> ServerRuntime:
        """Return the server's runtime."""
        return ServerRuntime(connected.service, connected.bundle, losses=self.losses)


WAYS = tuple(Way(transport, losses) for transport in TRANSPORTS for losses in ("here", "server"))


class Task:
    """Rounds of ZIP's candidates, and images with random unit features."""

    def __init__(self, bundle: Bundle, n_classes: int, n_steps: int, config: ZipConfig = ZIP):
        """Draw the prompts and images of the steps."""
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
        """Return ZIP's initial map and optimizer."""
        bundle = self.bundle
        towers = Model(bundle, Execution()).spec(bundle.embed_dim, len(self.labels))
        return self._config.build(towers, queries=5000, seed=0)

    def sampler(self) -> BatchSampler:
        """Return the sampler of image batches."""
        return BatchSampler(self.features.shape[1], IMAGES, 1, np.random.default_rng(0))

    def step(self, number: int) -> tuple[Prompts, Batch]:
        """Return the prompts and batch of a step."""
        return self._prompts[number % len(self._prompts)], self._batches[
            number % len(self._batches)
        ]

    def numpy_oracle(self, encoder: PromptEncoder) -> Oracle:
        """Return an oracle with losses computed by numpy from an encoder's text features."""
        bundle = self.bundle
        scores = NumpyScores(encoder, self.features, bundle.logit_scale, bundle.logit_bias)
        return FewShotObjective(scores, self.labels)

    def local_oracle(self, threads: int) -> Oracle:
        """Return the oracle of a local run."""
        graph = OrtPromptGraph(self.bundle, Tokenizer(self.bundle), Execution("cpu", threads))
        return self.numpy_oracle(graph.encoder(self.classes, self.n_context, self.n_candidates))

    def encoder(self, served: ServerRuntime) -> ServerPromptEncoder:
        """Return the encoder of a round on a server."""
        graph = served.prompts(Tokenizer(self.bundle))
        return graph.encoder(self.classes, self.n_context, self.n_candidates)

    def server_oracle(self, served: ServerRuntime) -> Oracle:
        """Return the oracle of a run on that server."""
        encoder = self.encoder(served)
        scorer = served.scorer(encoder, self.features, self.labels, logits=False)
        return (
            self.numpy_oracle(encoder) if scorer is None else FewShotObjective(scorer, self.labels)
        )

    def in_process_oracle(self, served: ServerRuntime, repository: Path, threads: int) -> Oracle:
        """Return an oracle that runs the served graphs in this process.

        Same calls, threads and options as on the server: the rest of a step's time is overhead.
        """
        encoder = self.encoder(served)
        if encoder.plan.losses == "here":
            return self.numpy_oracle(_Texts(encoder, _session(repository, PROMPT, threads)))
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


def export_repository(bundle: Bundle, out: Path, threads: int) -> Path:
    """Write the bundle's Triton repository for the Python backend."""
    export_triton(bundle, out, NAME, Serving(backend="python", threads=threads))
    return out


def start_server(repository: Path) -> TritonServer:
    """Start a server of the repository and wait until it is ready."""
    return TritonServer(repository, args=SERVER_OPTIONS, wait_s=_START_SECONDS)


def address(transport: str, server: TritonServer) -> str:
    """Return a server's HOST:PORT for a transport."""
    return server.http if transport == HTTP else server.grpc


@contextlib.contextmanager
def open_connection(bundle: Bundle, transport: str, place: str) -> Iterator[CheckedService]:
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
    """Return bytes per query, counted by a proxy, and those of its tensors alone."""
    found: dict[tuple[int, Way], dict[str, float]] = {}
    for transport in TRANSPORTS:
        with (
            Proxy(address(transport, server)) as proxy,
            open_connection(bundle, transport, proxy.address) as connected,
        ):
            for n_classes in classes:
                task = Task(bundle, n_classes, min(3, n_steps))
                for way in WAYS:
                    if way.transport == transport:
                        oracle = task.server_oracle(way.served(connected))
                        found[n_classes, way] = _counted_bytes(
                            task, oracle, proxy, connected.service, n_steps
                        )
    return found


def _counted_bytes(
    task: Task, oracle: Oracle, proxy: Proxy, service: Service, n_steps: int
) -> dict[str, float]:
    def counts() -> list[int]:
        time.sleep(0.05)  # the proxy counts bytes after forwarding them
        return [proxy.sent, proxy.received, *service.payload_bytes]

    oracle(*task.step(0))
    before = counts()
    for number in range(n_steps):
        oracle(*task.step(number))
    n_bytes = [end - start for end, start in zip(counts(), before, strict=True)]
    names = ("wire_sent", "wire_received", "payload_sent", "payload_received")
    each = n_steps * task.n_candidates
    return {f"{name}_bytes_per_query": n / each for name, n in zip(names, n_bytes, strict=True)}


@dataclass(frozen=True)
class ServerCounts:
    """Triton's statistics, summed over models."""

    requests: int = 0
    request_ns: int = 0
    """From the arrival of requests to their answers."""
    model_ns: int = 0
    """Inside the model's process."""

    def __sub__(self, earlier: ServerCounts) -> ServerCounts:
        return ServerCounts(*(a - b for a, b in zip(self._all, earlier._all, strict=True)))

    def __add__(self, other: ServerCounts) -> ServerCounts:
        return ServerCounts(*(a + b for a, b in zip(self._all, other._all, strict=True)))

    @property
    def _all(self) -> tuple[int, int, int]:
        return self.requests, self.request_ns, self.model_ns

    def figures(self) -> dict[str, float | None]:
        """Return mean milliseconds per request; None without requests."""
        n = self.requests
        return {
            "server_request_ms": round(self.request_ns / n / 1e6, 3) if n else None,
            "server_model_ms": round(self.model_ns / n / 1e6, 3) if n else None,
        }


def read_counts(server: TritonServer) -> ServerCounts:
    """Read Triton's statistics of the models that evaluate rounds."""
    total = ServerCounts()
    for part in (PROMPT, SCORE):
        for one in get_json(server, f"/v2/models/{NAME}_{part}/stats")["model_stats"]:
            whole, model = (one["inference_stats"][k] for k in ("success", "compute_infer"))
            total += ServerCounts(int(whole["count"]), int(whole["ns"]), int(model["ns"]))
    return total


def get_json(server: TritonServer, path: str) -> dict[str, Any]:
    """Return the JSON answer to a GET request."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer
    finally:
        connection.close()

"""Measure the overhead of a server: the same steps locally and over each transport.

    make triton-env                                 # once: installs Triton
    python -m benchmarks.remote BUNDLE              # C = 10, 100 and 1,000
    python -m benchmarks.remote BUNDLE --quick      # within 40 s for a small model

The bundle is exported as a Triton repository for the Python backend and served on loopback.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import remote_ways as ways
from benchmarks.measure import document, interleaved, parser, say, show, timed
from benchmarks.remote_ways import (
    GRPC,
    LOCAL,
    TRANSPORTS,
    WAYS,
    ServerCounts,
    Task,
    Way,
    open_connection,
)
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtImageEncoder
from runtimes.providers import Execution
from runtimes.remote.connect import CheckedService
from runtimes.remote.served import ServerRuntime
from tests.servers.triton import TritonServer, triton_environment
from ztune.budget import Budget
from ztune.journal import Journal
from ztune.loop import Tuning, tune
from ztune.run import RunFolder
from ztune.system import one_blas_thread
from ztune.types import F32, Evaluation, ImageEncoder, Oracle

# Maximum consecutive steps of one way before the next way's.
_BURST = 5
_PAUSE = 0.02
_IMAGES_AT_ONCE = 8  # as in a run's image pass


@dataclass(frozen=True)
class Extent:
    """The size of the measurement."""

    classes: tuple[int, ...]
    queries: int
    """Queries per way with 10 classes; inversely proportional to the classes above that."""
    threads: int
    least_steps: int = 7
    bookkeeping_steps: int = 200
    n_images: int = 128

    def steps(self, n_classes: int, n_candidates: int) -> int:
        """Return the steps per way."""
        most = self.queries * 10 // (n_candidates * max(10, n_classes))
        return max(self.least_steps, most)


def measure(bundle: Bundle, extent: Extent) -> dict[str, Any]:
    """Measure everything and return the document."""
    start, spec = time.perf_counter(), bundle.text
    with tempfile.TemporaryDirectory(prefix="remote-") as name, one_blas_thread():
        folder = Path(name)
        repository = ways.export_repository(bundle, folder / "repository", extent.threads)
        with ways.start_server(repository) as server:
            say(f"server ready after {server.start_s:.1f} s")
            about = ways.get_json(server, "/v2")
            rows = []
            with contextlib.ExitStack() as stack:
                connections = {
                    name: stack.enter_context(
                        open_connection(bundle, name, ways.address(name, server))
                    )
                    for name in TRANSPORTS
                }
                for n_classes in extent.classes:
                    rows += steps(bundle, connections, server, n_classes, extent)
                kept = bookkeeping(bundle, connections[GRPC], folder, extent)
                images = image_pass(bundle, connections, extent)
            # Separate from the timing: the proxy uses CPU time.
            wire = ways.wire_bytes(bundle, server, extent.classes, n_steps=1)
    for row in rows:
        row |= wire.get((row["classes"], row.pop("way")), {})
    return document(
        start,
        model={
            "width": spec.width,
            "embed_dim": bundle.embed_dim,
            "image_size": bundle.image.size,
            "precision": bundle.precision,
        },
        server={"name": about["name"], "version": about["version"], "threads": extent.threads},
        rows=rows,
        bookkeeping=kept,
        images=images,
    )


def steps(
    bundle: Bundle,
    connections: Mapping[str, CheckedService],
    server: TritonServer,
    n_classes: int,
    extent: Extent,
) -> list[dict[str, Any]]:
    """Return a row for each way to evaluate a round of `n_classes`."""
    n_candidates = Task(bundle, n_classes, 1).n_candidates
    n_steps = extent.steps(n_classes, n_candidates)
    task = Task(bundle, n_classes, n_steps)
    services = {way: way.served(connections[way.transport]) for way in WAYS}
    oracles: dict[object, Oracle] = {LOCAL: task.local_oracle(extent.threads)}
    for losses in ("here", "server"):
        served = services[Way(GRPC, losses)]
        oracles[losses] = task.in_process_oracle(served, server.repository, extent.threads)
    oracles |= {way: task.server_oracle(services[way]) for way in WAYS}
    taken, accounts = alternate(task, oracles, n_steps, lambda: ways.read_counts(server))
    plan = task.encoder(Way(GRPC, "auto").served(connections[GRPC])).plan
    rows: list[dict[str, Any]] = []
    for key in (LOCAL, *WAYS):
        seconds = statistics.median(taken[key])
        row = {
            "classes": n_classes,
            "candidates": n_candidates,
            "context_tokens": task.n_context,
            "images_a_batch": ways.IMAGES,
            "steps": n_steps,
            "way": key,
            "transport": LOCAL,
            "seconds_per_step": seconds,
            "queries_per_s": n_candidates / seconds,
        }
        words = f"{n_classes} classes, {key}: {1e3 * seconds:.2f} ms a step"
        if isinstance(key, Way):
            row |= {
                "transport": key.transport,
                "losses": key.losses,
                "auto": key.losses == plan.losses,
                "requests_per_step": len(split_contexts(task, services[key])),
                "computing_seconds": statistics.median(taken[key.losses]),
                **difference("overhead_ms", taken[key], taken[key.losses]),
                **difference("over_local_ms", taken[key], taken[LOCAL]),
                **accounts[key].figures(),
            }
            words += f", overhead {row['overhead_ms']:.2f} ms"
        rows.append(row)
        say(words)
    return rows


def alternate(
    task: Task, oracles: Mapping[object, Oracle], n_steps: int, account: Callable[[], ServerCounts]
) -> tuple[dict[object, list[float]], dict[object, ServerCounts]]:
    """Evaluate the same steps by every oracle; return the seconds and the server's counts of each.

    Oracles alternate every few steps, each time in another order.
    """
    taken: dict[object, list[float]] = {key: [] for key in oracles}
    accounts = dict.fromkeys(oracles, ServerCounts())
    for oracle in oracles.values():
        # The first call opens connections and lets ONNX Runtime plan its memory, which the second
        # allocates.
        oracle(*task.step(0))
        oracle(*task.step(0))
    order, burst = list(oracles), burst_size(n_steps)
    for first in range(0, n_steps, burst):
        order.append(order.pop(0))
        for key in order:
            time.sleep(_PAUSE)
            before = account()
            for number in range(first, min(first + burst, n_steps)):
                prompts, batch = task.step(number)
                start = time.perf_counter()
                oracles[key](prompts, batch)
                taken[key].append(time.perf_counter() - start)
            accounts[key] += account() - before
    return taken, accounts


def burst_size(n_steps: int) -> int:
    """Return the consecutive steps of one oracle, at most a fifth of all."""
    return max(1, min(_BURST, n_steps // 5))


def difference(name: str, one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return how many milliseconds longer the same steps took: median and quartiles."""
    differences = [1e3 * (a - b) for a, b in zip(one, other, strict=True)]
    low, middle, high = np.quantile(differences, (0.25, 0.5, 0.75))
    return {name: float(middle), f"{name}_quartiles": [float(low), float(high)]}


def bookkeeping(
    bundle: Bundle, connected: CheckedService, folder: Path, extent: Extent
) -> dict[str, Any]:
    """Return the cost of a run's files per step, alone and in whole steps of 10 classes."""
    served = Way(GRPC, "auto").served(connected)
    task, n_steps = Task(bundle, 10, 1), extent.bookkeeping_steps
    runs = {
        "local": _Steps(task, task.local_oracle(extent.threads)),
        "remote": _Steps(task, task.server_oracle(served)),
        "remote_kept": _Steps(task, task.server_oracle(served), folder / "run"),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_steps):
        for name, run in runs.items():
            served.service.on_send = run.journal
            taken[name].append(run.step())
            served.service.on_send = None
    kept = runs["remote_kept"]
    found: dict[str, Any] = {
        "classes": 10,
        "steps": n_steps,
        "file_system": file_system(folder),
        **{f"{name}_ms": statistics.median(times) for name, times in kept.written.items()},
    }
    found |= {f"{name}_step_ms": 1e3 * statistics.median(taken[name]) for name in runs}
    found |= difference("keeping_ms", taken["remote_kept"], taken["remote"])
    found |= difference("whole_over_local_ms", taken["remote_kept"], taken["local"])
    say(f"journal {found['journal_ms']:.2f} ms, history {found['history_ms']:.2f} ms, state "
        f"{found['state_ms']:.2f} ms a step on {found['file_system']}")  # fmt: skip
    return found


class _Steps:
    """A ZIP run executed step by step, with the times of its writes."""

    def __init__(self, task: Task, oracle: Oracle, folder: Path | None = None):
        """Start a run; with a folder, write what a run on a server writes."""
        self._oracle, self._n_classes = oracle, len(task.classes)
        self._map, optimizer = task.composition()
        self._each = task.n_candidates
        self._tuning = Tuning(optimizer, task.sampler(), Budget(0), time.monotonic())
        self.written: dict[str, list[float]] = {"journal": [], "history": [], "state": []}
        """Milliseconds per step."""
        self.journal: Callable[[int, int], None] | None = None
        self._folder: RunFolder | None = None
        if folder is not None:
            folder.mkdir()
            self._folder = RunFolder(folder)
            journal = Journal(self._folder.journal, self._tuning.budget)
            self.journal = lambda *words: self._write("journal", lambda: journal(*words))

    def step(self) -> float:
        """Run one step and return its seconds: ask, map, evaluate, tell, write."""
        budget = self._tuning.budget
        budget.limit += self._each
        start = time.perf_counter()
        tune(self._tuning, self._map, self._oracle, self._n_classes, self._observe)
        return time.perf_counter() - start

    def _observe(self, now: Tuning, evaluation: Evaluation) -> None:
        folder = self._folder
        if folder is not None:
            self._write("history", lambda: folder.log(now, evaluation))
            self._write("state", lambda: folder.save(now))

    def _write(self, name: str, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        call()
        self.written[name].append(1e3 * (time.perf_counter() - start))


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system."""
    mounts = [
        (len(one.mountpoint), one.fstype)
        for one in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(one.mountpoint)
    ]
    return max(mounts)[1] if mounts else "unknown"


def image_pass(
    bundle: Bundle, connections: Mapping[str, CheckedService], extent: Extent
) -> list[dict[str, Any]]:
    """Return images per second of the image tower, local and over each transport."""
    S, random = bundle.image.size, np.random.default_rng(0)
    pixels = random.integers(0, 256, (extent.n_images, S, S, 3), dtype=np.uint8)
    parts = np.array_split(pixels, max(1, len(pixels) // _IMAGES_AT_ONCE))
    encoders: dict[str, ImageEncoder]
    encoders = {LOCAL: OrtImageEncoder(bundle, Execution("cpu", extent.threads))}
    encoders |= {name: Way(name, "auto").served(connections[name]).images() for name in TRANSPORTS}

    def whole(encoder: ImageEncoder) -> Callable[[], None]:
        def encode() -> None:
            for part in parts:
                encoder.encode(part)

        return encode

    for encoder in encoders.values():
        encoder.encode(parts[0])
    loops = {name: timed(whole(encoder)) for name, encoder in encoders.items()}
    found = interleaved(loops, 3)
    for name, row in found.items():
        say(f"{name}: {len(pixels) / row['seconds']:.1f} images/s")
    return [
        {"transport": name, "images": len(pixels), "images_per_s": len(pixels) / row["seconds"]}
        for name, row in found.items()
    ]


def split_contexts(task: Task, served: ServerRuntime) -> list[F32]:
    """Return a round's contexts, split into requests."""
    contexts = task.step(0)[0].contexts
    assert contexts is not None
    return task.encoder(served).parts(contexts)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--classes", help="numbers of classes (default: 10,100,1000)")
    arguments.add_argument("--queries", type=int, help="per way, with 10 classes (default: 1000)")
    arguments.add_argument("--threads", type=int, default=1, help="of server and local graphs")
    given = arguments.parse_args()
    try:
        triton_environment()
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        sys.exit(str(missing))
    classes = given.classes or ("10,100" if given.quick else "10,100,1000")
    queries = given.queries or (200 if given.quick else 1000)
    numbers = tuple(int(word) for word in classes.split(","))
    extent = Extent(numbers, queries, given.threads)
    if given.quick:
        extent = replace(extent, least_steps=3, bookkeeping_steps=40, n_images=32)
    show(measure(load_bundle(given.bundle), extent))


if __name__ == "__main__":
    main()

"""Where tasks of a bench are performed: in this process, in several of this machine, or on Ray.

All three give the same answers; they differ in how many tasks are under way at once. A worker that
is killed takes its task with it, which is then given to another: how often, workers count.
"""

from __future__ import annotations

import functools
import importlib.util
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ztune.errors import ConfigError, ZtuneError, how_to_install
from ztune.experiments.jobs import Encoded, JobResult, Task
from ztune.experiments.worker import Settings, Worker
from ztune.printing import reason_of

_PATIENCE = 10.0
"""Seconds for a connection to a cluster."""
_MOST_LOSSES = 5
"""Times that all workers may be lost without a single answer in between."""


class Executor(Protocol):
    """Performs tasks in any order."""

    name: str
    workers: int

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield the place of a task and what came of it, as they end."""

    def close(self) -> None:
        """Let the workers go."""


class Serial:
    """The process itself, one task after another."""

    name = "serial"
    workers = 1

    def __init__(self, settings: Settings):
        self._worker = Worker(settings)

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        for place, task in enumerate(tasks):
            yield place, self._worker.perform(task)

    def close(self) -> None:
        pass


class Joblib:
    """Processes of this machine, each with its own models."""

    name = "joblib"

    def __init__(self, settings: Settings, workers: int):
        """Say how many; they start with the first task.

        Raises: ConfigError where joblib is not installed.
        """
        if importlib.util.find_spec("joblib") is None:
            raise ConfigError(f"`workers` needs joblib: {how_to_install('joblib')}")
        self.workers = workers
        self._settings = settings

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield answers; where a worker was killed, all are started anew.

        Raises: ZtuneError where they are lost again and again before any answer.
        """
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import BrokenProcessPool

        left, losses = dict(enumerate(tasks)), 0
        while left:
            calls = [delayed(_perform)(self._settings, n, task) for n, task in left.items()]
            # One at a time: a task that waits in a worker's own queue would be lost with it.
            pool = Parallel(
                self.workers, backend="loky", return_as="generator_unordered", batch_size=1
            )
            try:
                for place, answer in pool(calls):
                    del left[place]
                    losses = 0
                    yield place, answer
            except BrokenProcessPool:
                losses += 1
                if losses > _MOST_LOSSES:
                    raise ZtuneError(
                        f"the workers were lost {losses} times without an answer (out of memory? "
                        "take fewer `workers`)"
                    ) from None

    def close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        # As it is: made for other settings, loky would first wait for all that is under way.
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


@functools.lru_cache(maxsize=1)
def _worker(settings: Settings) -> Worker:
    """Return this process's worker: one for all of its tasks."""
    return Worker(settings)


def _perform(settings: Settings, place: int, task: Task) -> tuple[int, Encoded | JobResult]:
    return place, _worker(settings).perform(task)


@dataclass(frozen=True)
class Cluster:
    """Which Ray cluster, and what of it a worker takes."""

    address: str
    """As ray.init takes it; local starts one on this machine."""
    workers: int
    gpus: float = 0.0
    """Of a worker; a fraction lets several share one."""


class Ray:
    """Actors of a Ray cluster, each with its own models; all see the same folders."""

    name = "ray"

    def __init__(self, settings: Settings, cluster: Cluster):
        """Connect, or start a cluster.

        Raises: ConfigError where ray is not installed, the cluster cannot be reached or is too
            small.
        """
        try:
            import ray
        except ImportError:
            raise ConfigError(f"`ray` needs ray: {how_to_install('ray')}") from None
        self._ray: Any = ray
        self.workers = cluster.workers
        self._settings, self._cluster = settings, cluster
        _check_address(cluster.address)
        local = cluster.address == "local"
        sizes = {"num_cpus": cluster.workers * settings.threads} if local else {}
        try:
            ray.init(
                address=cluster.address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
                **sizes,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            if cluster.address == "auto" and isinstance(error, ConnectionError):
                raise ConfigError(
                    "no Ray cluster runs on this machine (start one with ray start --head, name an "
                    "address, or use `ray=local`)"
                ) from None
            raise ConfigError(
                f'Ray at "{cluster.address}" cannot be reached: {reason_of(error)}'
            ) from None
        self._check_size()

    def _check_size(self) -> None:
        """Refuse more workers than the cluster has room for: they would wait for ever.

        Raises: ConfigError.
        """
        there = self._ray.cluster_resources()
        asked = {"CPU": float(self._settings.threads), "GPU": self._cluster.gpus}
        for kind, each in asked.items():
            if each * self.workers > there.get(kind, 0.0) + 1e-9:
                self.close()
                raise ConfigError(
                    f"{self.workers} workers with {each:g} {kind} each do not fit the cluster, "
                    f"which has {there.get(kind, 0.0):g} (take fewer `workers`, or a smaller share)"
                )

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield answers; an actor that was lost is replaced, and its task given out again.

        Raises: ZtuneError where actors are lost again and again before any answer.
        """
        waiting = list(enumerate(tasks))[::-1]
        running: dict[Any, tuple[Any, int]] = {}
        losses = 0
        for _ in range(min(self.workers, len(tasks))):
            self._submit(self._actor(), waiting, running)
        while running:
            (ready, *_), _ = self._ray.wait(list(running), num_returns=1)
            actor, place = running.pop(ready)
            try:
                answer = self._ray.get(ready)
            except self._ray.exceptions.RayTaskError:
                raise  # what our own code raised
            except self._ray.exceptions.RayError as error:  # killed, by Ray itself or another
                losses += 1
                if losses > _MOST_LOSSES * self.workers:
                    raise ZtuneError(
                        f"{losses} workers were lost without an answer (out of memory? take fewer "
                        f"`workers`): {reason_of(error)}"
                    ) from None
                waiting.append((place, tasks[place]))
                actor = self._actor()
            else:
                losses = 0
                yield place, answer
            if waiting:
                self._submit(actor, waiting, running)

    def _actor(self) -> Any:
        remote = self._ray.remote(num_cpus=self._settings.threads, num_gpus=self._cluster.gpus)
        return remote(Worker).remote(self._settings)

    def _submit(
        self, actor: Any, waiting: list[tuple[int, Task]], running: dict[Any, tuple[Any, int]]
    ) -> None:
        place, task = waiting.pop()
        running[actor.perform.remote(task)] = actor, place

    def close(self) -> None:
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """See whether anything listens: Ray itself tries for a quarter of an hour.

    Raises: ConfigError.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f'Ray at "{address}" cannot be reached: {error}') from None

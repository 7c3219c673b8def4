"""Executors of a bench: this process, several processes of this machine, or Ray.

All give the same results. The task of a killed worker is retried; workers count attempts. For a
process per run see isolated.py.
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
"""Times that all workers may be lost in a row without a result."""


class Executor(Protocol):
    """Runs tasks in any order."""

    name: str
    workers: int

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield a task's index and result, in order of completion."""

    def close(self) -> None:
        """Stop the workers."""


class Serial:
    """Runs tasks in this process."""

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
    """Runs tasks in processes of this machine, each with its own models."""

    name = "joblib"

    def __init__(self, settings: Settings, workers: int):
        """Set the number of workers; they start with the first task.

        Raises: ConfigError if joblib is not installed.
        """
        if importlib.util.find_spec("joblib") is None:
            raise ConfigError(f"`workers` needs joblib: {how_to_install('joblib')}")
        self.workers = workers
        self._settings = settings

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield results; if a worker is killed, restart all.

        Raises: ZtuneError if workers are repeatedly lost without a result.
        """
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import BrokenProcessPool

        left, losses = dict(enumerate(tasks)), 0
        while left:
            calls = [delayed(_perform)(self._settings, n, task) for n, task in left.items()]
            # One at a time: a task queued in a worker would be lost with it.
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
                        f"the workers were killed {losses} times without a result (out of memory? "
                        "use fewer `workers`)"
                    ) from None

    def close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        # reuse=True: with other settings, loky would first wait for all running tasks.
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


@functools.lru_cache(maxsize=1)
def _worker(settings: Settings) -> Worker:
    """Return this process's worker."""
    return Worker(settings)


def _perform(settings: Settings, place: int, task: Task) -> tuple[int, Encoded | JobResult]:
    return place, _worker(settings).perform(task)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and the resources of a worker."""

    address: str
    """Address for ray.init; local starts a cluster on this machine."""
    workers: int
    gpus: float = 0.0
    """Per worker; several workers can share a GPU."""


class Ray:
    """Runs tasks in actors of a Ray cluster, each with its own models, on a shared file system.

    joblib's Ray backend (joblib 1.6, Ray 2.60) is not used: it returns results only when all tasks
    are done, and a killed actor ends the call.
    """

    name = "ray"

    def __init__(self, settings: Settings, cluster: Cluster):
        """Connect, or start a cluster.

        Raises: ConfigError if ray is missing, or the cluster is unreachable or too small.
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
        sizes = {"num_cpus": cluster.workers * (settings.threads or 1)} if local else {}
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
                    "no Ray cluster runs on this machine (start one with ray start --head, give an "
                    "address, or use `ray=local`)"
                ) from None
            raise ConfigError(
                f'cannot reach Ray at "{cluster.address}": {reason_of(error)}'
            ) from None
        self._check_size()

    def _check_size(self) -> None:
        """Refuse more workers than the cluster has resources for: they would wait forever.

        Raises: ConfigError.
        """
        available = self._ray.cluster_resources()
        wanted = {"CPU": float(self._settings.threads or 1), "GPU": self._cluster.gpus}
        for kind, each in wanted.items():
            if each * self.workers > available.get(kind, 0.0) + 1e-9:
                self.close()
                raise ConfigError(
                    f"{self.workers} workers with {each:g} {kind} each exceed the cluster's "
                    f"{available.get(kind, 0.0):g} (use fewer `workers` or a smaller share)"
                )

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        """Yield results; replace a lost actor and retry its task.

        Raises: ZtuneError if actors are repeatedly lost without a result.
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
                raise  # raised by ztune
            except self._ray.exceptions.RayError as error:  # the worker was killed
                losses += 1
                if losses > _MOST_LOSSES * self.workers:
                    raise ZtuneError(
                        f"{losses} workers were killed without a result (out of memory? use fewer "
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
        remote = self._ray.remote(num_cpus=self._settings.threads or 1, num_gpus=self._cluster.gpus)
        return remote(Worker).remote(self._settings)

    def _submit(
        self, actor: Any, waiting: list[tuple[int, Task]], running: dict[Any, tuple[Any, int]]
    ) -> None:
        place, task = waiting.pop()
        running[actor.perform.remote(task)] = actor, place

    def close(self) -> None:
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """Check that a server listens: Ray itself would try for 15 minutes.

    Raises: ConfigError.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise ConfigError(f'cannot reach Ray at "{address}": {error}') from None

"""Where a bench's tasks are performed: each is answered once, however many workers are lost."""

import importlib.util
import io
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import psutil
import pytest

from ztune.errors import ConfigError, ZtuneError
from ztune.experiments import executors
from ztune.experiments.bench import Workers
from ztune.experiments.executors import Cluster, Executor, Joblib, Ray, Serial
from ztune.experiments.isolated import Isolated
from ztune.experiments.jobs import Encoded, Encoding, Task
from ztune.experiments.worker import Settings, Worker

THREADS = 3


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, "cpu", THREADS, None)


def tasks(n: int) -> list[Task]:
    return [Encoding(Path("bundle"), f"task {i}", (), Path("cache")) for i in range(n)]


def answer(task: Task) -> Encoded:
    """Return what tells one task from another; nothing is encoded in these tests."""
    assert isinstance(task, Encoding)
    return Encoded(task.bundle_digest, 1, 0.5)


def answers(executor: Executor, n: int) -> list[tuple[int, object]]:
    return list(executor.perform(tasks(n)))


def in_order(n: int) -> list[tuple[int, object]]:
    return [(place, answer(task)) for place, task in enumerate(tasks(n))]


def each_once(found: Sequence[tuple[int, object]], n: int) -> bool:
    return sorted(found, key=lambda one: one[0]) == in_order(n)


def test_isolated_tasks_have_processes_of_their_own(settings: Settings) -> None:
    isolated = replace(settings, isolated=True)
    found = answers(Isolated(isolated), 2)
    assert found == [(n, Encoded(f"task {n}", 0, 0.0)) for n in range(2)]  # there is no bundle


def test_what_an_isolated_task_prints_is_not_its_result(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = "from ztune.experiments.isolated import main; sys.exit(main())"
    for printed in ("import atexit; atexit.register(print, 'at the end')", "print('before')"):
        program = f"{printed}; {main}"
        monkeypatch.setattr("ztune.experiments.isolated._PROGRAM", program)
        assert answers(Isolated(settings), 1) == [(0, Encoded("task 0", 0, 0.0))]


def test_isolated_runs_take_one_worker(settings: Settings) -> None:
    isolated = replace(settings, isolated=True)
    assert isinstance(Workers().executor(isolated), Isolated)
    for workers in (Workers(2), Workers(1, "local")):
        with pytest.raises(ConfigError, match="`isolate` of the plan runs one process at a time"):
            workers.executor(isolated)


class StubWorker:
    made: list["StubWorker"]

    def __init__(self, settings: Settings):
        self.settings = settings
        self.asked: list[Task] = []
        self.made.append(self)

    def perform(self, task: Task) -> Encoded:
        self.asked.append(task)
        return answer(task)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StubWorker]]:
    """Return the workers that this process has made."""
    monkeypatch.setattr(StubWorker, "made", [], raising=False)
    monkeypatch.setattr(executors, "Worker", StubWorker)
    executors._worker.cache_clear()
    yield StubWorker.made
    executors._worker.cache_clear()


# In this process.


def test_serial_answers_in_order_with_one_worker(
    settings: Settings, made: list[StubWorker]
) -> None:
    executor = Serial(settings)
    assert (executor.name, executor.workers) == ("serial", 1)
    assert answers(executor, 3) == in_order(3)
    assert answers(executor, 0) == []
    executor.close()
    (worker,) = made
    assert worker.settings == settings
    assert worker.asked == tasks(3)


def test_serial_begins_a_task_when_the_one_before_was_taken(
    settings: Settings, made: list[StubWorker]
) -> None:
    # What was run is recorded before anything else can fail.
    under_way = Serial(settings).perform(tasks(3))
    assert made[0].asked == []
    for n in (1, 2, 3):
        next(under_way)
        assert made[0].asked == tasks(n)


# In processes of this machine. What follows takes the place of `_perform` in a worker.


def performed(settings: Settings, place: int, task: Task) -> tuple[int, Encoded]:
    """Answer, and say which process did."""
    return place, Encoded(answer(task).bundle_digest, os.getpid(), 0.0)


def perilous(settings: Settings, place: int, task: Task) -> tuple[int, Encoded]:
    """Once the task before was answered, kill the process; at the next attempt, answer."""
    if place:
        wait_for((settings.out / f"answered-{place - 1}").exists)
    if attempt(settings, place) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return place, answer(task)


def deadly(settings: Settings, place: int, task: Task) -> tuple[int, Encoded]:
    attempt(settings, place)
    os.kill(os.getpid(), signal.SIGKILL)
    return place, answer(task)


def attempt(settings: Settings, place: int) -> int:
    """Note another attempt at a task; return how many there were with it."""
    with (settings.out / f"attempts-{place}").open("a") as file:
        file.write("x")
    return n_attempts(settings, place)


def n_attempts(settings: Settings, place: int) -> int:
    return (settings.out / f"attempts-{place}").stat().st_size


def wait_for(happens: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def joblib(settings: Settings) -> Iterator[Joblib]:
    """Return two processes."""
    executor = Joblib(settings, 2)
    yield executor
    executor.close()


def test_joblib_answers_in_processes_of_its_own_until_it_is_closed(
    joblib: Joblib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_perform", performed)
    assert (joblib.name, joblib.workers) == ("joblib", 2)
    assert answers(joblib, 0) == []
    workers = set()
    for given in (tasks(5), tasks(2)):
        left = dict(enumerate(given))
        for place, found in joblib.perform(given):
            assert isinstance(found, Encoded)
            assert found.bundle_digest == answer(left.pop(place)).bundle_digest
            workers.add(found.n)
        assert not left
    assert 1 <= len(workers) <= 2  # they stay from one list of tasks to the next
    assert os.getpid() not in workers
    assert all(psutil.pid_exists(pid) for pid in workers)
    joblib.close()
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_joblib_gives_out_again_what_was_lost_with_a_process(
    settings: Settings, joblib: Joblib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_perform", perilous)
    monkeypatch.setattr(executors, "_MOST_LOSSES", 1)  # there are two, with an answer in between
    found = []
    for place, one in joblib.perform(tasks(2)):
        (settings.out / f"answered-{place}").touch()
        found.append((place, one))
    assert found == in_order(2)
    assert [n_attempts(settings, place) for place in range(2)] == [2, 2]


def test_joblib_gives_up_when_nothing_but_losses_comes(
    settings: Settings, joblib: Joblib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "_perform", deadly)
    monkeypatch.setattr(executors, "_MOST_LOSSES", 1)
    message = "^the workers were killed 2 times without a result .*use fewer `workers`"
    with pytest.raises(ZtuneError, match=message):
        answers(joblib, 1)
    assert n_attempts(settings, 0) == 2


def test_a_process_has_one_worker_for_all_its_tasks(
    settings: Settings, made: list[StubWorker]
) -> None:
    found = [executors._perform(settings, place, task) for place, task in enumerate(tasks(3))]
    assert found == in_order(3)
    (worker,) = made
    assert worker.settings == settings
    # A process that outlives its bench is asked by the next one for something else.
    other = Settings(settings.out / "other", "cpu", THREADS, None)
    executors._perform(other, 0, tasks(1)[0])
    assert [one.settings for one in made] == [settings, other]


def test_joblib_says_how_to_install_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", {"joblib": None}.__getitem__)
    with pytest.raises(ConfigError, match=r"^`workers` needs joblib: pip install '\.\[joblib\]'"):
        Joblib(settings, 2)


# On Ray, replaced by a stub.


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class RayTaskError(RayError):
    pass


class StubActor:
    """One that is given a task at a time, and none after it was lost."""

    def __init__(self, ray: "StubRay"):
        self.ray = ray
        self.busy = self.lost = False
        self.perform = SimpleNamespace(remote=self._begin)

    def _begin(self, task: Task) -> object:
        assert not self.busy
        assert not self.lost
        self.busy = True
        reference = object()
        self.ray.under_way[reference] = self, task
        self.ray.given.append(task)
        self.ray.most_at_once = max(self.ray.most_at_once, len(self.ray.under_way))
        return reference


class StubRay:
    """What an executor uses of the module.

    Tasks end in any order: each in the next of the fates, and answered when there are no more.
    """

    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=RayActorError,
        OutOfMemoryError=OutOfMemoryError,
        RayTaskError=RayTaskError,
    )

    def __init__(
        self,
        fates: Iterable[Exception | None] = (),
        resources: Mapping[str, float] = MappingProxyType({"CPU": 1000.0}),
    ):
        self.fates = iter(fates)
        self.resources = resources
        self.unreachable: Exception | None = None
        self.options: dict[str, Any] = {}
        self.n_shutdowns = 0
        self.actors: list[tuple[dict[str, Any], Settings]] = []
        self.under_way: dict[object, tuple[StubActor, Task]] = {}
        self.given: list[Task] = []
        self.most_at_once = 0
        self._random = random.Random(0)

    def init(self, **options: Any) -> None:
        self.options = options
        if self.unreachable is not None:
            raise self.unreachable

    def cluster_resources(self) -> dict[str, float]:
        return dict(self.resources)

    def shutdown(self) -> None:
        self.n_shutdowns += 1

    def remote(self, **takes: Any) -> Callable[[type], SimpleNamespace]:
        def chosen(kind: type) -> SimpleNamespace:
            assert kind is Worker
            return SimpleNamespace(remote=partial(self._start, takes))

        return chosen

    def _start(self, takes: dict[str, Any], settings: Settings) -> StubActor:
        self.actors.append((takes, settings))
        return StubActor(self)

    def wait(self, references: list[object], num_returns: int) -> tuple[list[object], list[object]]:
        assert num_returns == 1
        assert set(references) == set(self.under_way)
        ready = self._random.choice(references)
        return [ready], [one for one in references if one is not ready]

    def get(self, reference: object) -> Encoded:
        actor, task = self.under_way.pop(reference)
        actor.busy = False
        fate = next(self.fates, None)
        if fate is not None:
            actor.lost = True
            raise fate
        return answer(task)


Connect = Callable[..., Ray]


@pytest.fixture
def connect(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Connect to a stub, with so many workers; something listens at every address."""
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: io.BytesIO())

    def connected(
        stub: StubRay, workers: int, gpus: float = 0.0, address: str = "there:6379"
    ) -> Ray:
        module: Any = stub
        monkeypatch.setitem(sys.modules, "ray", module)
        return Ray(settings, Cluster(address, workers, gpus))

    return connected


@pytest.mark.parametrize("n", [0, 1, 2, 3, 20])
def test_ray_answers_each_task_once_on_no_more_actors_than_asked_for(
    connect: Connect, settings: Settings, n: int
) -> None:
    stub = StubRay(resources={"CPU": 3.0 * THREADS, "GPU": 1.0})
    executor = connect(stub, 3, 0.25)
    assert (executor.name, executor.workers) == ("ray", 3)
    assert each_once(answers(executor, n), n)
    assert stub.given == tasks(n)  # started in order
    takes = {"num_cpus": THREADS, "num_gpus": 0.25}
    assert stub.actors == [(takes, settings)] * min(n, 3)
    assert stub.most_at_once == min(n, 3)
    assert stub.n_shutdowns == 0
    executor.close()
    assert stub.n_shutdowns == 1


def test_ray_starts_a_cluster_here_as_large_as_the_workers_need(connect: Connect) -> None:
    here, there = StubRay(), StubRay()
    connect(here, 2, address="local")
    assert here.options["address"] == "local"
    assert here.options["num_cpus"] == 2 * THREADS
    # One that is there has its size, which ray.init refuses as an argument.
    connect(there, 2, address="ray://host:10001")
    assert there.options["address"] == "ray://host:10001"
    assert "num_cpus" not in there.options


@pytest.mark.parametrize(
    ("resources", "workers", "gpus", "message"),
    [
        ({"CPU": 5.0}, 2, 0.0, "2 workers with 3 CPU each exceed the cluster.s 5 "),
        ({"GPU": 8.0}, 1, 1.0, "1 workers with 3 CPU each exceed the cluster.s 0 "),
        ({"CPU": 64.0}, 1, 0.5, "1 workers with 0.5 GPU each exceed .*s 0 "),
        ({"CPU": 64.0, "GPU": 1.0}, 3, 0.5, "3 workers with 0.5 GPU each exceed .*s 1 "),
    ],
)
def test_ray_refuses_workers_that_would_wait_for_ever(
    connect: Connect, resources: dict[str, float], workers: int, gpus: float, message: str
) -> None:
    stub = StubRay(resources=resources)
    with pytest.raises(ConfigError, match=f"^{message}.*use fewer `workers`"):
        connect(stub, workers, gpus)
    assert stub.n_shutdowns == 1


@pytest.mark.parametrize(
    ("resources", "workers", "gpus"),
    [
        ({"CPU": 6.0}, 2, 0.0),
        ({"CPU": 64.0, "GPU": 1.0}, 2, 0.5),
        ({"CPU": 64.0, "GPU": 0.3}, 3, 0.1),  # 3 * 0.1 > 0.3 in binary
    ],
)
def test_ray_takes_workers_that_fit_exactly(
    connect: Connect, resources: dict[str, float], workers: int, gpus: float
) -> None:
    stub = StubRay(resources=resources)
    connect(stub, workers, gpus)
    assert stub.n_shutdowns == 0


@pytest.mark.parametrize("loss", [RayActorError, OutOfMemoryError, RayError])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ray_replaces_an_actor_that_was_lost_and_gives_its_task_out_again(
    connect: Connect, settings: Settings, loss: type[RayError], workers: int
) -> None:
    fates = [loss("killed"), None, loss("killed"), loss("killed"), None, None, loss("killed")]
    stub = StubRay(fates)
    assert each_once(answers(connect(stub, workers), 5), 5)
    assert len(stub.given) == 5 + 4
    assert len(stub.actors) == workers + 4
    assert all(made == settings for _, made in stub.actors)
    assert stub.most_at_once == workers


def test_ray_raises_what_a_task_raised_as_it_is(connect: Connect) -> None:
    error = RayTaskError("no room on the disk")
    stub = StubRay([None, error])
    with pytest.raises(RayTaskError) as caught:
        answers(connect(stub, 1), 5)
    assert caught.value is error
    assert stub.given == tasks(2)  # and requests nothing more


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("words", "said"),
    [("\nThe actor died.\nMore of it.", "The actor died. More of it."), ("", "RayActorError")],
)
def test_ray_gives_up_when_nothing_but_losses_comes(
    connect: Connect, workers: int, words: str, said: str
) -> None:
    most = executors._MOST_LOSSES * workers
    stub = StubRay(RayActorError(words) for _ in range(100))
    with pytest.raises(ZtuneError) as caught:
        answers(connect(stub, workers), 5)
    message = str(caught.value)
    assert message.startswith(f"{most + 1} workers were killed without a result (out of memory?")
    assert message.endswith(f": {said}")
    assert len(stub.actors) == workers + most


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_counts_losses_from_the_last_answer_on(connect: Connect, workers: int) -> None:
    losses = [RayActorError("killed")] * (executors._MOST_LOSSES * workers)
    assert each_once(answers(connect(StubRay([*losses, None] * 4), workers), 4), 4)


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
@pytest.mark.parametrize(
    ("words", "said"),
    [("Nobody answers.\nSee the logs.", "Nobody answers. See the logs."), ("", None)],
)
def test_ray_names_an_address_that_cannot_be_reached(
    connect: Connect, kind: type[Exception], words: str, said: str | None
) -> None:
    stub = StubRay()
    stub.unreachable = kind(words)
    message = f'^cannot reach Ray at "there:6379": {said or kind.__name__}$'
    with pytest.raises(ConfigError, match=message):
        connect(stub, 1)


def test_an_address_where_nothing_listens_is_told_at_once(settings: Settings) -> None:
    """Ray itself tries for a quarter of an hour."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            message = f'^cannot reach Ray at "{address}": .*refused'
            with pytest.raises(ConfigError, match=message):
                Ray(settings, Cluster(address, 1))


def test_no_cluster_on_this_machine_is_said_in_our_words(connect: Connect) -> None:
    stub = StubRay()
    stub.unreachable = ConnectionError("by setting the --address flag")
    with pytest.raises(ConfigError, match=r"^no Ray cluster runs on this machine .*`ray=local`"):
        connect(stub, 1, address="auto")


def test_ray_says_how_to_install_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = None
    monkeypatch.setitem(sys.modules, "ray", absent)
    with pytest.raises(ConfigError, match=r"^`ray` needs ray: pip install '\.\[ray\]'"):
        Ray(settings, Cluster("local", 2))


def test_the_errors_of_the_stub_are_related_as_those_of_ray() -> None:
    import ray.exceptions as real

    for name, ours in vars(StubRay.exceptions).items():
        theirs = getattr(real, name)
        assert issubclass(theirs, real.RayError)
        for other, kind in vars(StubRay.exceptions).items():
            assert issubclass(theirs, getattr(real, other)) == issubclass(ours, kind)


def slow(settings: Settings, place: int, task: Task) -> tuple[int, Encoded]:
    if place:
        (settings.out / "started").touch()
        time.sleep(10)
        (settings.out / "ended").touch()
    else:
        wait_for((settings.out / "started").exists)
    return place, answer(task)


@pytest.mark.filterwarnings("ignore:.* tasks .* cancelled:UserWarning")
def test_joblib_does_not_wait_for_tasks_when_it_is_closed(
    settings: Settings, joblib: Joblib, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after an error of the driver, whose traceback keeps `perform` as it stands.
    monkeypatch.setattr(executors, "_perform", slow)
    under_way = joblib.perform(tasks(2))
    assert next(under_way) == in_order(1)[0]
    joblib.close()
    assert not (settings.out / "ended").exists()
    del under_way

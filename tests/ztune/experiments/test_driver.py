"""The driver of a bench: which jobs it retries, alone or later, and what it records and reports."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ztune.experiments.test_cells import CELL, OUTCOME
from ztune.data.split import Split, SplitSettings
from ztune.experiments.cells import Cell, Outcome
from ztune.experiments.driver import Driver
from ztune.experiments.jobs import CellJob, Encoded, Job, JobResult, Task
from ztune.experiments.prepare import CellFilter, Prepared
from ztune.experiments.store import Store
from ztune.progress import SILENCE
from ztune.run_config import RunConfig

BUSY, ALONE = JobResult(busy=True), JobResult(alone=True)


class Stub:
    """An executor that gives each run its answers in turn, and remembers what it was asked."""

    name = "stub"
    workers = 2

    def __init__(self, **answers: Sequence[JobResult]):
        self.answers = {run: list(found) for run, found in answers.items()}
        self.asked: list[list[str]] = []

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        jobs = [task for task in tasks if isinstance(task, Job)]
        if jobs:
            self.asked.append([job.run + "!" * job.alone for job in jobs])
        for place, job in enumerate(jobs):
            yield place, self.answers[job.run].pop(0)

    def close(self) -> None:
        pass


def cell_of(run: str) -> Cell:
    return replace(CELL, method=run)


def done(run: str) -> JobResult:
    return JobResult({f"key of {run}": OUTCOME})


def failed(run: str) -> JobResult:
    return JobResult(reasons={f"key of {run}": "a reason"})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("ztune.experiments.driver.time.sleep", slept.append)
    return slept


def run_driver(folder: Path, stub: Stub, only: CellFilter | None = None) -> tuple[int, Store]:
    """Return how many cells are left, and the results."""
    split = Split({"data": folder}, ("a", "b"), (), SplitSettings(shots=1), ())
    run_config = RunConfig("bundle", "data", cache="cache")
    jobs = tuple(
        Job(run, run_config, "digest", split, (CellJob(f"key of {run}", cell_of(run), (), False),))
        for run in stub.answers
    )
    cells: dict[Cell, str | None] = {cell_of(run): f"key of {run}" for run in stub.answers}
    prepared = Prepared(cells, jobs, {}, {"m": "digest"}, {})
    store = Store(folder / "results.sqlite")
    store.set_plan("plan", {"title": "t"}, cells)
    session = store.begin_session({})
    driver = Driver(prepared, only or CellFilter(), store, session, stub, SILENCE)
    return driver.run(), store


def outcomes(store: Store) -> dict[str, Outcome | str]:
    """Return what came of every cell by its method; nothing is an empty string."""
    return {one.cell.method: one.outcome or one.reason for one in store.view("plan").results}


def test_results_are_recorded(tmp_path: Path, pauses: list[float]) -> None:
    stub = Stub(a=[done("a")], b=[failed("b"), done("b")], c=[done("c")])
    missing, store = run_driver(tmp_path, stub)
    assert missing == 1
    assert outcomes(store) == {"a": OUTCOME, "b": "a reason", "c": OUTCOME}
    assert stub.asked == [["a", "b", "c"]]
    missing, store = run_driver(tmp_path, stub)
    assert missing == 0
    assert stub.asked[1:] == [["b"]], "only what has no result"
    assert outcomes(store) == dict.fromkeys("abc", OUTCOME)
    assert pauses == []


def test_only_requested_cells_run(tmp_path: Path) -> None:
    missing, store = run_driver(tmp_path, Stub(a=[], b=[done("b")]), CellFilter(methods=("b",)))
    assert missing == 0
    assert outcomes(store) == {"a": "", "b": OUTCOME}


def test_a_run_in_other_hands_is_asked_for_after_the_others(
    tmp_path: Path, pauses: list[float]
) -> None:
    stub = Stub(a=[BUSY, BUSY, BUSY, done("a")], b=[done("b")], c=[BUSY, BUSY, done("c")])
    missing, store = run_driver(tmp_path, stub)
    assert missing == 0
    assert outcomes(store) == dict.fromkeys("abc", OUTCOME)
    assert stub.asked == [["a", "b", "c"], ["a", "c"], ["a", "c"], ["a"]]
    assert pauses == [1.0], "no pause where something was done"


def test_pauses_grow_while_nothing_can_be_done(tmp_path: Path, pauses: list[float]) -> None:
    missing, _ = run_driver(tmp_path, Stub(a=[*[BUSY] * 6, done("a")]))
    assert missing == 0
    assert pauses == [1.0, 2.0, 5.0, 15.0, 15.0, 15.0]


def test_what_lost_its_process_is_asked_for_alone(tmp_path: Path, pauses: list[float]) -> None:
    stub = Stub(a=[ALONE, done("a")], b=[ALONE, failed("b")], c=[done("c")])
    missing, store = run_driver(tmp_path, stub)
    assert missing == 1
    assert stub.asked == [["a", "b", "c"], ["a!"], ["b!"]]
    assert outcomes(store) == {"a": OUTCOME, "b": "a reason", "c": OUTCOME}
    assert pauses == []


def test_batches_of_which_none_can_be_had_are_no_busy_loop(
    tmp_path: Path, pauses: list[float]
) -> None:
    stub = Stub(a=[ALONE, BUSY, BUSY, done("a")], b=[BUSY, BUSY, BUSY, done("b")])
    missing, _ = run_driver(tmp_path, stub)
    assert missing == 0
    assert stub.asked == [["a", "b"], ["b"], ["a!"], ["b"], ["a!"], ["b"], ["a!"]]
    assert pauses == [1.0, 2.0]

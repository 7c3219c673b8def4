"""The driver of a bench: encode the images, run the missing cells, record the results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ztune.experiments.cells import Outcome
from ztune.experiments.executors import Executor
from ztune.experiments.jobs import Encoded, Job, JobResult
from ztune.experiments.prepare import CellFilter, Prepared, encodings
from ztune.experiments.store import Store
from ztune.printing import duration
from ztune.progress import Activity, Progress, warn

_PAUSES = (1.0, 2.0, 5.0, 15.0)
"""Seconds before each retry of a run that another process has locked; the last repeats."""


@dataclass(frozen=True)
class Driver:
    """Runs the cells of a plan that have no result yet."""

    prepared: Prepared
    only: CellFilter
    store: Store
    session: int
    executor: Executor
    progress: Progress

    def run(self) -> int:
        """Run the requested cells; return how many have no result."""
        finished = self.store.finished()
        requested = [
            key for cell, key in self.prepared.cells.items() if key and self.only.matches(cell)
        ]
        n_finished = sum(key in finished for key in requested)
        wanted = set(requested) - finished
        jobs = [
            replace(job, cells=cells)
            for job in self.prepared.jobs
            if (cells := tuple(cell for cell in job.cells if cell.key in wanted))
        ]
        say = self.progress.remark
        say(
            f"{len(self.prepared.cells)} cells in the plan, {len(requested)} requested: "
            f"{n_finished} finished, {len(requested) - n_finished} to do in {len(jobs)} run(s), "
            f"{self.executor.workers} at a time ({self.executor.name})"
        )
        if not jobs:
            return 0
        self._encode(jobs)
        self._run_jobs(jobs)
        finished = self.store.finished()
        return sum(key not in finished for key in requested)

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encode the images of all jobs, with all workers."""
        tasks = encodings(jobs, self.prepared.tested)
        total = sum(len(task.items) for task in tasks)
        took: dict[str, list[Encoded]] = {}
        done = 0
        with self.progress.activity("encode images", total) as ticker:
            for place, encoded in self.executor.perform(tasks):
                assert isinstance(encoded, Encoded)
                done += len(tasks[place].items)
                ticker.update(done)
                if encoded.n:
                    took.setdefault(encoded.bundle_digest, []).append(encoded)
        models = {digest: name for name, digest in self.prepared.digests.items()}
        for digest, passes in took.items():
            n, seconds = sum(one.n for one in passes), sum(one.seconds for one in passes)
            peaks = [one.peak_memory_mb for one in passes if one.peak_memory_mb is not None]
            self.store.add_pass(digest, n, seconds, max(peaks, default=None))
            each = 1000 * seconds / n
            self.progress.remark(
                f"encoded {n:,} images with {models[digest]}, {each:.2g} ms per image"
            )

    def _run_jobs(self, jobs: Sequence[Job]) -> None:
        """Run all jobs; record and report their results."""
        waiting, pauses = list(jobs), iter(_PAUSES)
        with self.progress.activity("runs", len(jobs)) as ticker:
            reporter = ProgressReporter(self.progress, ticker, len(jobs))
            while waiting:
                left = [one for jobs in _batches(waiting) for one in self._left(jobs, reporter)]
                if {(job.run, job.alone) for job in left} == {
                    (job.run, job.alone) for job in waiting
                }:
                    reporter.report_waiting(len(left))
                    time.sleep(next(pauses, _PAUSES[-1]))
                waiting = left

    def _left(self, batch: Sequence[Job], reporter: ProgressReporter) -> Iterator[Job]:
        """Run jobs; yield those to retry."""
        for answer, job in self._answers(batch):
            if answer.busy:
                yield job
            elif answer.alone:
                yield replace(job, alone=True)
            else:
                self._record(job, answer)
                reporter.report(job, answer)

    def _answers(self, jobs: Sequence[Job]) -> Iterator[tuple[JobResult, Job]]:
        for place, answer in self.executor.perform(jobs):
            assert isinstance(answer, JobResult)
            yield answer, jobs[place]

    def _record(self, job: Job, answer: JobResult) -> None:
        for one in job.cells:
            if outcome := answer.outcomes.get(one.key):
                self.store.finish(one.key, one.cell, outcome, self.session)
            elif reason := answer.reasons.get(one.key):
                self.store.fail(one.key, one.cell, reason, self.session)


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return groups of jobs that may run at the same time."""
    together = [job for job in jobs if not job.alone]
    return ([together] if together else []) + [[job] for job in jobs if job.alone]


@dataclass
class ProgressReporter:
    """Reports the progress of a bench."""

    progress: Progress
    ticker: Activity
    n_jobs: int
    _n_done: int = 0
    _warned: set[str] = field(default_factory=set)
    _waits: bool = False
    _started: float = field(default_factory=time.monotonic)

    def report(self, job: Job, answer: JobResult) -> None:
        """Report a job's result, and each warning once per bench."""
        self._n_done += 1
        self.ticker.update(self._n_done)
        for warning in dict.fromkeys(answer.warnings):
            if warning not in self._warned:
                self._warned.add(warning)
                warn(f"{job.cells[0].cell}: {warning}")
        each = (time.monotonic() - self._started) / self._n_done
        left = each * (self.n_jobs - self._n_done)
        rest = f", about {duration(left)} left" if left else ""
        for one in job.cells:
            outcome = answer.outcomes.get(one.key)
            said = _accuracies(outcome) if outcome else f"failed: {answer.reasons[one.key]}"
            self.progress.remark(
                f"[{self._n_done}/{self.n_jobs}] {one.cell}: {said} "
                f"({duration(answer.seconds)}{rest})"
            )

    def report_waiting(self, n: int) -> None:
        """Report once that all remaining runs are locked."""
        if not self._waits:
            self._waits = True
            self.progress.remark(f"waiting for another process that has {n} run(s)")


def _accuracies(outcome: Outcome) -> str:
    return ", ".join(
        f"{one.part} {'–' if one.accuracy is None else f'{one.accuracy:.1%}'}"
        for one in outcome.scores
    )

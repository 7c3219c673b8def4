"""The course of a bench: pictures are encoded, then what is missing is carried out and recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ztune.bench.cells import Cell, Outcome
from ztune.bench.store import Store
from ztune.cli.bench_jobs import Answer, Encoded, Job
from ztune.cli.bench_prepare import Only, Prepared, encodings
from ztune.cli.executors import Executor
from ztune.cli.output import Output
from ztune.comparison import duration


@dataclass(frozen=True)
class Course:
    """Carries out the cells of a plan that have no result yet."""

    prepared: Prepared
    only: Only
    store: Store
    session: int
    executor: Executor
    output: Output

    def run(self) -> int:
        """Return how many of the cells that were asked for still have no result."""
        finished = self.store.finished()
        asked = {key for key, cell in self.prepared.cells.items() if self.only.takes(cell)}
        wanted = asked - finished
        jobs = [
            replace(job, cells=cells)
            for job in self.prepared.jobs
            if (cells := tuple(cell for cell in job.cells if cell.key in wanted))
        ]
        say = self.output.remark
        say(
            f"{len(self.prepared.cells)} cells in the plan; of {len(asked)} asked for "
            f"{len(asked & finished)} are finished, {len(wanted)} to do in {len(jobs)} run(s), "
            f"{self.executor.workers} at once ({self.executor.name})"
        )
        if not jobs:
            return 0
        self._encode(jobs)
        n_lacking = 0
        for answer, job in self._answers(jobs):
            n_lacking += self._record(job, answer)
        return n_lacking

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encode all pictures that the jobs share, for as many workers as there are."""
        models = {job.request.bundle: job.cells[0].cell.model for job in jobs}
        tasks = encodings(jobs, models)
        total = sum(len(task.items) for task in tasks)
        took: dict[str, tuple[int, float]] = {}
        done = 0
        with self.output.progress("encode pictures", total) as ticker:
            for place, encoded in self.executor.perform(tasks):
                assert isinstance(encoded, Encoded)
                done += len(tasks[place].items)
                ticker.update(done)
                n, seconds = took.get(encoded.model, (0, 0.0))
                if encoded.n:
                    took[encoded.model] = n + encoded.n, seconds + encoded.seconds
        for model, (n, seconds) in took.items():
            self.store.add_pass(model, n, seconds)
            each = 1000 * seconds / n
            self.output.remark(f"encoded {n:,} pictures with {model}, {each:.2g} ms each")

    def _answers(self, jobs: Sequence[Job]) -> Iterator[tuple[Answer, Job]]:
        """Yield what became of every job, and say it."""
        started, n_jobs = time.monotonic(), len(jobs)
        heard: set[str] = set()
        for n, (place, answer) in enumerate(self.executor.perform(jobs), 1):
            assert isinstance(answer, Answer)
            job = jobs[place]
            yield answer, job
            for warning in dict.fromkeys(answer.warnings):
                if warning not in heard:
                    heard.add(warning)
                    self.output.warn(f"{job.cells[0].cell}: {warning}")
            left = (time.monotonic() - started) / n * (n_jobs - n)
            rest = f", about {duration(left)} left" if left else ""
            for one in job.cells:
                said = _said(one.key, one.cell, answer)
                self.output.remark(f"[{n}/{n_jobs}] {said} ({duration(answer.seconds)}{rest})")

    def _record(self, job: Job, answer: Answer) -> int:
        """Write down what became of a job's cells; return how many have no result."""
        for one in job.cells:
            if outcome := answer.outcomes.get(one.key):
                self.store.finish(one.key, one.cell, outcome, self.session)
            elif reason := answer.reasons.get(one.key):
                self.store.fail(one.key, one.cell, reason, self.session)
        return len(job.cells) - len(answer.outcomes)


def _said(key: str, cell: Cell, answer: Answer) -> str:
    if answer.busy:
        return f"{cell}: left alone, another process works on it"
    if reason := answer.reasons.get(key):
        return f"{cell}: failed: {reason}"
    return f"{cell}: {_accuracies(answer.outcomes[key])}"


def _accuracies(outcome: Outcome) -> str:
    return ", ".join(
        f"{one.part} {'–' if one.accuracy is None else f'{one.accuracy:.1%}'}"
        for one in outcome.scores
    )

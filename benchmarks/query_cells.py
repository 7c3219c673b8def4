"""What one cell of the measurement is: a method with settings, on a task, with a seed.

Its run is that of `ztune tune`, in this process; what is kept of it is one JSON file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.query_labels import EVERY, GRID
from benchmarks.query_tasks import TASKS
from ztune.data.split import Split
from ztune.errors import ConfigError
from ztune.io.schema import plain
from ztune.methods import find_method, method_config, tuned_config
from ztune.model import Model
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.run_document import RunReport
from ztune.training import TrainingRun

SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Cell:
    """One label on one task with one seed."""

    task: str
    label: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.label}, seed {self.seed}"

    def file(self, out: Path) -> Path:
        """Return where it is kept."""
        return out / "cells" / self.task / f"{self.label}-{self.seed}.json"

    def twin(self, n_train: int) -> str:
        """Return the label whose cell has the same result with so many images, else nothing."""
        label = EVERY[self.label]
        batch = EVERY[label.same_as].batch if label.same_as else None
        return label.same_as if batch is not None and n_train <= batch else ""

    def run_config(self, bundle: Path, data: Path, cache: Path) -> RunConfig:
        """Return what its run is asked for.

        Raises: ConfigError for a method or setting that there is none of.
        """
        task, label = TASKS[self.task], EVERY[self.label]
        method = find_method(label.method)
        config = tuned_config(method, method_config(method, label.settings))
        return RunConfig(
            str(bundle.resolve()),
            str(data.resolve()),
            method=label.method,
            shots=task.shots,
            queries=label.queries,
            seed=self.seed,
            templates=(task.template,),
            threads=1,
            val=0,
            cache=str(cache.resolve()),
            snapshots=0 if config is None else marks(config.round_size, label.queries),
            settings=label.settings,
        )


def marks(round_size: int, queries: int) -> str:
    """Return after which queries a method is looked at, so that each point has its last rounds.

    A look comes with the first round that reaches a mark, which costs `round_size` at most.
    """
    counts = sorted({at - round_size + 1 for at in GRID if round_size <= at < queries})
    return ",".join(map(str, counts))


@contextlib.contextmanager
def claimed(cell: Cell, out: Path) -> Iterator[Path | None]:
    """Yield an empty folder to run a cell in, gone afterwards; None where another process has it.

    What a killed process left there is thrown away.
    """
    place = out / "runs" / f"{cell.task}-{cell.label}-{cell.seed}"
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(place).locked())
        except ConfigError:
            yield None
            return
        run = place / "run"
        shutil.rmtree(run, ignore_errors=True)
        try:
            yield run
        finally:
            shutil.rmtree(place, ignore_errors=True)


def carried_out(
    run_config: RunConfig, split: Split, model: Model, run: Path
) -> tuple[TrainingRun[RunFolder], RunReport]:
    """Run a request from beginning to end; return the work and run.json.

    Raises: ZtuneError.
    """
    training = TrainingRun(run_config, split, RunFolder(run), model)
    training.check()
    head = training.head()
    training.folder.create(plain(head), split.to_json())
    return training, training.carry_out(head)

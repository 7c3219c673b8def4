"""A cell of the measurement: a method with settings, on a task, with a seed.

It runs as in `ztune tune`, in this process, and its result is one JSON file.
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
from ztune.methods.registry import find_method, method_config, tuned_config
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
        """Return the file of its result."""
        return out / "cells" / self.task / f"{self.label}-{self.seed}.json"

    def equal_label(self, n_train: int) -> str:
        """Return the label with the same result for `n_train` images, or ""."""
        label = EVERY[self.label]
        batch = EVERY[label.same_as].batch if label.same_as else None
        return label.same_as if batch is not None and n_train <= batch else ""

    def run_config(self, bundle: Path, data: Path, cache: Path) -> RunConfig:
        """Return the configuration of its run.

        Raises: ConfigError for an unknown method or setting.
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
            snapshots=0 if config is None else snapshot_queries(config.round_size, label.queries),
            settings=label.settings,
        )


def snapshot_queries(round_size: int, queries: int) -> str:
    """Return the numbers of queries for snapshots, so that each lies just within a GRID point.

    A snapshot follows the first candidate batch that reaches its number; a batch costs at most
    `round_size`.
    """
    counts = sorted({at - round_size + 1 for at in GRID if round_size <= at < queries})
    return ",".join(map(str, counts))


@contextlib.contextmanager
def claim(cell: Cell, out: Path) -> Iterator[Path | None]:
    """Yield a temporary folder to run a cell in, or None if another process runs it.

    Files of a killed process are deleted.
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


def run_to_end(
    run_config: RunConfig, split: Split, model: Model, run: Path
) -> tuple[TrainingRun[RunFolder], RunReport]:
    """Run a configuration to its end; return the training run and run.json.

    Raises: ZtuneError.
    """
    training = TrainingRun(run_config, split, RunFolder(run), model)
    training.check()
    head = training.head()
    training.folder.create(plain(head), split.to_json())
    return training, training.run(head)

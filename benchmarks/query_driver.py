"""Run the missing cells of the measurement one after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import say
from benchmarks.query_cells import Cell, claim, run_to_end
from benchmarks.query_scoring import score_run
from benchmarks.query_tasks import TASKS
from runtimes.providers import Execution
from ztune.errors import ZtuneError
from ztune.io.files import write_json
from ztune.model import Model, open_model
from ztune.system import machine, one_blas_thread, versions
from ztune.training import read_split
from ztune.types import Json


@dataclass(frozen=True)
class Driver:
    """Runs cells, with their folders and the open models."""

    out: Path
    work: Path
    """Folder of derived image sets."""
    images: Path | None
    bundle: Path | None
    commit: str | None
    benches: dict[Path, Model] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> int:
        """Run the missing cells; return the number of failed ones."""
        n_failed = 0
        for number, cell in enumerate(cells, 1):
            if cell.file(self.out).is_file():
                continue
            started = time.monotonic()
            try:
                with one_blas_thread():
                    said = self._run(cell)
            except ZtuneError as error:
                n_failed, said = n_failed + 1, f"failed: {error}"
            taken = time.monotonic() - started
            say(f"[{number}/{len(cells)}] {cell}: {said} ({taken:.1f} s)")
        return n_failed

    def _run(self, cell: Cell) -> str:
        """Run a cell unless another process does; return the outcome in words.

        Raises: ZtuneError.
        """
        task = TASKS[cell.task]
        data, bundle = task.data(self.images, self.work), task.bundle(self.bundle)
        run_config = cell.run_config(bundle, data, self.out / "cache")
        _, split = read_split(run_config)
        equal_label = cell.equal_label(len(split.entries_of("train")))
        if equal_label:
            return f"the same as {equal_label}"
        file = cell.file(self.out)
        with claim(cell, self.out) as run:
            if run is None or file.is_file():
                return "run by another process"
            finished = run_to_end(run_config, split, self._bench(bundle), run)
            new = task.of_new_classes
            new_data = None if new is None else new.data(self.images, self.work)
            found = score_run(*finished, new_data)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**_heading(cell), **found, **self._circumstances()})
        curve = found["curve"]
        last = curve[-1] if isinstance(curve, list) else None
        accuracy = last["accuracy"] if isinstance(last, dict) else None
        return f"{accuracy:.1%} on the test images" if isinstance(accuracy, float) else "done"

    def _bench(self, bundle: Path) -> Model:
        """Return the open model of a bundle."""
        if bundle not in self.benches:
            execution = Execution("cpu", threads=1)
            self.benches[bundle] = open_model(bundle, execution)
        return self.benches[bundle]

    def _circumstances(self) -> dict[str, Json]:
        return {
            "date": time.strftime("%Y-%m-%d"),
            "commit": self.commit,
            "machine": dict(machine()),
            "versions": dict(versions()),
        }


def _heading(cell: Cell) -> dict[str, Json]:
    return {"task": cell.task, "label": cell.label, "seed": cell.seed}

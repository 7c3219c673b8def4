"""Overhead of `ztune bench`: seconds per cell, in one process, with joblib and with Ray.

    python -m benchmarks.harness
    python -m benchmarks.harness BUNDLE --data caltech101 --root DIR

The command runs plans with few and with many seeds. The difference divided by the number of
additional cells excludes start-up, encoding and plots. Subtracting the run's own seconds leaves the
overhead: its folder, scoring, the row. One JSON document.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, document, interleaved, parser, run_alone, say, show
from ztune.experiments.store import Store

WAYS: dict[str, tuple[int, list[str]]] = {
    "serial": (1, []),
    "joblib": (2, ["--workers", "2"]),
    "ray": (2, ["--workers", "2", "--ray", "local", "--provider", "cpu"]),
}
"""Workers, and the options that start them."""


@dataclass(frozen=True)
class Workload:
    """The settings of the plans."""

    bundle: Path
    data: str
    """A known name or a path."""
    root: Path | None
    shots: int
    queries: int

    def plan(self, method: str, n_seeds: int) -> str:
        """Return a plan of `n_seeds` cells that differ in their seed."""
        own = f"images = {{ path = {json.dumps(str(Path(self.data).resolve()))} }}"
        return (
            f"seeds = {list(range(1, n_seeds + 1))}\nqueries = {self.queries}\n"
            f"[models]\nmodel = {json.dumps(str(self.bundle.resolve()))}\n"
            f"[data]\n{f'{self.data} = {{}}' if self.root else own}\n"
            f'[methods]\n"{method}" = {{}}\n'
            f'[[protocols]]\nkind = "few-shot"\nshots = [{self.shots}]\n'
        )


def run_bench(workload: Workload, way: str, method: str, n_seeds: int) -> dict[str, float]:
    """Run the command in a new folder; return its seconds, and the mean of its runs."""
    with tempfile.TemporaryDirectory() as place:
        plan, out = Path(place) / "plan.toml", Path(place) / "out"
        plan.write_text(workload.plan(method, n_seeds))
        root = ["--root", workload.root] if workload.root else []
        command = [sys.executable, "-m", "ztune.cli.main", "bench", plan, "--out", out, "--quiet"]
        finished = run_alone([*command, *root, *WAYS[way][1]])
        outcomes = [
            one.outcome for one in Store.existing(out / "results.sqlite").view("plan").results
        ]
    own = statistics.fmean(outcome.seconds for outcome in outcomes if outcome is not None)
    return {"seconds": finished.seconds, "own": own}


def measure_cell(
    workload: Workload, way: str, method: str, few: int, many: int, repeats: int
) -> dict[str, Any]:
    """Return the cost of an additional cell as a row."""
    loops = {str(n): functools.partial(run_bench, workload, way, method, n) for n in (few, many)}
    found = interleaved(loops, repeats)
    workers = WAYS[way][0]
    slope = (found[str(many)]["seconds"] - found[str(few)]["seconds"]) / (many - few)
    own = found[str(many)]["own"]
    figures = {
        "seconds_few": found[str(few)]["seconds"],
        "seconds_many": found[str(many)]["seconds"],
        "worker_seconds_per_cell": workers * slope,
        "own_seconds_per_cell": own,
        "overhead_seconds_per_cell": workers * slope - own,
    }
    rounded = {name: round(figure, 4) for name, figure in figures.items()}
    return {"way": way, "workers": workers, "method": method, "cells": [few, many], **rounded}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path, nargs="?", default=ROOT / "models" / "mini")
    arguments.add_argument("--data", default=str(ROOT / "examples" / "digits"))
    arguments.add_argument("--root", type=Path, help="folder of named data sets")
    arguments.add_argument("--shots", type=int, default=16)
    arguments.add_argument("--queries", type=int, default=200)
    arguments.add_argument("--methods", default="gda,zip")
    arguments.add_argument("--ways", default=",".join(WAYS), help="of these")
    given = arguments.parse_args()
    started = time.perf_counter()
    workload = Workload(given.bundle, given.data, given.root, given.shots, given.queries)
    few, many, repeats = (2, 6, 1) if given.quick else (2, 42, 3)
    rows = []
    for way, method in itertools.product(given.ways.split(","), given.methods.split(",")):
        row = measure_cell(workload, way, method, few, many, repeats)
        say(f"{way}, {method}: {row['overhead_seconds_per_cell']:.3f} s overhead per cell, "
            f"{row['own_seconds_per_cell']:.3f} s for its run")  # fmt: skip
        rows.append(row)
    show(document(started, data=given.data, shots=given.shots, queries=given.queries, rows=rows))


if __name__ == "__main__":
    main()

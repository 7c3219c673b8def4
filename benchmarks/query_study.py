"""The study's table: the effect of one changed setting, paired with the unchanged method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.query_figures import Result, read_results
from benchmarks.query_labels import EVERY, STUDY_TASKS, VARIANTS
from ztune.types import F64

AT = (100, 500)
"""Queries after which variants are compared."""


@dataclass(frozen=True)
class Row:
    """A variant, over the cells that the unchanged method has too."""

    label: str
    n_cells: int
    means: tuple[float, ...]
    """Accuracy in per cent and training loss in nats, at each of AT."""
    gains: tuple[float, ...]
    """Gains over the unchanged method; means of paired differences."""
    errors: tuple[float, ...]
    """Standard errors of the gains over tasks and seeds."""


def read_study(out: Path) -> list[Row]:
    """Return rows for each unchanged method and its variants."""
    results = read_results(out, tuple(EVERY))
    by_cell = {(r.label, r.task, r.seed): figures(r) for r in results if r.task in STUDY_TASKS}
    rows = []
    for method in dict.fromkeys(label.method for label in VARIANTS.values()):
        own = [method, *(name for name, label in VARIANTS.items() if label.method == method)]
        rows += [row for name in own if (row := _row(name, method, by_cell)) is not None]
    return rows


def figures(result: Result) -> F64:
    points = [result.after(queries) for queries in AT]
    return np.array([v for p in points for v in (100 * p.accuracy, p.train_loss)])


def _row(label: str, base: str, by_cell: dict[tuple[str, str, int], F64]) -> Row | None:
    pairs = [
        (found, by_cell[(base, task, seed)])
        for (name, task, seed), found in by_cell.items()
        if name == label and (base, task, seed) in by_cell
    ]
    if not pairs:
        return None
    own, differences = np.array([p[0] for p in pairs]), np.array([p[0] - p[1] for p in pairs])
    errors = differences.std(axis=0, ddof=1) / np.sqrt(len(pairs)) if len(pairs) > 1 else 0 * own[0]
    return Row(
        label, len(pairs), tuple(own.mean(axis=0)), tuple(differences.mean(axis=0)), tuple(errors)
    )


def study_table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a Markdown table."""
    heads = [f"{what}, {at} queries" for at in AT for what in ("accuracy, %", "training loss")]
    lines = [f"| variant | cells | {' | '.join(heads)} |", "|---|---:|" + "---|" * len(heads)]
    for row in rows:
        cells = []
        for i, (mean, gain, error) in enumerate(zip(row.means, row.gains, row.errors, strict=True)):
            digits = 1 if i % 2 == 0 else 3
            shown = f"{mean:.{digits}f}"
            if row.label in VARIANTS:
                shown += f" ({gain:+.{digits}f} ± {error:.{digits}f})"
            cells.append(shown)
        lines.append(f"| `{row.label}` | {row.n_cells} | {' | '.join(cells)} |")
    return lines

"""Report how many queries each method needs to reach ZIP's accuracy, in Markdown.

    ztune bench plans/queries.toml --model BUNDLE --root DIR --out runs/queries
    python -m benchmarks.queries runs/queries

For every plan in the folder of results: queries to reach the final accuracy of its first label that
uses ZIP, mean accuracy at some budgets, and of labels that use another label as their method, the
paired differences to it. A run's accuracy after n queries is that of its last result within n, and
that of zero-shot before the first.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low, stdev

from benchmarks.measure import say
from ztune.errors import DataError, ZtuneError
from ztune.experiments.bench import RESULTS
from ztune.experiments.cells import Outcome
from ztune.experiments.protocols import TRANSFERS
from ztune.experiments.render import markdown_table
from ztune.experiments.store import Store, View
from ztune.experiments.summary import names_of, sheets_of

BUDGETS = (0, 100, 250, 500, 1000, 5000)
STUDY = (100, 500)
"""Queries after which variants are compared."""
GAIN = 0.02
"""ZIP's minimum gain over zero-shot for a task to count."""
RATIOS = (10, 20)
_SLACK = 1e-12
"""Tolerance for rounding of means."""


@dataclass(frozen=True)
class Curve:
    """The accuracy of one run, 0…1, by queries in ascending order, from zero-shot at 0 on."""

    accuracies: Mapping[int, float]

    def after(self, queries: int) -> float:
        """Return the accuracy of the last result within `queries` queries."""
        return self.accuracies[max(count for count in self.accuracies if count <= queries)]

    @property
    def end(self) -> int:
        """Queries of the whole run; 0 for a closed form."""
        return max(self.accuracies)


@dataclass(frozen=True)
class Task:
    """The curves of one protocol, model, data set and number of shots: by label, then by seed."""

    name: str
    curves: Mapping[str, Mapping[int, Curve]]

    def mean(self, label: str, queries: int) -> float:
        return fmean(one.after(queries) for one in self.curves[label].values())

    def is_tuned(self, label: str) -> bool:
        return any(one.end for one in self.curves.get(label, {}).values())

    def counts(self, mark: str) -> bool:
        """Return whether `mark` gains enough over zero-shot to be a target."""
        if mark not in self.curves:
            return False
        gains = [one.after(one.end) - one.after(0) for one in self.curves[mark].values()]
        return fmean(gains) >= GAIN - _SLACK

    def ratio(self, label: str, mark: str) -> float:
        """Return the queries of `mark` over those that `label` needs; 0: it does not reach it.

        Both are means over the seeds that both have.
        """
        own, marks = self.curves[label], self.curves[mark]
        seeds = [seed for seed in own if seed in marks]
        if not seeds:
            return 0.0
        target = fmean(marks[seed].after(marks[seed].end) for seed in seeds)
        needed = reached([own[seed] for seed in seeds], target)
        if needed is None:
            return 0.0
        return fmean(marks[seed].end for seed in seeds) / needed if needed else math.inf


def reached(curves: Sequence[Curve], target: float) -> int | None:
    """Return the queries after which the mean of the curves stays at the target; None: never."""
    first = None
    for queries in sorted({queries for one in curves for queries in one.accuracies}):
        if fmean(one.after(queries) for one in curves) < target - _SLACK:
            first = None
        elif first is None:
            first = queries
    return first


def curve_of(outcome: Outcome) -> Curve | None:
    """Return the curve on a cell's first part: all test images, or those of base classes."""
    end = outcome.scores[0]
    if end.accuracy is None:
        return None
    points = {point.queries: point.accuracy for point in outcome.curve}
    return Curve({0: end.zero_shot, **points, outcome.queries: end.accuracy})


def tasks_of(view: View) -> list[Task]:
    """Return the tasks of a plan with their finished cells, transfers left out."""
    tasks: dict[str, dict[str, dict[int, Curve]]] = {}
    for sheet in sheets_of(view.results):
        for cell, outcome in ((one.cell, one.outcome) for one in sheet.results):
            if (
                sheet.protocol in TRANSFERS
                or outcome is None
                or (curve := curve_of(outcome)) is None
            ):
                continue
            name = f"{cell.data}, {cell.shots} shot{'s' if cell.shots > 1 else ''}"
            name += "" if cell.protocol == "few-shot" else f", {cell.protocol}"
            name += f", {cell.model}" if len(view.document.models) > 1 else ""
            tasks.setdefault(name, {}).setdefault(cell.method, {})[cell.seed] = curve
    return [Task(name, curves) for name, curves in tasks.items()]


def report(view: View) -> list[str]:
    """Return a plan's report as lines of Markdown.

    Raises: DataError without finished cells.
    """
    tasks, uses = tasks_of(view), names_of(view.document).uses
    if not tasks:
        raise DataError(f'plan "{view.plan}" has no finished cells (run it: ztune bench)')
    labels = list(dict.fromkeys(one.cell.method for one in view.results))
    lines = [f"# {view.document.title}", ""]
    mark = next((label for label in labels if uses.get(label) == "zip"), None)
    if mark is not None:
        lines += ratio_lines(tasks, labels, mark)
    lines += budget_lines(tasks, labels)
    variants = {label: use for label in labels if (use := uses.get(label, label)) != label}
    study = [row for base in labels for row in study_rows(tasks, base, variants)]
    if study:
        lines += ["## One thing at a time: accuracy, %", "", *_STUDY, ""]
        columns = ["", "cells", *(f"{at:,} queries" for at in STUDY)]
        lines += [*markdown_table(columns, study), ""]
    return lines


def ratio_lines(tasks: Sequence[Task], labels: Sequence[str], mark: str) -> list[str]:
    """Return the section of queries to reach the final accuracy of `mark`."""
    counted = [task for task in tasks if task.counts(mark)]
    rows, by_task = [], [[task.name] for task in counted]
    tuned = [label for label in labels if any(task.is_tuned(label) for task in counted)]
    for label in tuned:
        found = [task.ratio(label, mark) if task.is_tuned(label) else None for task in counted]
        ratios = [ratio for ratio in found if ratio is not None]
        shares = [fmean(ratio >= least for ratio in ratios) for least in RATIOS]
        row = [label, str(len(ratios)), str(sum(ratio > 0 for ratio in ratios))]
        # The lower median, since a ratio and "never" have no mean.
        row += [_times(median_low(ratios)), _times(min(ratios)), *(f"{one:.0%}" for one in shares)]
        rows.append(row)
        for cells, ratio in zip(by_task, found, strict=True):
            cells.append("–" if ratio is None else _times(ratio))
    left_out = [task.name for task in tasks if mark in task.curves and task not in counted]
    columns = ["", "tasks", "reached", "median", "minimum", *(f"≥ {least} ×" for least in RATIOS)]
    return [
        f"## Queries to reach the final accuracy of {mark}",
        "",
        f"Queries of {mark} over the queries after which a label's mean accuracy over the seeds "
        f"stays at {mark}'s final one, for tasks where {mark} gains {100 * GAIN:.0f} points over "
        f"zero-shot. Left out: {'; '.join(left_out) or 'none'}.",
        "",
        *(markdown_table(columns, rows) if rows else ()),
        "",
        *(markdown_table(["", *tuned], by_task) if rows else ()),
        "",
    ]


def budget_lines(tasks: Sequence[Task], labels: Sequence[str]) -> list[str]:
    """Return the section of mean accuracies over the tasks that all labels have."""
    found = [label for label in labels if any(label in task.curves for task in tasks)]
    shared = [task for task in tasks if len(task.curves) == len(found)]
    longest = max(
        curve.end for task in tasks for own in task.curves.values() for curve in own.values()
    )
    budgets = [at for at in BUDGETS if at <= longest]
    rows = []
    for label in found if shared else ():
        own = budgets if shared[0].is_tuned(label) else budgets[:1]
        means = [100 * fmean(task.mean(label, at) for task in shared) for at in own]
        rows.append([label, *(f"{one:.1f}" for one in means), *["–"] * (len(budgets) - len(own))])
    return [
        f"## Mean accuracy over tasks ({len(shared)}), % by queries",
        "",
        "Over the tasks that all labels have; 0 is zero-shot, or a closed form.",
        "",
        *(markdown_table(["", *(f"{at:,}" for at in budgets)], rows) if rows else ()),
        "",
    ]


_STUDY = (
    "Means over the cells, and of variants the mean of the paired differences to their default ± "
    "its standard error.",
)


def study_rows(tasks: Iterable[Task], base: str, variants: Mapping[str, str]) -> list[list[str]]:
    """Return the rows of a label and of its variants, if it has any."""
    own = [label for label, used in variants.items() if used == base]
    cells = [(task.curves[base], task.curves) for task in tasks if base in task.curves]
    rows = []
    for label in (base, *own) if own and cells else ():
        pairs = [
            (curve, usual[seed])
            for usual, curves in cells
            for seed, curve in curves.get(label, {}).items()
            if seed in usual
        ]
        if not pairs:
            continue
        row = [label, str(len(pairs))]
        for at in STUDY:
            gains = [100 * (one.after(at) - other.after(at)) for one, other in pairs]
            error = f"{stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else "–"
            shown = f"{100 * fmean(one.after(at) for one, _ in pairs):.1f}"
            row.append(shown if label == base else f"{shown} ({fmean(gains):+.1f} ± {error})")
        rows.append(row)
    return rows


def _times(ratio: float) -> str:
    return "never" if ratio == 0 else f"{ratio:.3g} ×"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of results of ztune bench")
    arguments = parser.parse_args(words)
    try:
        store = Store.existing(arguments.out / RESULTS)
        plans = store.plans()
    except ZtuneError as error:
        say(f"error: {error}")
        return 1
    n_failed = 0
    for plan in plans:
        try:
            print("\n".join(report(store.view(plan))))
        except ZtuneError as error:  # the other plans are still reported
            n_failed += 1
            say(f"error: {error}")
    return min(1, n_failed)


if __name__ == "__main__":
    sys.exit(main())

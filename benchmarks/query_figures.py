"""Read the measurement's cells and compute the figures of its tables and plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low

import numpy as np
from msgspec import Struct

from benchmarks.query_cells import Cell
from benchmarks.query_labels import GRID, LABELS, QUERIES
from benchmarks.query_tasks import TASKS
from ztune.io.files import read_json
from ztune.io.schema import Count, convert
from ztune.types import F64

ZIP = "zip-128"
"""The label whose final value is the target."""
GAIN = 0.02
"""The minimum gain of ZIP's accuracy for a task to count."""
RATIOS = (10, 20)
LOSS = "train_loss"
_SLACK = 1e-12
"""Tolerance for rounding of means."""


@dataclass(frozen=True)
class Point:
    """Scores of a classifier after some queries; accuracies in 0…1, the loss in nats."""

    queries: int
    accuracy: float
    class_accuracy: float
    train_loss: float


@dataclass(frozen=True)
class NewClasses:
    """Accuracies on classes that were not tuned on."""

    zero_shot: float
    curve: tuple[tuple[int, float], ...]
    """(queries, accuracy)"""

    def after(self, queries: int) -> float | None:
        """Return the accuracy of the last result within `queries` queries."""
        within = [accuracy for at, accuracy in self.curve if at <= queries]
        return within[-1] if within else None


@dataclass(frozen=True)
class Result:
    """A cell's file."""

    task: str
    label: str
    seed: int
    classes: int
    n_train: int
    n_test: int
    zero_shot: Point
    curve: tuple[Point, ...]
    """In order of queries; a head has one point, at 0."""
    seconds: float
    commit: str
    date: str
    where: str
    """Machine and versions."""
    new_classes: NewClasses | None = None

    def after(self, queries: int) -> Point:
        """Return the last point within `queries` queries."""
        return [point for point in self.curve if point.queries <= queries][-1]


def read_results(out: Path, labels: Sequence[str] = tuple(LABELS)) -> list[Result]:
    """Return the finished cells of these labels, in the order of tasks, labels and seeds.

    Raises: FormatError naming a file and its field.
    """
    found = []
    for task in TASKS:
        for label in labels:
            files = (out / "cells" / task).glob(f"{label}-*.json")
            own = [_read(file) for file in files if _is_seed(file.stem[len(label) + 1 :])]
            found += sorted(own, key=lambda result: result.seed)
    return found


def _is_seed(word: str) -> bool:
    return word.isdecimal()


class _NewClasses(Struct, frozen=True):
    zero_shot: float
    curve: tuple[_NewPoint, ...]


class _NewPoint(Struct, frozen=True):
    queries: int
    accuracy: float


class _Machine(Struct, frozen=True):
    cores: int
    processor: str


class _CellFile(Struct, frozen=True, kw_only=True):
    """A cell's file as it lies there; what else it says is not needed here."""

    task: str
    label: str
    seed: Count
    classes: Count
    n_train: Count
    n_test: Count
    zero_shot: Point
    curve: tuple[Point, ...]
    seconds: float
    commit: str | None = None
    date: str
    machine: _Machine
    versions: Mapping[str, str]
    new_classes: _NewClasses | None = None


def _read(file: Path) -> Result:
    where = f'cell "{file}"'
    found = convert(read_json(file, where), _CellFile, where)
    new = found.new_classes
    packages = (f"{name} {found.versions.get(name)}" for name in ("python", "numpy", "onnxruntime"))
    return Result(
        task=found.task,
        label=found.label,
        seed=found.seed,
        classes=found.classes,
        n_train=found.n_train,
        n_test=found.n_test,
        zero_shot=found.zero_shot,
        curve=tuple(sorted(found.curve, key=lambda point: point.queries)),
        seconds=found.seconds,
        commit=str(found.commit),
        date=found.date,
        where=f"{found.machine.cores} cores, {found.machine.processor}, {', '.join(packages)}",
        new_classes=None
        if new is None
        else NewClasses(new.zero_shot, tuple((p.queries, p.accuracy) for p in new.curve)),
    )


@dataclass(frozen=True)
class Series:
    """One label on one task, over its seeds."""

    results: tuple[Result, ...]

    @property
    def is_tuned(self) -> bool:
        return self.results[0].curve[-1].queries > 0

    def values(self, measure: str, queries: int) -> list[float]:
        """Return accuracy, class_accuracy or train_loss of every seed."""
        return [float(getattr(one.after(queries), measure)) for one in self.results]

    def mean(self, measure: str, queries: int = QUERIES) -> float:
        return fmean(self.values(measure, queries))

    def means(self, measure: str) -> F64:
        """Return f64[len(GRID)]."""
        return np.array([self.mean(measure, at) for at in GRID])

    def spread(self, measure: str) -> F64:
        """Return the sample standard deviation f64[len(GRID)]; 0 for a single seed."""
        table = np.array([self.values(measure, at) for at in GRID])
        return table.std(axis=1, ddof=1) if table.shape[1] > 1 else np.zeros(len(GRID))

    def zero_shot(self, measure: str) -> float:
        return fmean(getattr(one.zero_shot, measure) for one in self.results)


@dataclass(frozen=True)
class TaskFigures:
    """A task's labels; a label with equal cells shares those of the other label."""

    task: str
    series: dict[str, Series]

    @property
    def any_result(self) -> Result:
        return next(iter(self.series.values())).results[0]

    @property
    def tuned(self) -> dict[str, Series]:
        return {name: one for name, one in self.series.items() if one.is_tuned}

    def counts(self, measure: str) -> bool:
        """Return whether reaching ZIP is meaningful: always for a loss.

        For an accuracy, ZIP must gain GAIN over zero-shot and over every method's start.
        """
        if ZIP not in self.series or measure == LOSS:
            return ZIP in self.series
        starts = [one.mean(measure, 0) for one in self.tuned.values()]
        low = max(self.series[ZIP].zero_shot(measure), *starts)
        return self.series[ZIP].mean(measure) - low >= GAIN - _SLACK

    def queries(self, label: str, measure: str, mark: str = ZIP) -> float | None:
        """Return the queries after which a label stays at `mark`'s final value; None: never."""
        target = self.series[mark].mean(measure)
        return reached(self.series[label].means(measure), target, rising=measure != LOSS)


def reached(means: F64, target: float, *, rising: bool) -> float | None:
    """Return the first point of GRID from which all means f64[len(GRID)] reach the target."""
    at_target = means >= target - _SLACK if rising else means <= target + _SLACK
    missed = np.flatnonzero(~at_target)
    first = int(missed[-1]) + 1 if len(missed) else 0
    return float(GRID[first]) if first < len(GRID) else None


def ratio_of(queries: float | None) -> float:
    """Return ZIP's queries divided by `queries`: 0 for never, infinite at the start."""
    if queries is None:
        return 0.0
    return QUERIES / queries if queries else math.inf


@dataclass(frozen=True)
class Ratios:
    """A label's ratios over the tasks that count."""

    label: str
    ratios: tuple[float, ...]

    @property
    def n_reached(self) -> int:
        return sum(ratio > 0 for ratio in self.ratios)

    @property
    def median(self) -> float:
        """The lower median, since a ratio and "never" have no mean."""
        return median_low(self.ratios)

    def share(self, least: float) -> float:
        return sum(ratio >= least for ratio in self.ratios) / len(self.ratios)


def figures_of(results: Iterable[Result]) -> list[TaskFigures]:
    """Return the tasks in their order."""
    by_task: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        by_task.setdefault(result.task, {}).setdefault(result.label, []).append(result)
    return [_task_figures(task, by_task[task]) for task in TASKS if task in by_task]


def _task_figures(task: str, by_label: dict[str, list[Result]]) -> TaskFigures:
    n_train = next(iter(by_label.values()))[0].n_train
    series = {}
    for label in LABELS:
        own = by_label.get(label) or by_label.get(Cell(task, label, 1).equal_label(n_train))
        if own:
            series[label] = Series(tuple(own))
    return TaskFigures(task, series)


def ratios_of(tasks: Sequence[TaskFigures], measure: str, mark: str = ZIP) -> list[Ratios]:
    """Return the tuned labels' ratios over the tasks that count for this measure."""
    counted = [task for task in tasks if mark in task.series and task.counts(measure)]
    found = []
    for label in LABELS:
        own = [ratio_of(t.queries(label, measure, mark)) for t in counted if label in t.tuned]
        if own:
            found.append(Ratios(label, tuple(own)))
    return found


def shared(tasks: Sequence[TaskFigures]) -> list[TaskFigures]:
    """Return the tasks that have all labels, whose means are comparable."""
    every = {label for task in tasks for label in task.series}
    return [task for task in tasks if set(task.series) == every]


def harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0

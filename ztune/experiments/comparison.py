"""The cells of a comparison, their summary, and an estimate of their time.

A cell is one method with one seed. Images are encoded once for all cells, so a cell's own figures
exclude cached images; a method is charged for them, as if it ran alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from msgspec import Struct

from ztune.io.schema import Count, Record, convert, plain
from ztune.run_document import RunReport
from ztune.types import F64, Json


@dataclass(frozen=True)
class CurvePoint:
    """A point of the accuracy curve, on the test images."""

    queries: Count
    seconds: float
    accuracy: float
    """In 0…1."""


@dataclass(frozen=True)
class Figures:
    """Figures of a finished cell's process, without cached images."""

    accuracy: float
    n_test: Count
    zero_shot_accuracy: float
    queries: Count
    probe_queries: Count
    text_forwards: Count
    image_forwards: Count
    """Images that this cell encoded, repeats included."""
    image_forwards_cached: Count
    """Images read from the cache."""
    own_seconds: float
    """From start to result, without the report that follows."""
    own_peak_memory_mb: float
    result_bytes: Count
    stop_reason: str
    curve: tuple[CurvePoint, ...] = ()
    """In order of queries, the result itself last; empty for a method without steps."""

    @property
    def image_forwards_needed(self) -> int:
        return self.image_forwards + self.image_forwards_cached


@dataclass(frozen=True)
class Cell:
    """One method with one seed."""

    method: str
    seed: int
    figures: Figures | None = None
    """None if the cell failed."""
    reason: str = ""
    """Why it failed, in one line."""


@dataclass(frozen=True)
class ImagePass:
    """Cost of encoding the images, measured in separate processes."""

    seconds_per_image: float
    peak_memory_mb: float

    def seconds(self, figures: Figures) -> float:
        """Return a cell's seconds as if it had encoded all of its images."""
        return figures.own_seconds + self.unpaid(figures)

    def unpaid(self, figures: Figures) -> float:
        """Return the seconds that encoding the cached images would have taken."""
        return figures.image_forwards_cached * self.seconds_per_image

    def memory_mb(self, figures: Figures) -> float:
        """Return a cell's peak memory as if it had encoded its images first."""
        return max(figures.own_peak_memory_mb, self.peak_memory_mb)


@dataclass(frozen=True)
class Row:
    """One method over its seeds."""

    method: str
    seeds: tuple[int, ...]
    """Finished seeds, which every figure is over."""
    accuracy: float | None
    """Mean, None without a finished seed, as are the others."""
    deviation: float | None
    """Sample standard deviation; None for fewer than two seeds."""
    queries: int | None
    text_forwards: int | None
    image_forwards: int | None
    seconds: float | None
    peak_memory_mb: float | None
    """Largest."""
    result_bytes: int | None
    failures: tuple[tuple[int, str], ...]
    """Seed and reason."""


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1), None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def summarise(cells: Iterable[Cell], images: ImagePass) -> list[Row]:
    """Return a row per method, most accurate first, those without a result last."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    rows = [_row(method, own, images) for method, own in by_method.items()]
    return sorted(rows, key=lambda row: (row.accuracy is None, -(row.accuracy or 0.0)))


def _row(method: str, cells: Sequence[Cell], images: ImagePass) -> Row:
    cells = sorted(cells, key=lambda cell: cell.seed)
    failures = tuple((cell.seed, cell.reason) for cell in cells if cell.figures is None)
    found = [(cell.seed, cell.figures) for cell in cells if cell.figures is not None]
    figures = [f for _, f in found]
    if not figures:
        return Row(method, (), None, None, None, None, None, None, None, None, failures)
    accuracies = [f.accuracy for f in figures]
    return Row(
        method,
        tuple(seed for seed, _ in found),
        _mean(accuracies),
        deviation_of(accuracies),
        round(_mean([f.queries for f in figures])),
        round(_mean([f.text_forwards for f in figures])),
        round(_mean([f.image_forwards_needed for f in figures])),
        _mean([images.seconds(f) for f in figures]),
        max(images.memory_mb(f) for f in figures),
        round(_mean([f.result_bytes for f in figures])),
        failures,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class MeanCurve:
    """A method's accuracy curve over its seeds; all arrays f64[n]."""

    queries: F64
    seconds: F64
    """Mean over the seeds at these queries."""
    mean: F64
    low: F64
    high: F64


def mean_curve(cells: Iterable[Cell], images: ImagePass) -> MeanCurve | None:
    """Return one method's curve; None if no cell has one.

    Seeds are interpolated to the same query counts, over their common range.
    """
    curves = []
    for cell in cells:
        if cell.figures is not None and cell.figures.curve:
            rows = [(p.queries, p.seconds, p.accuracy) for p in cell.figures.curve]
            one = np.array(rows, dtype=np.float64)
            one[:, 1] += images.unpaid(cell.figures)
            curves.append(one)
    if not curves:
        return None
    first = max(one[0, 0] for one in curves)
    last = min(one[-1, 0] for one in curves)
    grid = np.unique(np.concatenate([one[:, 0] for one in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid):  # one seed stopped before another's first point
        return None
    seconds = np.stack([np.interp(grid, one[:, 0], one[:, 1]) for one in curves])
    accuracy = np.stack([np.interp(grid, one[:, 0], one[:, 2]) for one in curves])
    return MeanCurve(
        grid,
        seconds.mean(axis=0),
        accuracy.mean(axis=0),
        accuracy.min(axis=0),
        accuracy.max(axis=0),
    )


@dataclass(frozen=True)
class Rates:
    """Measured times of this machine, in seconds."""

    text_query: float
    """One candidate through the text tower, for all classes."""
    image: float
    """Reading one image and encoding it."""
    encoding: float
    """Encoding one image that is already read."""
    opening: float
    """Opening both towers."""


@dataclass(frozen=True)
class Workload:
    """Estimated work of a cell."""

    queries: int = 0
    changes_texts: bool = False
    images_per_query: int = 0
    """Images encoded with every query; 0 without visual prompts."""
    n_scored: int = 0
    """Test images under a visual prompt, over the result and all snapshots."""
    own_seconds: float = 0.0
    """The optimizer's own arithmetic."""


# Two interpreters, and the plots and files of a finished run.
_PROCESS_SECONDS = 2.0


def estimated_seconds(job: Workload, rates: Rates) -> float:
    """Estimate a cell's seconds."""
    texts = job.queries * rates.text_query * job.changes_texts
    images = job.queries * job.images_per_query * rates.encoding + job.n_scored * rates.image
    return _PROCESS_SECONDS + 2 * rates.opening + texts + images + job.own_seconds


def duration(seconds: float) -> str:
    """Return a duration to two significant digits."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


COLUMNS = (
    "method", "test accuracy", "seeds", "queries", "text forwards", "image forwards", "seconds",
    "peak MB", "result bytes", "new classes",
)  # fmt: skip


def table_row(row: Row, *, new_classes: bool) -> tuple[str, ...]:
    """Return a row's text under COLUMNS; a missing figure is a dash."""
    if row.accuracy is None:
        return (row.method, "failed", f"0 of {len(row.failures)}", *"–" * 6, _yes(new_classes))
    accuracy = f"{row.accuracy:.1%}"
    if row.deviation is not None:
        accuracy += f" ± {100 * row.deviation:.1f}"
    n, n_failed = len(row.seeds), len(row.failures)
    return (
        row.method,
        accuracy,
        f"{n} of {n + n_failed}" if n_failed else str(n),
        *(f"{value:,}" for value in (row.queries, row.text_forwards, row.image_forwards)),
        f"{row.seconds:,.1f}",
        f"{row.peak_memory_mb:,.0f}",
        f"{row.result_bytes:,}",
        _yes(new_classes),
    )


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown, first column left-aligned, the others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def cell_to_json(cell: Cell, images: ImagePass) -> dict[str, Json]:
    """Return a cell for compare.json, with measured and charged figures."""
    head: dict[str, Json] = {"method": cell.method, "seed": cell.seed}
    figures = cell.figures
    if figures is None:
        return {**head, "status": "failed", "reason": cell.reason}
    return {
        **head,
        "status": "finished",
        **plain(figures),
        "image_forwards_needed": figures.image_forwards_needed,
        "seconds": round(images.seconds(figures), 3),
        "peak_memory_mb": round(images.memory_mb(figures), 1),
    }


class _CellHead(Struct, frozen=True):
    """The fields of every cell in compare.json."""

    method: str
    seed: Count
    status: Literal["finished", "failed"]
    reason: str = ""


def cell_from_json(values: Mapping[str, Json], where: str) -> Cell:
    """Read a cell with its measured figures.

    Raises: FormatError naming the field.
    """
    head = convert(values, _CellHead, where)
    if head.status == "failed":
        return Cell(head.method, head.seed, reason=head.reason)
    measured = {field.name for field in fields(Figures)}
    figures = {key: value for key, value in values.items() if key in measured}
    return Cell(head.method, head.seed, convert(figures, Figures, where))


class CellScore(Record, frozen=True, kw_only=True):
    """Output of a cell's process: test accuracy, or the error."""

    error: str | None = None
    accuracy: float = 0.0
    n: Count = 0
    zero_shot_accuracy: float = 0.0
    curve: tuple[CurvePoint, ...] = ()


def figures_of(run: RunReport, score: CellScore) -> Figures:
    """Return the figures of a run and its score."""
    curve = [point for point in score.curve if point.queries < run.queries]
    if run.queries:
        curve.append(CurvePoint(run.queries, run.own_seconds, score.accuracy))
    return Figures(
        accuracy=score.accuracy,
        n_test=score.n,
        zero_shot_accuracy=score.zero_shot_accuracy,
        queries=run.queries,
        probe_queries=run.probe_queries,
        text_forwards=run.text_forwards,
        image_forwards=run.image_forwards,
        image_forwards_cached=run.image_forwards_cached,
        own_seconds=run.own_seconds,
        own_peak_memory_mb=run.peak_memory_mb,
        result_bytes=run.result_bytes,
        stop_reason=run.stop_reason,
        curve=tuple(curve),
    )


def row_to_json(row: Row) -> dict[str, Json]:
    """Return a row for compare.json."""
    failures: list[Json] = [{"seed": seed, "reason": reason} for seed, reason in row.failures]
    return {**plain(row), "failures": failures}


def differences(then: Mapping[str, Json], now: Mapping[str, Json]) -> list[str]:
    """Return the differences of two configurations as text."""
    keys = [*then, *(key for key in now if key not in then)]
    return [
        f"{key} was {then.get(key)!r}, now {now.get(key)!r}"
        for key in keys
        if then.get(key) != now.get(key)
    ]

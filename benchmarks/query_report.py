"""Write tables and plots of the measurement: `summary.md`, `tasks.md` and a PNG per task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.query_figures import (
    GAIN,
    LOSS,
    RATIOS,
    ZIP,
    Result,
    Series,
    TaskFigures,
    figures_of,
    harmonic,
    ratio_of,
    ratios_of,
    read_results,
    shared,
)
from benchmarks.query_labels import QUERIES
from benchmarks.query_plots import draw_summary, draw_task
from benchmarks.query_scoring import NEW_CLASSES_AT
from benchmarks.query_tasks import TASKS
from ztune.errors import DataError
from ztune.experiments.comparison import deviation_of, markdown_table
from ztune.io.files import write_bytes

BUDGETS = (0, 100, 250, 500, 1000, 5000)
MEASURES = {
    "accuracy": "test accuracy",
    "class_accuracy": "mean of the classes' test accuracies",
    LOSS: "training loss",
}
_DASH = "–"


def write_report(out: Path, docs: Path) -> list[Path]:
    """Write tables and plots of the cells in `out`; return the files.

    Raises: DataError when there are none, FormatError for a corrupted one.
    """
    results = read_results(out)
    tasks = figures_of(results)
    if not tasks:
        raise DataError(f'"{out}" contains no cells (run some: python -m benchmarks.queries run)')
    docs.mkdir(parents=True, exist_ok=True)
    files = {"summary.md": summary_lines(tasks, results), "tasks.md": task_lines(tasks)}
    for name, lines in files.items():
        write_bytes(docs / name, "\n".join([*lines, ""]).encode())
    plots = [docs / f"{task.task}.png" for task in tasks]
    for task, plot in zip(tasks, plots, strict=True):
        draw_task(task, f"{task.task}, {_size(task.any_result)}", plot)
    alike = shared(tasks)
    if alike:
        plots.append(docs / "summary.png")
        draw_summary(alike, f"mean over tasks: {len(alike)}", plots[-1])
    return [*(docs / name for name in files), *plots]


def summary_lines(tasks: Sequence[TaskFigures], results: Sequence[Result]) -> list[str]:
    """Return the lines of `summary.md`."""
    alike = shared(tasks)
    lines = ["# Queries to reach what ZIP has after 5,000", ""]
    for measure, name in MEASURES.items():
        lines += _ratio_lines(tasks, measure, name)
    if alike:
        lines += [f"## Mean test accuracy over tasks ({len(alike)}), %", "", *_mean_lines(alike)]
        lines += ["", "![mean over the tasks](summary.png)", ""]
    new = _new_class_lines(tasks)
    return [*lines, *new, *_circumstances(results)]


def _ratio_lines(tasks: Sequence[TaskFigures], measure: str, name: str) -> list[str]:
    """Return a section: ratios to ZIP's final value, with batches and with all images per step."""
    lines = [f"## {name[0].upper()}{name[1:]}", "", *_rule(measure), ""]
    for mark in (ZIP, "zip-full"):
        found = ratios_of(tasks, measure, mark)
        if not found:
            continue
        head = (f"to {mark}'s end", "tasks", "reached", "median", "minimum")
        shares = [f"≥ {ratio} ×" for ratio in RATIOS]
        rows = [
            (
                one.label,
                str(len(one.ratios)),
                str(one.n_reached),
                times(one.median),
                times(min(one.ratios)),
                *(f"{one.share(ratio):.0%}" for ratio in RATIOS),
            )
            for one in found
        ]
        lines += [*markdown_table([*head, *shares], rows), ""]
    return lines


def _rule(measure: str) -> list[str]:
    rule = (
        f"Times fewer queries than {QUERIES:,}: {QUERIES:,} over the first count of the grid from "
        "which on the mean over the seeds stays at ZIP's."
    )
    if measure != LOSS:
        rule += (
            f" Tasks count where ZIP gains at least {100 * GAIN:.0f} points over zero-shot and "
            "over every method's own start."
        )
    return [rule]


def _mean_lines(tasks: Sequence[TaskFigures]) -> list[str]:
    rows = []
    for label in tasks[0].series:
        own = [task.series[label] for task in tasks]
        means = [fmean(one.mean("accuracy", at) for one in own) for at in BUDGETS]
        cells = [percent(mean) for mean in means]
        if not own[0].is_tuned:
            cells = [cells[0], *[_DASH] * (len(BUDGETS) - 1)]
        rows.append((label, *cells))
    return markdown_table(["queries", *(f"{at:,}" for at in BUDGETS)], rows)


def task_lines(tasks: Sequence[TaskFigures]) -> list[str]:
    """Return the lines of `tasks.md`, with a section per task."""
    lines = [
        "# Task by task",
        "",
        "Test accuracy in %, mean ± standard deviation over the seeds, by queries; heads need "
        "none. *Class mean*: the mean of the classes' accuracies at the end. *Loss*: in "
        "nats over all training images, at the end. *To ZIP's*: queries from which on the mean "
        f"stays at {ZIP}'s end, and {QUERIES:,} over them.",
        "",
    ]
    for task in tasks:
        lines += _task_section(task)
    return lines


def _task_section(task: TaskFigures) -> list[str]:
    columns = [
        "", "seeds", *(f"{at:,}" for at in BUDGETS), "class mean", "loss", "to ZIP's accuracy",
        "to ZIP's loss", "seconds",
    ]  # fmt: skip
    rows = [_task_row(task, label, series) for label, series in task.series.items()]
    counted = ""
    if ZIP in task.series and not task.counts("accuracy"):
        counted = f" Not counted for accuracy: ZIP gains less than {100 * GAIN:.0f} points."
    model = "`models/mini`" if TASKS[task.task].shipped else "the 20.7 M-value CLIP"
    return [
        f"## {task.task}",
        "",
        f"{_size(task.any_result)}; {model}.{counted}",
        "",
        *markdown_table(columns, rows),
        "",
        f"![{task.task}]({task.task}.png)",
        "",
    ]


def _size(result: Result) -> str:
    return f"{result.classes} classes, {result.n_train} training and {result.n_test:,} test images"


def _task_row(task: TaskFigures, label: str, series: Series) -> list[str]:
    budgets = BUDGETS if series.is_tuned else (0,)
    accuracies = [_with_spread(series.values("accuracy", at)) for at in budgets]
    accuracies += [_DASH] * (len(BUDGETS) - len(budgets))
    to_zip = [_DASH, _DASH]
    if series.is_tuned and ZIP in task.series:
        to_zip = [_reached(task.queries(label, measure)) for measure in ("accuracy", LOSS)]
    return [
        label if series.results[0].label == label else f"{label} (as {series.results[0].label})",
        str(len(series.results)),
        *accuracies,
        percent(series.mean("class_accuracy")),
        f"{series.mean('train_loss'):.3f}",
        *to_zip,
        f"{fmean(one.seconds for one in series.results):.1f}",
    ]


def _reached(queries: float | None) -> str:
    return "never" if queries is None else f"{queries:,.0f} ({times(ratio_of(queries))})"


def _with_spread(values: Sequence[float]) -> str:
    deviation = deviation_of(values)
    spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
    return f"{percent(fmean(values))}{spread}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def times(ratio: float) -> str:
    """Return a ratio in words."""
    if not ratio:
        return "never"
    return "at its start" if math.isinf(ratio) else f"{ratio:.3g} ×"


def _new_class_lines(tasks: Sequence[TaskFigures]) -> list[str]:
    """Return a section for each task whose prompts were evaluated on new classes."""
    lines = []
    columns = [f"{what}, {at:,}" for at in NEW_CLASSES_AT for what in ("base", "new", "harmonic")]
    for task in tasks:
        rows = [_new_row(label, series) for label, series in task.series.items()]
        served = [row for row in rows if row]
        if served:
            lines += [f"## Base to new: {task.task}, %", "", *_NEW_CLASSES, ""]
            lines += [*markdown_table(["queries", *columns], served), ""]
    return lines


_NEW_CLASSES = (
    "Test accuracy on the classes that were tuned on (base), on an equal number of others (new), "
    "each among its own classes, and their harmonic mean. Heads do not support new classes.",
)


def _new_row(label: str, series: Series) -> list[str]:
    """Return a label's cells, or none if its results do not support new classes."""
    row = [label]
    for at in NEW_CLASSES_AT:
        new = [_on_new(one, at) for one in series.results]
        known = [accuracy for accuracy in new if accuracy is not None]
        if not known or len(known) < len(new):
            return []
        base, other = series.mean("accuracy", at), fmean(known)
        row += [percent(base), percent(other), percent(harmonic(base, other))]
    return row


def _on_new(result: Result, queries: int) -> float | None:
    found = result.new_classes
    if found is None:
        return None
    return found.zero_shot if result.label == "zero-shot" else found.after(queries)


def _circumstances(results: Sequence[Result]) -> list[str]:
    commits = Counter(result.commit for result in results)
    dates = sorted({result.date for result in results})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    listed = ", ".join(f"{commit} ({n})" for commit, n in commits.items())
    seeds = sorted({result.seed for result in results})
    return [
        f"{len(results)} cells, seeds {', '.join(map(str, seeds))}, {span}, at commits {listed}, "
        f"one thread; {'; '.join(sorted({result.where for result in results}))}.",
    ]

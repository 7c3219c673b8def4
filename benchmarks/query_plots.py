"""Plots of the measurement: accuracy and training loss against queries, one line per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.query_figures import ZIP, Series, TaskFigures
from benchmarks.query_labels import GRID
from ztune.report import INK, new_figure, write_figure
from ztune.types import F64

# (colour, mark) of a line, (colour, dashes) of a level; the same in every plot.
_LINES = {
    "zip-128": ("#0b6e99", "o"),
    "zip-full": ("#46b3c4", "s"),
    "cma": ("#7a4c9e", "^"),
    "spsa": ("#8a5a00", "v"),
    "sharpzo": ("#8a93a3", "D"),
    "ogn": ("#d1495b", "P"),
    "ogn-context": ("#e8a013", "X"),
}
_LEVELS = {
    "gda": ("#2e8b57", (6, 2)),
    "lp++": ("#1f2430", (2, 1.5)),
    "zero-shot": ("#6b7280", (1, 2.5)),
}
_START = 5.0
"""The position of 0 queries on the logarithmic axis."""
_TICKS = (10, 25, 50, 100, 250, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Panel:
    """One measure; arrays f64[len(GRID)] by label."""

    what: str
    means: Mapping[str, F64]
    spreads: Mapping[str, F64]
    levels: Mapping[str, float]
    percent: bool = True


def draw_task(task: TaskFigures, title: str, path: Path) -> None:
    """Draw a task: accuracy on the test images, and the loss on the training images."""
    tuned = {name: one for name, one in task.tuned.items() if one.results[0].label == name}
    heads = {name: one for name, one in task.series.items() if not one.is_tuned}
    accuracy = Panel(
        "accuracy on the test images",
        {name: one.means("accuracy") for name, one in tuned.items()},
        {name: one.spread("accuracy") for name, one in tuned.items()},
        {name: one.mean("accuracy") for name, one in heads.items()},
    )
    loss = Panel(
        "loss on the training images, nats",
        {name: one.means("train_loss") for name, one in tuned.items()},
        {name: one.spread("train_loss") for name, one in tuned.items()},
        {name: one.mean("train_loss") for name, one in heads.items() if name == "zero-shot"},
        percent=False,
    )
    _draw([accuracy, loss], title, path)


def draw_summary(tasks: Sequence[TaskFigures], title: str, path: Path) -> None:
    """Draw the mean over tasks with the same labels."""
    panels = []
    for measure, what in (
        ("accuracy", "accuracy on the test images"),
        ("train_loss", "loss on the training images, nats"),
    ):
        means = {name: _mean(tasks, name, measure) for name in tasks[0].tuned}
        none = {name: np.zeros(len(GRID)) for name in means}
        levels = {
            name: float(_mean(tasks, name, measure)[-1])
            for name in tasks[0].series
            if name not in means and (measure == "accuracy" or name == "zero-shot")
        }
        panels.append(Panel(what, means, none, levels, percent=measure == "accuracy"))
    _draw(panels, title, path)


def _mean(tasks: Sequence[TaskFigures], label: str, measure: str) -> F64:
    series: list[Series] = [task.series[label] for task in tasks]
    return np.asarray(np.mean([one.means(measure) for one in series], axis=0))


def _draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    figure = new_figure(11.5, 4.4)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        handles = {**_draw_panel(axes, panel), **handles}
    ends = {**panels[0].levels, **{name: float(m[-1]) for name, m in panels[0].means.items()}}
    order = sorted(ends, key=lambda name: -ends[name])
    legend = figure.legend(
        [handles[name] for name in order],
        [f"{100 * ends[name]:.1f} %  {name}" for name in order],
        loc="outside right center",
        fontsize=8,
        frameon=False,
        title="accuracy at the end",
        title_fontsize=8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_figure(figure, path)


def _draw_panel(axes: Any, panel: Panel) -> dict[str, Any]:
    """Draw lines, bands of one standard deviation, and levels; return the legend's handles.

    A thin line marks ZIP's final value.
    """
    queries = np.array([at or _START for at in GRID])
    scale = 100.0 if panel.percent else 1.0
    handles: dict[str, Any] = {}
    for name, level in panel.levels.items():
        colour, dashes = _LEVELS[name]
        look = {"color": colour, "linestyle": (0, dashes), "linewidth": 1.3}
        handles[name] = axes.axhline(scale * level, **look)
    for name, mean in panel.means.items():
        colour, mark = _LINES[name]
        low, high = mean - panel.spreads[name], mean + panel.spreads[name]
        axes.fill_between(queries, scale * low, scale * high, color=colour, alpha=0.1, linewidth=0)
        if name == ZIP:  # the target
            axes.axhline(scale * mean[-1], color=colour, linewidth=0.8, alpha=0.6)
        (handles[name],) = axes.plot(
            queries, scale * mean, color=colour, marker=mark, markersize=3.5, linewidth=1.4
        )
    axes.set_xscale("log")
    axes.set_xticks([_START, *_TICKS], ["0", *(f"{tick:,}" for tick in _TICKS)], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("queries (logarithmic)")
    axes.set_ylabel(f"{panel.what}, %" if panel.percent else panel.what)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return handles

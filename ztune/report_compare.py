"""Plots of a comparison: accuracy against cost, all methods in one panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ztune.printing import printable
from ztune.report import (
    add_legend,
    add_title,
    new_figure,
    outline_coinciding,
    show_logarithmic,
    show_per_cent,
    write_figure,
)
from ztune.types import F64

# A method's colour and marker depend only on its index in the table of methods. Neighbours also
# differ in lightness, for print and colour blindness.
_COLOURS = (
    "#0b6e99", "#d1495b", "#8a5a00", "#e8a013", "#2e8b57", "#7a4c9e", "#e377c2", "#1f2430",
    "#46b3c4", "#c1440e", "#5b7d12", "#3d5a9e", "#00695c", "#b03a76", "#8a93a3",
)  # fmt: skip
_GREY = "#6b7280"
_MARKS = "os^DvPX<>*hpd8H"
N_COLOURS = len(_COLOURS)
N_LOOKS = N_COLOURS * len(_MARKS)
"""Indices with distinct looks."""
_DASHES = ((6, 2), (2, 1.5), (6, 2, 1.5, 2), (9, 3), (4, 1.5, 1.5, 1.5, 1.5, 1.5), (1, 2.5))


@dataclass(frozen=True)
class Line:
    """A tuned method; arrays f64[n]."""

    name: str
    style: int
    """Its index in the table of methods."""
    cost: F64
    """More than 0."""
    mean: F64
    low: F64
    high: F64
    accuracy: float | None = None
    """As in the tables, for the legend; None: the last of `mean`."""


@dataclass(frozen=True)
class Level:
    """The accuracy of a method without steps, or of a baseline."""

    name: str
    style: int | None
    """None: grey."""
    accuracy: float
    cost: float | None = None
    """Start of the level; None: it crosses the whole panel."""


def draw_accuracy_against_cost(
    cost: str, lines: Sequence[Line], levels: Sequence[Level], title: str, path: Path
) -> None:
    """Draw accuracy in 0…1 against cost on a logarithmic axis, with a band over seeds.

    Costs never decrease along a line: a point of an older run with less than the one before is
    drawn at the same cost.
    """
    n_entries = len(lines) + len(levels)
    figure = new_figure(9.6, max(4.8, 0.21 * (n_entries + 4) + 1.2))
    add_title(figure, title)
    axes = figure.subplots()
    handles = {line.name: _draw_line(axes, line) for line in lines}
    costs = [line.cost[-1] for line in lines] + [level.cost or 0.0 for level in levels]
    edge = 1.1 * max(costs, default=1.0)
    handles |= {level.name: _draw_level(axes, level, edge) for level in levels}
    axes.set_xlabel(f"{cost} (logarithmic)")
    axes.set_ylabel("accuracy on the test images")
    axes.margins(y=0.05)  # reset: a level within the lines' margin would be on the edge
    show_per_cent(axes.yaxis)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if lines or any(level.cost is not None for level in levels):
        show_logarithmic(axes, wide=2000)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"no method spends {cost}")
    ends = {x.name: float(x.mean[-1]) if x.accuracy is None else x.accuracy for x in lines}
    starts = {level.name: level.accuracy for level in levels}
    add_legend(
        axes,
        {
            heading: [(handles[name], f"{group[name]:.1%}  {printable(name)}") for name in order]
            for heading, group in (("tuned, at the end", ends), ("without steps", starts))
            for order in [sorted(group, key=lambda name: -group[name])]
        },
    )
    outline_coinciding(axes.get_lines())
    write_figure(figure, path)


def _draw_line(axes: Any, line: Line) -> Any:
    look = line_style(line.style)
    cost = np.maximum.accumulate(line.cost)
    axes.fill_between(cost, line.low, line.high, color=look["color"], alpha=0.13, linewidth=0)
    (drawn,) = axes.plot(cost, line.mean, **look)
    return drawn


def line_style(style: int) -> dict[str, Any]:
    """Return matplotlib's settings of a method's line by its index in the table."""
    mark = _MARKS[_cycle(style) % len(_MARKS)]
    return {"color": _COLOURS[style % N_COLOURS], "marker": mark, "markersize": 4, "linewidth": 1.4}


def level_style(style: int) -> dict[str, Any]:
    """Return matplotlib's settings of a method's level by its index in the table."""
    dashes = _DASHES[_cycle(style) % len(_DASHES)]
    return {"color": _COLOURS[style % N_COLOURS], "linestyle": (0, dashes), "linewidth": 1.2}


def _cycle(style: int) -> int:
    """Return the marker or dash index, which changes with every cycle of the colours."""
    return sum(divmod(style, N_COLOURS))


def templates_style() -> dict[str, Any]:
    """Return matplotlib's settings of the templates' level."""
    return {"color": _GREY, "linestyle": (0, (1, 1)), "linewidth": 1.2}


def _draw_level(axes: Any, level: Level, edge: float) -> Any:
    """Draw a level from its cost to the right edge."""
    from matplotlib.lines import Line2D

    look = templates_style() if level.style is None else level_style(level.style)
    if level.cost is None:
        axes.axhline(level.accuracy, **look)
        return Line2D([], [], **look)
    mark: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
    axes.plot([level.cost, edge], [level.accuracy] * 2, markevery=[0], **look, **mark)
    return Line2D([], [], **look, **mark)

"""Plots of a comparison: accuracy against cost, all methods in one panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztune.printing import printable
from ztune.report import INK, add_title, new_figure, write_figure
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
_WIDE = 2000
"""Ratio of highest to lowest cost from which only powers of ten are labelled."""
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
    """Draw accuracy in 0…1 against cost on a logarithmic axis, with a band over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter

    n_entries = len(lines) + len(levels)
    figure = new_figure(9.6, max(4.8, 0.21 * (n_entries + 4) + 1.2))
    add_title(figure, title)
    axes = figure.subplots()
    axes.set_xscale("log")
    handles = {line.name: _draw_line(axes, line) for line in lines}
    costs = [line.cost[-1] for line in lines] + [level.cost or 0.0 for level in levels]
    edge = 1.1 * max(costs, default=1.0)
    handles |= {level.name: _draw_level(axes, level, edge) for level in levels}
    axes.set_xlabel(f"{cost} (logarithmic)")
    axes.set_ylabel("accuracy on the test images")
    axes.margins(y=0.05)  # reset: a level within the lines' margin would be on the edge
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _WIDE * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not lines and all(level.cost is None for level in levels):
        axes.set_xscale("linear")
        axes.set_xticks([])
        axes.set_xlabel(f"no method spends {cost}")
    _add_legend(axes, handles, lines, levels)
    write_figure(figure, path)


def _draw_line(axes: Any, line: Line) -> Any:
    look = line_style(line.style)
    axes.fill_between(line.cost, line.low, line.high, color=look["color"], alpha=0.13, linewidth=0)
    (drawn,) = axes.plot(line.cost, line.mean, **look)
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


def _add_legend(
    axes: Any, handles: dict[str, Any], lines: Sequence[Line], levels: Sequence[Level]
) -> None:
    """Draw the legend next to the panel, the most accurate first."""
    from matplotlib.lines import Line2D

    ends = {line.name: float(line.mean[-1]) for line in lines}
    starts = {level.name: level.accuracy for level in levels}
    shown, words = [], []
    for heading, group in (("tuned, at the end", ends), ("without steps", starts)):
        if group:
            shown.append(Line2D([], [], linestyle="none"))
            words.append(heading)
        for name, accuracy in sorted(group.items(), key=lambda item: -item[1]):
            shown.append(handles[name])
            words.append(f"{accuracy:.1%}  {printable(name)}")
    legend = axes.legend(
        shown, words, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5)
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        if text.get_text() in ("tuned, at the end", "without steps"):
            text.set_color(INK)
            text.set_fontweight("bold")

"""The plot of accuracy over shots: a large panel for the average, a small one per data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztune.experiments.tables import HAND_WRITTEN, counted
from ztune.printing import printable
from ztune.report import (
    INK,
    add_legend,
    add_title,
    new_figure,
    outline_coinciding,
    show_per_cent,
    wrap_text,
    write_figure,
)
from ztune.report_compare import line_style, templates_style
from ztune.types import F64

_WIDTH = 9.6
"""Width of the figure, in inches."""
_COLUMNS = 4
"""Small panels per row."""


@dataclass(frozen=True)
class Track:
    """A method over shots; arrays f64[n]."""

    name: str
    style: int
    """Index in the table of methods."""
    shots: F64
    mean: F64
    deviation: F64


@dataclass(frozen=True)
class Panel:
    """The contents of one panel; accuracies in 0…1."""

    title: str
    tracks: tuple[Track, ...]
    hand_written: float | None


def draw_over_shots(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draw the first panel large with a legend, the others small below it."""
    first, small = panels[0], panels[1:]
    n_rows = math.ceil(len(small) / _COLUMNS)
    main = max(4.8, 0.21 * (len(first.tracks) + 4) + 1.2)
    heights = [main, *([2.1 * n_rows] if small else [])]
    figure = new_figure(_WIDTH, sum(heights))
    add_title(figure, title)
    areas = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = areas[0].subplots()
    _draw(axes, first, inches=0.75 * _WIDTH)
    axes.set_xlabel("shots per class (logarithmic)")
    axes.set_ylabel("accuracy on the test images")
    if small:
        n_columns = min(_COLUMNS, len(small))
        places = list(areas[1].subplots(n_rows, n_columns, squeeze=False).flat)
        for panel, place in zip(small, places, strict=False):
            _draw(place, panel, 0.9 * _WIDTH / n_columns, size=0.7)
        for place in places[len(small) :]:
            place.set_axis_off()
    write_figure(figure, path)


def _draw(axes: Any, panel: Panel, inches: float, size: float = 1.0) -> None:
    """Draw a panel with its title wrapped at `inches`; the large one (size 1) has a legend."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    handles = {}
    for track in sorted(panel.tracks, key=lambda one: len(one.shots)):  # a point goes below
        look = line_style(track.style)
        low, high = track.mean - track.deviation, track.mean + track.deviation
        axes.fill_between(track.shots, low, high, color=look["color"], alpha=0.13, linewidth=0)
        scaled = {"markersize": size * look["markersize"], "linewidth": size * look["linewidth"]}
        (handles[track.name],) = axes.plot(track.shots, track.mean, **{**look, **scaled})
    if panel.hand_written is not None:
        handles[HAND_WRITTEN] = axes.axhline(panel.hand_written, **templates_style())
    shots = sorted({float(k) for track in panel.tracks for k in track.shots})
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [f"{k:.0f}" for k in shots])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.05)  # again: a level within the tracks' margin would be on the edge
    axes.yaxis.set_major_locator(MaxNLocator(8 if size == 1 else 4, steps=(1, 2, 5, 10)))
    show_per_cent(axes.yaxis)
    points = 10 * (size + 1) / 2
    title = wrap_text(panel.title, inches, points)
    axes.set_title(title, fontsize=points, color=INK, parse_math=False)
    axes.tick_params(labelsize=10 if size == 1 else 7.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if size == 1:
        _add_legend(axes, panel, handles)
    outline_coinciding(axes.get_lines())


def _add_legend(axes: Any, panel: Panel, handles: dict[str, Any]) -> None:
    """Add a legend: ordered by accuracy at the most shots, then the methods that lack it."""
    most = max((float(track.shots[-1]) for track in panel.tracks), default=0.0)
    ends = {t.name: float(t.mean[-1]) for t in panel.tracks if t.shots[-1] == most}
    if panel.hand_written is not None:
        ends[HAND_WRITTEN] = panel.hand_written
    ranked = sorted(ends.items(), key=lambda item: -item[1])
    fewer = [track for track in panel.tracks if track.name not in ends]

    def entry(name: str, accuracy: float, end: str = "") -> tuple[Any, str]:
        return handles[name], f"{accuracy:.1%}  {printable(name)}{end}"

    add_legend(
        axes,
        {
            f"with {counted(int(most), 'shot')}": [entry(*item) for item in ranked],
            "with fewer, not ranked": [
                entry(t.name, float(t.mean[-1]), f", {counted(int(t.shots[-1]), 'shot')}")
                for t in fewer
            ],
        },
    )

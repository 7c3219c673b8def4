"""Plots of a run: its curve, and confusion tables before and after."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ztune.io.files import replacing
from ztune.printing import printable
from ztune.statistics import N_BINS, Score
from ztune.types import F64

INK, SOFT, ACCENT = "#1f2430", "#b9c0cc", "#0b6e99"
_FEW = 10  # images below which the accuracy of a bin means little
_NEAR, _LONG = 1.5, 20
"""Pixels: lines closer than the first hide each other, which shows from the second on."""


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, in inches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs its font cache
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def wrap_text(text: str, inches: float, size: float) -> str:
    """Return a text wrapped to a width in inches, at a font size in points."""
    # 0.78 of the size is above the average width of capitals.
    return textwrap.fill(printable(text), max(1, int(72 * inches / (0.78 * size))))


def add_title(figure: Any, title: str) -> None:
    """Write a title above a figure, which grows with each extra line."""
    lines = wrap_text(title, figure.get_figwidth(), 11)
    figure.set_figheight(figure.get_figheight() + 0.19 * lines.count("\n"))
    figure.suptitle(lines, fontsize=11, color=INK, parse_math=False)


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG; equal figures give equal bytes."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; the warning is of no use.
        missing = r"Glyph .* missing from|Matplotlib currently does not support .* natively"
        warnings.filterwarnings("ignore", missing, UserWarning)
        figure.savefig(temporary, format="png", metadata={"Software": None})


def show_per_cent(axis: Any) -> None:
    """Label an axis of accuracies in 0…1 in per cent, each tick with its exact value."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.6g}%")


def show_logarithmic(axes: Any, wide: float) -> None:
    """Make a drawn panel's x axis logarithmic, with numbers at its ticks instead of powers.

    If it ends at more than `wide` times its start, only powers of ten are labelled.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 8 * low:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < wide * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def outline_coinciding(drawn: Sequence[Any]) -> None:
    """Widen the lines of a panel that later ones lie on, so that they show as an outline."""
    for line in drawn:
        line.axes.autoscale_view()  # which the transforms wait for
    paths = [line.get_transform().transform(line.get_xydata()) for line in drawn]
    n_above = [sum(_hides(b, a) for b in paths[i + 1 :]) for i, a in enumerate(paths)]
    step = min(2.4, 9 / max([1, *n_above]))
    for line, n in zip(drawn, n_above, strict=True):
        line.set_linewidth(line.get_linewidth() + step * n)
        line.set_markersize(line.get_markersize() + step * n)


def _hides(other: F64, one: F64) -> bool:
    """Return whether a line, f64[n, 2] in pixels, hides `one`, or a visible length of it."""
    low, high = max(one[0, 0], other[0, 0]), min(one[-1, 0], other[-1, 0])
    if low > high:
        return False
    x = np.unique(np.clip(np.concatenate([one[:, 0], other[:, 0]]), low, high))
    gap = np.interp(x, *one.T) - np.interp(x, *other.T)
    near = np.abs(gap) < _NEAR
    length = np.diff(x)[near[1:] & near[:-1]].sum()
    return bool(near.any() and length >= min(_LONG, one[-1, 0] - one[0, 0]))


def add_legend(axes: Any, groups: Mapping[str, Sequence[tuple[Any, str]]]) -> None:
    """Draw a legend next to a panel: (line, text) under the heading of each group, if any."""
    from matplotlib.lines import Line2D

    shown: list[tuple[Any, str]] = []
    for heading, entries in groups.items():
        if heading and entries:
            shown.append((Line2D([], [], linestyle="none"), heading))
        shown += entries
    if not shown:
        return
    legend = axes.legend(
        *zip(*shown, strict=True),
        fontsize=8,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        if text.get_text() in groups:
            text.set_color(INK)
            text.set_fontweight("bold")


def _running_mean(values: F64, width: int) -> F64:
    """Return the mean over `width` values centred at each index, fewer at the ends."""
    window = np.ones(width)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.asarray(np.convolve(values, window, mode="same") / counts)


def draw_curve(
    history: Sequence[Mapping[str, float]],
    levels: Mapping[str, float],
    title: str,
    path: Path,
) -> None:
    """Draw loss and accuracy on the training batches against queries.

    `levels` are accuracies in 0…1 drawn as horizontal lines with their names.
    """
    history = [line for line in history if "validation" not in line]
    queries = np.array([line["queries"] for line in history], dtype=float)
    figure = new_figure(9, 3.6)
    add_title(figure, title)
    width = max(1, min(len(history), 2 * (len(history) // 50) + 1))
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels,
        ("loss", "accuracy"),
        ("loss on the training batch, nats", "accuracy"),
        strict=True,
    ):
        values = np.array([line[key] for line in history], dtype=float)
        results = [line for line in history if f"result_{key}" in line]
        alone = width == 1 and not results
        colour, mark = (ACCENT, ".") if alone else (SOFT, "")
        axes.plot(queries, values, color=colour, marker=mark, linewidth=0.8, label="each step")
        if results:  # a mixture: its candidates do not show its accuracy
            at = [line["queries"] for line in results]
            found = [line[f"result_{key}"] for line in results]
            axes.plot(
                at,
                found,
                "o-",
                color=ACCENT,
                markersize=4,
                label="current result,\ntraining images",
            )
            show_logarithmic(axes, wide=200)
        elif not alone:
            mean_label = f"mean of {width} steps"
            axes.plot(queries, _running_mean(values, width), color=ACCENT, label=mean_label)
        axes.set_xlabel("queries")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for index, (name, level) in enumerate(levels.items()):
        colour = ("#c1440e", "#4c7a34", "#7a4c9e")[index % 3]
        panels[1].axhline(level, color=colour, linestyle="--", linewidth=1, label=printable(name))
    show_per_cent(panels[1].yaxis)
    # Next to the curve, which may be anywhere between 0 and 1.
    add_legend(panels[1], {"": [(line, line.get_label()) for line in panels[1].get_lines()]})
    outline_coinciding(panels[1].get_lines()[-len(levels) :] if levels else [])
    write_figure(figure, path)


def draw_confusion(scores: Mapping[str, Score], path: Path) -> None:
    """Draw one confusion table per score, side by side; each row is a true class in per cent."""
    classes = [printable(name) for name in next(iter(scores.values())).classes]
    n = len(classes)
    side = min(12.0, max(3.4, 0.34 * n + 1.6))
    figure = new_figure(side * len(scores) + 0.8, side + 0.4)
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    image = None
    for axes, (name, score) in zip(panels, scores.items(), strict=True):
        table = score.confusion()
        share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(share, vmin=0, vmax=100, cmap="Blues")
        heading = f"{printable(name)}: {score.accuracy:.1%} of {score.n}"
        axes.set_title(heading, fontsize=10, color=INK, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if n <= 40:
            axes.set_xticks(range(n), classes, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(n), classes, fontsize=7, parse_math=False)
        if n <= 15:
            for row, column in np.ndindex(n, n):
                if table[row, column]:
                    colour = "white" if share[row, column] > 55 else INK
                    axes.text(
                        column,
                        row,
                        f"{share[row, column]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color=colour,
                    )
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label("% of the true class", fontsize=8)
    write_figure(figure, path)


def draw_reliability(scores: Mapping[str, Score], path: Path) -> None:
    """Draw one reliability diagram per score: accuracy over confidence, and how many images."""
    figure = new_figure(3.6 * len(scores) + 0.6, 4.6)
    rows = figure.subplots(2, len(scores), squeeze=False, sharex=True, height_ratios=(3, 1))
    for (name, score), axes, counts in zip(scores.items(), *rows, strict=True):
        bins = score.reliability
        starts, width = [one.number / N_BINS for one in bins], 1 / N_BINS
        accuracies = [one.accuracy for one in bins]
        colours = [SOFT if one.n < _FEW else ACCENT for one in bins]
        axes.bar(starts, accuracies, width, align="edge", color=colours, edgecolor="white")
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
        axes.plot([one.confidence for one in bins], accuracies, "o", color=INK, markersize=3,
                  clip_on=False)  # fmt: skip
        heading = f"{printable(name)}: ECE {score.ece:.1%}"
        axes.set_title(heading, fontsize=10, color=INK, parse_math=False)
        axes.set_ylim(0, 1)
        counts.bar(starts, [one.n for one in bins], width, align="edge", color=SOFT,
                   edgecolor="white")  # fmt: skip
        counts.set_xlim(0, 1)
        counts.set_xlabel("largest probability")
        show_per_cent(axes.yaxis)
        show_per_cent(counts.xaxis)
    figure.supxlabel(
        f"dashed: as probable as right; dots: mean probability; grey: fewer than {_FEW} images",
        fontsize=8,
        color=INK,
    )
    rows[0][0].set_ylabel("accuracy")
    rows[1][0].set_ylabel("images")
    write_figure(figure, path)

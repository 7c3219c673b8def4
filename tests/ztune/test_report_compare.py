"""Images of comparisons and benches: looks that differ, titles and levels that can be seen."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ztune import report, report_compare
from ztune.experiments import figure_shots
from ztune.experiments.figure_shots import Panel, Track, draw_over_shots
from ztune.methods.registry import METHODS
from ztune.report import draw_curve
from ztune.report_compare import (
    N_COLOURS,
    N_LOOKS,
    Level,
    Line,
    draw_accuracy_against_cost,
    level_style,
    line_style,
    templates_style,
)

COST = np.array([1.0, 10.0, 100.0])
ACCURACY = np.array([0.3, 0.5, 0.6])
LINE = Line("zip", 2, COST, ACCURACY, ACCURACY, ACCURACY)
TRACK = Track("zip", 2, COST, ACCURACY, 0 * ACCURACY)


def _curve(title: str, path: Path) -> None:
    draw_curve([{"queries": 10.0, "loss": 1.0, "accuracy": 0.5}], {}, title, path)


def _against(title: str, path: Path) -> None:
    draw_accuracy_against_cost("queries", [LINE], [], title, path)


def _over_shots(title: str, path: Path) -> None:
    draw_over_shots([Panel(title, (TRACK,), 0.5)] * 6, title, path)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, laid out, in place of their files."""
    drawn: list[Any] = []

    def note(figure: Any, path: Path) -> None:
        figure.draw_without_rendering()
        drawn.append(figure)

    for module in (report, report_compare, figure_shots):
        monkeypatch.setattr(module, "write_figure", note)
    return drawn


def test_no_two_looks_are_equal() -> None:
    looks = [line_style(style) for style in range(N_LOOKS)]
    assert len({(look["color"], look["marker"]) for look in looks}) == N_LOOKS == N_COLOURS**2
    assert len(METHODS) <= N_LOOKS
    levels = [templates_style(), *(level_style(style) for style in range(90))]
    assert len({(look["color"], look["linestyle"]) for look in levels}) == len(levels)
    assert line_style(N_LOOKS) == line_style(0)


@pytest.mark.parametrize("draw", [_curve, _against, _over_shots])
@pytest.mark.parametrize(
    "title",
    [
        "a title of the usual length",
        "of a bench with a title that says a lot " * 5,
        "ALL IN CAPITALS AND LONG " * 5,
        "no_space" * 30,
    ],
)
def test_titles_are_whole(
    draw: Callable[[str, Path], None], title: str, figures: list[Any], tmp_path: Path
) -> None:
    draw(title, tmp_path / "a.png")
    (figure,) = figures
    shown = figure.get_suptitle()
    assert "".join(shown.split()) == "".join(title.split())
    assert ("\n" in shown) == (len(title) > 80)
    texts = [figure._suptitle, *(axes.title for axes in figure.axes)]
    for box in [text.get_window_extent() for text in texts if text.get_text()]:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height


@pytest.mark.parametrize("draw", [_curve, _against])
def test_a_long_title_takes_nothing_from_the_panels(
    draw: Callable[[str, Path], None], figures: list[Any], tmp_path: Path
) -> None:
    for title in ("short", "a title that says a lot " * 12):
        draw(title, tmp_path / "a.png")
    short, long = (figure.axes[0].bbox.height for figure in figures)
    assert long == pytest.approx(short, rel=0.02)


def test_small_panels_titles_keep_apart(figures: list[Any], tmp_path: Path) -> None:
    _over_shots("a data set of a long name, which says a lot", tmp_path / "a.png")
    boxes = [axes.title.get_window_extent() for axes in figures[0].axes[1:5]]
    for one, other in itertools.pairwise(boxes):
        assert one.x1 < other.x0


@pytest.mark.parametrize("level", [0.0, 0.285, 0.29, 0.3, 0.6, 0.615])
def test_no_level_lies_on_the_edge_of_a_panel(
    level: float, figures: list[Any], tmp_path: Path
) -> None:
    panel = Panel("p", (TRACK,), level)
    draw_over_shots([panel, panel, panel], "t", tmp_path / "shots.png")
    draw_accuracy_against_cost(
        "queries", [LINE], [Level("gda", 11, level)], "t", tmp_path / "against.png"
    )
    for axes in [axes for figure in figures for axes in figure.axes]:
        low, high = axes.get_ylim()
        room = 0.04 * (high - low)
        assert low + room < min(level, 0.3)
        assert max(level, 0.6) < high - room


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_method_with_fewer_shots_is_not_ranked(figures: list[Any], tmp_path: Path) -> None:
    tracks = [
        Track(name, i, np.array(shots), np.array(mean), np.zeros(len(shots)))
        for i, (name, shots, mean) in enumerate(
            [("one", [1.0], [0.9]), ("low", [1.0, 16.0], [0.8, 0.6]), ("top", [16.0], [0.7])]
        )
    ]
    draw_over_shots([Panel("p", tuple(tracks), 0.65)], "t", tmp_path / "a.png")
    assert _legend(figures[0]) == [
        "with 16 shots", "70.0%  top", "65.0%  hand-written prompts", "60.0%  low",
        "with fewer, not ranked", "90.0%  one, 1 shot",
    ]  # fmt: skip


def test_the_legend_has_the_tables_accuracies(figures: list[Any], tmp_path: Path) -> None:
    """The curve of several seeds ends with the first of them, at other accuracies."""
    lines = [replace(LINE, accuracy=0.7), replace(LINE, name="ogn", accuracy=0.8)]
    draw_accuracy_against_cost("queries", lines, [], "t", tmp_path / "a.png")
    assert _legend(figures[0])[1:] == ["80.0%  ogn", "70.0%  zip"]


@pytest.mark.parametrize(
    ("top", "end"),
    [(0.3, 10.5), (0.301, 17.0), (0.32, 60.0), (0.35, 900.0), (0.4, 5000.0), (0.9, 3e6)],
)
def test_ticks_are_labelled_with_their_values(
    top: float, end: float, figures: list[Any], tmp_path: Path
) -> None:
    accuracy, cost = np.array([0.3, top]), np.array([10.0, end])
    line = Line("zip", 2, cost, accuracy, accuracy, accuracy)
    draw_accuracy_against_cost("seconds", [line], [], "t", tmp_path / "against.png")
    track = Track("zip", 2, np.array([1.0, 16.0]), accuracy, 0 * accuracy)
    draw_over_shots([Panel("p", (track,), 0.3)] * 2, "t", tmp_path / "shots.png")
    steps = [
        {"queries": q, "loss": 1.0, "accuracy": a} for q, a in zip(cost, accuracy, strict=True)
    ]
    draw_curve(steps, {}, "t", tmp_path / "curve.png")
    results = [{**step, "result_loss": 1.0, "result_accuracy": 0.3} for step in steps]
    draw_curve(results, {}, "t", tmp_path / "mixture.png")
    against, shots, curve, mixture = (figure.axes for figure in figures)
    per_cent = [axes.yaxis for axes in (*against, *shots, curve[1], mixture[1])]
    plain = [axes.xaxis for axes in (*against, *shots, *mixture)]
    for axis, scale in [*((one, 100) for one in per_cent), *((one, 1) for one in plain)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [
            (at, text.replace(",", "").removesuffix("%"))
            for at, text in zip(
                axis.get_ticklocs(),
                axis.get_major_formatter().format_ticks(axis.get_ticklocs()),
                strict=True,
            )
            if low <= at <= high
        ]
        assert len(ticks) >= 2
        assert [float(text) for _, text in ticks] == pytest.approx([scale * at for at, _ in ticks])


def _against_equal(path: Path) -> list[str]:
    lines = [replace(LINE, name=str(i), style=i) for i in range(3)]
    draw_accuracy_against_cost("queries", lines, [], "t", path)
    return [line_style(i)["color"] for i in range(3)]


def _level_on_line(path: Path) -> list[str]:
    flat = 0 * COST + 0.5
    line = Line("zip", 2, COST, flat, flat, flat)
    draw_accuracy_against_cost("queries", [line], [Level("gda", 11, 0.5, 5.0)], "t", path)
    return [line_style(2)["color"], level_style(11)["color"]]


def _equal_levels(path: Path) -> list[str]:
    levels = [Level(str(i), i, 0.45) for i in range(3)]
    draw_accuracy_against_cost("queries", [LINE], levels, "t", path)
    return [level_style(i)["color"] for i in range(3)]


def _equal_tracks(path: Path) -> list[str]:
    tracks = tuple(replace(TRACK, name=str(i), style=i) for i in range(3))
    draw_over_shots([Panel("p", tracks, None)], "t", path)
    return [line_style(i)["color"] for i in range(3)]


def _levels_of_a_run(path: Path) -> list[str]:
    steps = [{"queries": q, "loss": 1.0, "accuracy": 0.3} for q in (1.0, 2.0)]
    draw_curve(steps, {"a": 0.5, "b": 0.5, "c": 0.5}, "t", path)
    return ["#c1440e", "#4c7a34", "#7a4c9e"]


@pytest.mark.parametrize(
    "draw", [_against_equal, _level_on_line, _equal_levels, _equal_tracks, _levels_of_a_run]
)
def test_lines_that_coincide_all_show(draw: Callable[[Path], list[str]], tmp_path: Path) -> None:
    colours = draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    panel = pixels[:, : int(0.7 * pixels.shape[1])]  # left of the legend
    for colour in colours:
        there = np.abs(panel - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).max(axis=2) < 40
        assert there.any(axis=0).sum() > 60, colour


def test_lines_that_cross_or_meet_in_a_point_are_not_widened(
    figures: list[Any], tmp_path: Path
) -> None:
    down = replace(LINE, name="down", style=3, mean=ACCURACY[::-1])
    draw_accuracy_against_cost(
        "queries", [LINE, down], [Level("gda", 11, 0.4)], "t", tmp_path / "a"
    )
    assert {line.get_linewidth() for line in figures[0].axes[0].get_lines()} == {1.2, 1.4}


def test_the_time_axis_never_runs_backwards(figures: list[Any], tmp_path: Path) -> None:
    """Older runs counted the baselines in their history, but not in their results."""
    line = replace(LINE, cost=np.array([1.0, 3.0, 2.5]))
    draw_accuracy_against_cost("seconds", [line], [], "t", tmp_path / "a.png")
    (drawn,) = figures[0].axes[0].get_lines()
    assert list(drawn.get_xdata()) == [1, 3, 3]
    assert list(drawn.get_ydata()) == list(ACCURACY)

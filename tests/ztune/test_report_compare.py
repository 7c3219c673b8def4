"""Images of comparisons and benches: looks that differ, titles and levels that can be seen."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from ztune.experiments.figure_shots import Panel, Track, draw_over_shots
from ztune.report import draw_confusion, draw_curve
from ztune.report_compare import Level, Line, draw_accuracy_against_cost
from ztune.statistics import Score, score
from ztune.types import F32, I64


def _scored(predictions: I64, labels: I64, classes: tuple[str, ...]) -> Score:
    """Return the score of a classifier that is sure of its predictions."""
    sure: F32 = 20 * np.eye(len(classes), dtype=np.float32)[predictions]
    return score(sure, labels, classes)


def test_the_interval_is_wilsons() -> None:
    found = _scored(np.array([0] * 8 + [1] * 2), np.zeros(10, np.int64), ("a", "b"))
    assert found.accuracy == 0.8
    # Newcombe 1998, table I: 81 of 263; and the textbook case 8 of 10.
    assert found.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    other = _scored(np.array([0] * 81 + [1] * 182), np.zeros(263, np.int64), ("a", "b"))
    assert other.interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert _scored(np.zeros(5, np.int64), np.zeros(5, np.int64), ("a", "b")).interval[1] == 1.0


def test_confusion_counts_true_rows_and_predicted_columns() -> None:
    found = _scored(np.array([1, 1, 0]), np.array([0, 1, 0]), ("a", "b", "never seen"))
    np.testing.assert_array_equal(found.confusion(), [[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    assert found.per_class() == {"a": {"accuracy": 0.5, "n": 2}, "b": {"accuracy": 1.0, "n": 1}}


@pytest.mark.parametrize("n", [1, 2, 60])
def test_a_curve_is_drawn_whatever_its_length(n: int, tmp_path: Path) -> None:
    history = [{"queries": 10.0 * k, "loss": 2 / k, "accuracy": 0.5} for k in range(1, n + 1)]
    draw_curve(history, {"zero-shot": 0.4}, "a title", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > image.height > 100


def test_a_mixtures_curve_is_of_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its candidates say nothing of how it does: no mean of theirs is drawn."""
    drawn: list[tuple[str, list[float], list[float], str]] = []
    plot = Axes.plot

    def watched(axes: Axes, x: list[float], y: list[float], *rest: Any, **style: Any) -> Any:
        drawn.append((axes.get_xscale(), list(x), list(y), style.get("label", "")))
        return plot(axes, x, y, *rest, **style)

    monkeypatch.setattr(Axes, "plot", watched)
    history = [{"queries": 10.0 * k, "loss": 2.0, "accuracy": 0.25} for k in range(1, 21)]
    for k in (1, 2, 4, 8, 16):
        history[k - 1] |= {"result_loss": 1 / k, "result_accuracy": 1 - 0.5 / k}
    draw_curve(history, {"zero-shot": 0.4}, "a title", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > image.height > 100
    results = [one for one in drawn if one[3] == "current result,\ntraining images"]
    at = [10.0, 20, 40, 80, 160]
    assert [(x, y) for _, x, y, _ in results] == [
        (at, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]),
        (at, [0.5, 0.75, 0.875, 0.9375, 0.96875]),
    ]
    assert not any("mean of" in label for *_, label in drawn)
    drawn.clear()
    for line in history:
        line.pop("result_loss", None)
        line.pop("result_accuracy", None)
    draw_curve(history * 3, {}, "a title", tmp_path / "curve.png")
    assert sum("mean of 3" in label for *_, label in drawn) == 2
    assert {scale for scale, *_ in drawn} == {"linear"}
    drawn.clear()
    draw_curve(history, {}, "a title", tmp_path / "curve.png")  # a mean of 1 step would hide them
    assert [label for *_, label in drawn] == ["each step"] * 2


@pytest.mark.parametrize("n", [2, 12, 100])
def test_confusion_tables_are_drawn_for_few_and_many_classes(n: int, tmp_path: Path) -> None:
    labels = np.arange(3 * n) % n
    classes = tuple(f"class {i}" for i in range(n))
    scores = {
        "zero-shot": _scored(labels * 0, labels, classes),
        "tuned": _scored(labels, labels, classes),
    }
    draw_confusion(scores, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert 400 < image.width < 4000


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = ("$^$", "a$_b$", "\\frac{", "猫", "אב")
    history = [{"queries": 10.0, "loss": 1.0, "accuracy": 0.5}]
    draw_curve(history, {"$^$": 0.4, "猫": 0.5}, "zip on a$^$b 猫", tmp_path / "curve.png")
    labels = np.arange(len(odd))
    draw_confusion({"$^$ 猫": _scored(labels, labels, odd)}, tmp_path / "confusion.png")
    for name in ("curve.png", "confusion.png"):
        with Image.open(tmp_path / name) as image:
            image.load()


def test_names_on_a_plot_are_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def kept(figure: Any, path: Path) -> None:
        figure.canvas.draw()
        texts.extend(text.get_text() for text in figure.findobj(Text))

    for module in ("ztune.report", "ztune.report_compare", "ztune.experiments.figure_shots"):
        monkeypatch.setattr(f"{module}.write_figure", kept)
    name, path = "\x1b[2J\u202e", tmp_path / "plot.png"
    found = _scored(np.array([0, 1]), np.array([0, 1]), (name, "b"))
    draw_confusion({name: found}, path)
    draw_curve([{"queries": 1.0, "loss": 1.0, "accuracy": 0.5}], {name: 0.4}, name, path)
    two = np.array([1.0, 2.0])
    draw_accuracy_against_cost(
        "queries", [Line(name, 0, two, two, two, two)], [Level(name, 1, 0.5)], name, path
    )
    draw_over_shots([Panel(name, (Track(name, 0, two, two, two),), 0.5)] * 2, name, path)
    assert sum(r"\x1b[2J\u202e" in text for text in texts) >= 12
    assert not [text for text in texts if set(text) & set("\x1b\u202e")]

"""Cells, their summary and the estimate: arithmetic that needs no model."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from ztune.errors import FormatError
from ztune.experiments.comparison import (
    COLUMNS,
    Cell,
    CellScore,
    CurvePoint,
    Figures,
    ImagePass,
    Rates,
    Workload,
    cell_from_json,
    cell_to_json,
    deviation_of,
    differences,
    duration,
    estimated_seconds,
    figures_of,
    markdown_table,
    mean_curve,
    summarise,
    table_row,
)
from ztune.report_compare import Level, Line, draw_accuracy_against_cost
from ztune.run_config import RunConfig
from ztune.run_document import RunReport
from ztune.types import Json

IMAGES = ImagePass(seconds_per_image=0.5, peak_memory_mb=300.0)
FIGURES = Figures(
    accuracy=0.6,
    n_test=50,
    zero_shot_accuracy=0.5,
    queries=100,
    probe_queries=20,
    text_forwards=1200,
    image_forwards=0,
    image_forwards_cached=40,
    own_seconds=7.0,
    own_peak_memory_mb=200.0,
    result_bytes=1000,
    stop_reason="budget",
    curve=(CurvePoint(10, 1.0, 0.4), CurvePoint(100, 7.0, 0.6)),
)


def cell(method: str, seed: int, accuracy: float, **changes: float) -> Cell:
    return Cell(method, seed, replace(FIGURES, accuracy=accuracy, **changes))  # type: ignore[arg-type]


def test_the_deviation_is_of_a_sample() -> None:
    values = [0.61, 0.655, 0.58, 0.7]
    deviation = deviation_of(values)
    assert deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert deviation != pytest.approx(statistics.pstdev(values), rel=1e-3)
    assert deviation_of([0.5, 0.5]) == 0
    assert deviation_of([0.5]) is None


def test_a_row_is_the_mean_over_the_seeds_that_finished() -> None:
    cells = [
        cell("zip", 3, 0.7, own_seconds=9.0, own_peak_memory_mb=400.0, result_bytes=2000),
        cell("zip", 1, 0.5, queries=110),
        Cell("zip", 2, reason="broke"),
    ]
    (row,) = summarise(cells, IMAGES)
    assert row.seeds == (1, 3)
    assert row.accuracy == pytest.approx(0.6)
    assert row.deviation == pytest.approx(math.sqrt(0.02))
    assert row.queries == 105
    assert row.text_forwards == 1200
    assert row.image_forwards == 40
    assert row.seconds == pytest.approx((9 + 7) / 2 + 40 * 0.5)
    assert row.peak_memory_mb == 400
    assert row.result_bytes == 1500
    assert row.failures == ((2, "broke"),)


def test_a_method_costs_the_same_whether_or_not_another_encoded_its_images() -> None:
    alone = replace(FIGURES, image_forwards=40, image_forwards_cached=0, own_seconds=27.0)
    shared = replace(FIGURES, image_forwards=0, image_forwards_cached=40, own_seconds=7.0)
    rows = [summarise([Cell("zip", 1, figures)], IMAGES)[0] for figures in (alone, shared)]
    assert rows[0].image_forwards == rows[1].image_forwards == 40
    assert rows[0].seconds == rows[1].seconds == 27
    assert rows[0].peak_memory_mb == rows[1].peak_memory_mb == 300


def test_the_most_accurate_comes_first_and_what_failed_last() -> None:
    cells = [
        Cell("bar", 1, reason="too dear"),
        cell("zip", 1, 0.6),
        cell("gda", 1, 0.9),
        cell("worthless", 1, 0.0),
        cell("cma", 1, 0.7),
        Cell("cma", 2, reason="broke"),
    ]
    rows = summarise(cells, IMAGES)
    assert [row.method for row in rows] == ["gda", "cma", "zip", "worthless", "bar"]
    assert rows[-1].accuracy is None
    assert rows[-1].failures == ((1, "too dear"),)
    assert [row.deviation for row in rows] == [None] * 5


def test_a_row_in_words() -> None:
    rows = summarise([cell("zip", 1, 0.5), cell("zip", 2, 0.7), Cell("bar", 1, reason="x")], IMAGES)
    words = dict(zip(COLUMNS, table_row(rows[0], new_classes=True), strict=True))
    assert words == {
        "method": "zip",
        "test accuracy": "60.0% ± 14.1",
        "seeds": "2",
        "queries": "100",
        "text forwards": "1,200",
        "image forwards": "40",
        "seconds": "27.0",
        "peak MB": "300",
        "result bytes": "1,000",
        "new classes": "yes",
    }
    failed = table_row(rows[1], new_classes=False)
    assert failed[:3] == ("bar", "failed", "0 of 1")
    assert len(failed) == len(COLUMNS)
    (row,) = summarise([cell("zip", 1, 0.5), Cell("zip", 2, reason="x")], IMAGES)
    assert table_row(row, new_classes=True)[1:3] == ("50.0%", "1 of 2")


def test_a_cell_survives_its_file() -> None:
    for one in (cell("zip", 1, 0.625), Cell("bar", 2, reason="no pixels")):
        document = json.loads(json.dumps(cell_to_json(one, IMAGES)))
        assert cell_from_json(document, "a cell") == one
    document = cell_to_json(cell("zip", 1, 0.625), IMAGES)
    assert document["seconds"] == 27
    assert document["image_forwards_needed"] == 40
    del document["queries"]
    with pytest.raises(FormatError, match="queries"):
        cell_from_json(document, "a cell")


RUN = RunReport(
    status="finished",
    method="zip",
    seed=1,
    config={},
    provider="cpu",
    precision="fp32",
    model_id="m",
    bundle_digest="d",
    classes=10,
    versions={},
    machine={},
    run_config=RunConfig("b", "d"),
    queries=100,
    probe_queries=20,
    text_forwards=1200,
    image_forwards=3,
    image_forwards_cached=37,
    seconds=7.5,
    report_seconds=0.0,
    peak_memory_mb=200.0,
    result_bytes=1000,
    stop_reason="budget",
    cuda_graph=None,
    loss="cross-entropy",
    train_loss=0.5,
    val_accuracy=None,
    validation={},
    gda_alpha=None,
)


def test_the_result_ends_the_curve_once() -> None:
    point, end = CurvePoint(10, 1.0, 0.4), CurvePoint(100, 7.5, 0.6)
    score = CellScore(accuracy=0.6, n=50, zero_shot_accuracy=0.5, curve=(point,))
    figures = figures_of(RUN, score)
    assert figures.curve == (point, end)
    assert figures.image_forwards_needed == 40
    last = structs.replace(score, curve=(point, CurvePoint(100, 7.0, 0.6)))
    assert figures_of(RUN, last).curve[1:] == (end,)
    head = figures_of(structs.replace(RUN, queries=0), structs.replace(score, curve=()))
    assert head.curve == ()


def test_the_report_of_a_run_is_none_of_its_seconds() -> None:
    score = CellScore(accuracy=0.6, n=50, zero_shot_accuracy=0.5)
    figures = figures_of(structs.replace(RUN, report_seconds=2.25), score)
    assert figures.own_seconds == figures.curve[-1].seconds == 5.25
    assert figures_of(RUN, score).own_seconds == 7.5


def test_curves_of_several_seeds_meet_at_the_same_queries() -> None:
    def with_curve(seed: int, *points: tuple[int, float, float]) -> Cell:
        curve = tuple(CurvePoint(*point) for point in points)
        return Cell("zip", seed, replace(FIGURES, curve=curve))

    cells = [
        with_curve(1, (10, 1.0, 0.2), (20, 2.0, 0.4), (40, 4.0, 0.6)),
        with_curve(2, (20, 4.0, 0.6), (40, 8.0, 0.8), (60, 12.0, 0.9)),
        Cell("zip", 3, reason="broke"),
    ]
    curve = mean_curve(cells, IMAGES)
    assert curve is not None
    np.testing.assert_array_equal(curve.queries, [20, 40])
    np.testing.assert_allclose(curve.seconds, [3 + 20, 6 + 20])  # with 40 images of 0.5 s
    np.testing.assert_allclose(curve.mean, [0.5, 0.7])
    np.testing.assert_allclose(curve.low, [0.4, 0.6])
    np.testing.assert_allclose(curve.high, [0.6, 0.8])
    between = mean_curve([with_curve(1, (10, 1.0, 0.2), (30, 3.0, 0.4)), cells[1]], IMAGES)
    assert between is not None
    np.testing.assert_allclose(between.queries, [20, 30])
    np.testing.assert_allclose(between.mean, [0.45, 0.55])
    assert mean_curve([with_curve(1, (10, 1.0, 0.2)), cells[1]], IMAGES) is None
    assert mean_curve([with_curve(1)], IMAGES) is None


def test_the_estimate_adds_what_a_cell_sends() -> None:
    rates = Rates(text_query=0.01, image=0.3, encoding=0.2, opening=1.0)
    nothing = estimated_seconds(Workload(), rates)
    assert nothing > 2 * rates.opening
    texts = Workload(queries=1000, changes_texts=True)
    assert estimated_seconds(texts, rates) - nothing == pytest.approx(10)
    images = Workload(queries=100, images_per_query=16, n_scored=50)
    assert estimated_seconds(images, rates) - nothing == pytest.approx(320 + 15)
    both = replace(images, changes_texts=True)
    assert estimated_seconds(both, rates) - nothing == pytest.approx(320 + 15 + 1)
    slow = replace(texts, own_seconds=60.0)
    assert estimated_seconds(slow, rates) - nothing == pytest.approx(10 + 60)


def test_spans_are_said_in_their_unit() -> None:
    spans = [0.3, 59, 99, 100, 3000, 7200, 90_000]
    assert [duration(s) for s in spans] == [
        "0 s", "59 s", "99 s", "2 min", "50 min", "2.0 h", "25.0 h",
    ]  # fmt: skip


def test_a_changed_request_is_named() -> None:
    then: dict[str, Json] = {"queries": 100, "val": None, "data": "a"}
    assert differences(then, dict(then)) == []
    assert differences(then, {**then, "queries": 200}) == ["queries was 100, now 200"]
    assert differences(then, {**then, "new": 1}) == ["new was None, now 1"]


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    lines = markdown_table(("a", "b"), [("x|y", "1")])
    assert lines == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_images_of_many_methods_of_one_and_of_none(tmp_path: Path) -> None:
    cost = np.array([10.0, 100.0, 1000.0])
    accuracy = np.array([0.3, 0.5, 0.6])
    many = [Line(f"m${i}_", i, cost, accuracy + i / 99, accuracy, accuracy + 0.2) for i in range(9)]
    levels = [Level(f"head {i}", i, 0.7 + i / 99, 2.0 + i) for i in range(9, 15)]
    levels.append(Level("hand-written prompt", None, 0.5))
    for name, (lines, flat) in {
        "many": (many, levels),
        "one": (many[:1], []),
        "heads": ([], levels),
        "level": ([], levels[-1:]),
        "again": (many, levels),
    }.items():
        path = tmp_path / f"{name}.png"
        draw_accuracy_against_cost("seconds", lines, flat, "a title of $^$ and 猫", path)
        with Image.open(path) as image:
            assert image.width > image.height > 400
    assert (tmp_path / "many.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (tmp_path / "many.png").read_bytes() != (tmp_path / "heads.png").read_bytes()

"""Curves, durations and the table of a comparison: arithmetic that needs no model."""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MINI
from tests.ztune.experiments.bench_results import OUTCOME, PLAN, Row, curve, digest_of, store_of
from ztune.experiments.cells import Cell, Outcome, key_of
from ztune.experiments.compare import CompareConfig, Comparison, plan_of
from ztune.experiments.compare_report import COLUMNS, Report
from ztune.experiments.curves import mean_curve
from ztune.experiments.render import markdown_table
from ztune.experiments.store import ImagePass, Store
from ztune.experiments.summary import deviation_of
from ztune.io.config import as_json
from ztune.printing import duration
from ztune.report_compare import Level, Line, draw_accuracy_against_cost
from ztune.run_config import RunConfig


def report_of(tmp_path: Path, *rows: Row, unable: dict[str, str] | None = None) -> Report:
    store = store_of(tmp_path, rows)
    store.add_pass(digest_of("clip"), 100, 50.0, 300.0)
    methods = tuple(dict.fromkeys([*(row.method for row in rows), *(unable or {})]))
    config = CompareConfig(RunConfig(str(MINI), "photos"), methods, (1, 2), 100, {})
    return Report(Comparison(tmp_path, "a title", config, store.view(PLAN), 0, unable or {}))


def isolated(**changes: float) -> Outcome:
    return replace(OUTCOME, **{"peak_memory_mb": 200.0, **changes})  # type: ignore[arg-type]


def test_the_deviation_is_of_a_sample() -> None:
    values = [0.61, 0.655, 0.58, 0.7]
    deviation = deviation_of(values)
    assert deviation == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert deviation != pytest.approx(statistics.pstdev(values), rel=1e-3)
    assert deviation_of([0.5, 0.5]) == 0
    assert deviation_of([0.5]) is None


def test_the_most_accurate_comes_first_and_what_failed_last(tmp_path: Path) -> None:
    report = report_of(
        tmp_path,
        Row("bar", "d", ["too dear", "too dear"]),
        Row("zip", "d", [0.6, "broke"]),
        Row("gda", "d", [0.9, 0.9]),
        Row("cma", "d", [0.7, 0.7]),
        unable={"sharpzo": "costs too much"},
    )
    assert [row.method for row in report.rows] == ["gda", "cma", "zip", "bar", "sharpzo"]
    assert [row.failures for row in report.rows[2:]] == [
        ((2, "broke"),), ((1, "too dear"), (2, "too dear")),
        ((1, "costs too much"), (2, "costs too much")),
    ]  # fmt: skip
    assert report.failures()[1:] == [
        "bar failed with seeds 1, 2: too dear", "sharpzo failed with seeds 1, 2: costs too much",
    ]  # fmt: skip
    assert report.rows[2].cells()[1:6] == ("60.0%", "–", "–", "–", "1 of 2")
    assert report.rows[3].cells()[:6] == ("bar", "failed", "–", "–", "–", "0 of 2")
    assert {len(row.cells()) for row in report.rows} == {len(COLUMNS)}


def test_a_row_in_words(tmp_path: Path) -> None:
    report = report_of(tmp_path, Row("zip", "d", [0.5, 0.7], outcome=isolated(seconds=7.0)))
    (row,) = report.rows
    assert dict(zip(COLUMNS, row.cells(), strict=True)) == {
        "method": "zip",
        "test accuracy": "60.0% ± 14.1",
        "ECE": "–",  # a result of a version that did not measure it
        "NLL": "–",
        "Brier": "–",
        "seeds": "2",
        "queries": "100",
        "text forwards": "1,200",
        "image forwards": "50",
        "seconds": "27.0",  # with 40 cached images of 0.5 s
        "peak MB": "300",  # of the pass that encoded them
        "result bytes": "1,000",
        "new classes": "yes",
    }
    cell = report.to_json()["cells"][0]  # type: ignore[index]
    assert isinstance(cell, dict)
    assert (cell["own_seconds"], cell["seconds"]) == (7.0, 27.0)
    assert (cell["own_peak_memory_mb"], cell["peak_memory_mb"]) == (200.0, 300.0)


def test_a_peak_is_the_largest_and_may_be_unknown(tmp_path: Path) -> None:
    known = report_of(tmp_path / "a", Row("zip", "d", [0.5], outcome=isolated(peak_memory_mb=400)))
    peak = COLUMNS.index("peak MB")
    assert known.rows[0].cells()[peak] == "400"
    unknown = report_of(tmp_path / "b", Row("zip", "d", [0.5]))
    assert unknown.rows[0].cells()[peak] == "–"


def test_images_are_charged_at_the_rate_of_the_comparisons_model(tmp_path: Path) -> None:
    report = report_of(tmp_path, Row("zip", "d", [0.5]))
    Store(tmp_path / "results.sqlite").add_pass("a digest of another", 1, 9.0, 9000.0)
    view = Store(tmp_path / "results.sqlite").view(PLAN)
    assert Report(replace(report.comparison, view=view)).images == ImagePass(0.5, 300.0)


def test_a_comparison_shows_its_own_cells_whatever_another_one_runs(tmp_path: Path) -> None:
    store = store_of(tmp_path, [Row("zip", "d", [0.5])])
    (mine,) = store.view(PLAN).results
    other = Cell("few-shot", "clip", "d", "gda", 16, 2)
    store.set_plan(PLAN, {"title": "another"}, {other: "a key"})
    key = key_of(as_json(mine.cell))
    assert store.view(PLAN, {mine.cell: key}).results == (mine,)
    assert [one.cell for one in store.view(PLAN).results] == [other]


def test_all_cores_are_the_default() -> None:
    config = CompareConfig(RunConfig(str(MINI), "photos", shots=2), ("gda",), (1,), 100, {})
    assert plan_of(config, Path("out")).execution.threads is None


def test_curves_of_several_seeds_meet_at_the_same_queries() -> None:
    first = curve((10, 1.0, 0.2), (20, 2.0, 0.4), (40, 4.0, 0.6))
    second = curve((20, 4.0, 0.6), (40, 8.0, 0.8), (60, 12.0, 0.9))
    found = mean_curve([first, second, OUTCOME], ImagePass(0.5, None))
    assert found is not None
    np.testing.assert_array_equal(found.queries, [20, 40])
    np.testing.assert_allclose(found.seconds, [3 + 20, 6 + 20])  # with 40 images of 0.5 s
    np.testing.assert_allclose(found.mean, [0.5, 0.7])
    np.testing.assert_allclose(found.low, [0.4, 0.6])
    np.testing.assert_allclose(found.high, [0.6, 0.8])
    between = mean_curve([curve((10, 1.0, 0.2), (30, 3.0, 0.4)), second], ImagePass(0.5, None))
    assert between is not None
    np.testing.assert_allclose(between.queries, [20, 30])
    np.testing.assert_allclose(between.mean, [0.45, 0.55])
    assert mean_curve([curve((10, 1.0, 0.2)), second], ImagePass(0.5, None)) is None
    assert mean_curve([OUTCOME], ImagePass(0.5, None)) is None


def test_spans_are_said_in_their_unit() -> None:
    spans = [0.3, 59, 99, 100, 3000, 7200, 90_000]
    assert [duration(s) for s in spans] == [
        "0 s", "59 s", "99 s", "2 min", "50 min", "2.0 h", "25.0 h",
    ]  # fmt: skip


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

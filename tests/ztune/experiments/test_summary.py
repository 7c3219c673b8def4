"""Figures over seeds, tables and standings: arithmetic checked by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ztune.experiments.bench_results import OUTCOME, PLAN, Row, store_of
from ztune.experiments.plan_document import PlanDocument
from ztune.experiments.ranking import Ranking, Record, rank_methods, units_of
from ztune.experiments.store import ImagePass, Result
from ztune.experiments.summary import (
    Measured,
    Names,
    Sheet,
    average,
    combined,
    harmonic_mean,
    names_of,
    sheets_of,
)
from ztune.experiments.tables import (
    Table,
    accuracy_tables,
    calibration_table,
    costs_tables,
    figures_table,
    ranking_table,
)
from ztune.io.schema import convert
from ztune.statistics import Bin
from ztune.types import Json

NAMES = Names("a title", {}, {}, {}, {})


def sheets(folder: Path, *rows: Row) -> list[Sheet]:
    return sheets_of(store_of(folder, rows).view(PLAN).results)


def texts(table: Table) -> dict[str, list[str]]:
    """Return a table's words by row, bold ones between stars."""
    return {
        row[0].text: [f"*{word.text}*" if word.bold else word.text for word in row[1:]]
        for row in table.rows
    }


def test_mean_and_deviation_are_of_the_seeds_that_are_there() -> None:
    figure = Measured({1: 0.60, 2: 0.62, 5: 0.64}, 4)
    assert figure.mean == pytest.approx(0.62)
    assert figure.deviation == pytest.approx(0.02)
    assert not figure.is_whole
    assert Measured({1: 0.6}, 1).deviation is None
    assert Measured({}, 3).mean is None


def test_an_average_is_over_the_seeds_that_all_have() -> None:
    one, other = Measured({1: 0.2, 2: 0.4, 3: 0.9}, 3), Measured({2: 0.6, 1: 0.4}, 3)
    assert dict(average([one, other]).by_seed) == pytest.approx({1: 0.3, 2: 0.5})
    assert average([one, other]).n_wanted == 3
    assert average([one, Measured({}, 3)]).mean is None
    assert average([]).mean is None


def test_the_harmonic_mean_is_taken_seed_by_seed() -> None:
    """Of 0.8 and 0.4 it is 0.64/1.2; of the two means it would be 0.7/1.2 = 0.583."""
    base, new = Measured({1: 0.8, 2: 0.6}, 2), Measured({1: 0.4, 2: 0.6}, 2)
    h = combined([base, new], harmonic_mean)
    assert h.by_seed[1] == pytest.approx(0.64 / 1.2)
    assert h.mean == pytest.approx((0.64 / 1.2 + 0.6) / 2)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 0.5) == 0.0


def document(values: dict[str, Json]) -> PlanDocument:
    return convert(values, PlanDocument, "plan")


def test_a_plan_may_say_nothing_but_its_title() -> None:
    names = names_of(document({"title": "t", "methods": {"a": {"preset": "x"}}, "data": {}}))
    assert (names.title, names.method_of("a"), names.of_data("d")) == ("t", "a", "d")
    assert (names.known_as, names.digests) == ({}, {})


def test_a_plan_says_what_its_data_and_models_are() -> None:
    data: dict[str, Json] = {
        "d": {"title": "DTD", "found": {"known_as": "dtd", "remarks": []}},
        "photos": {"found": {"known_as": None, "remarks": []}},
        "not read": {"found": None},
    }
    models: dict[str, Json] = {"clip": {"digest": "0a"}}
    names = names_of(document({"title": "t", "data": data, "models": models}))
    assert (names.known_as, names.digests) == ({"d": "dtd"}, {"clip": "0a"})


def test_few_shot_tables(tmp_path: Path) -> None:
    (sheet,) = sheets(
        tmp_path,
        Row("first", "a", (0.60, 0.62, 0.64)),
        Row("second", "a", (0.6204, 0.6204, 0.6204)),
        Row("third", "a", (0.3,), shots=1),
        Row("first", "b", (0.70, 0.80, 0.90), zero_shot=0.85),
        Row("second", "b", ("broke", None, 0.4), zero_shot=0.85),
        Row("fourth", "a", (0.2,)),
        Row("broken", "a", ("broke", None), shots=1),
    )
    one_shot, table, over, of_classes = accuracy_tables(sheet, NAMES)
    assert one_shot.title == "1 shot: accuracy, %"
    # A method that the plan does not ask for anything of a table has no row in it.
    assert texts(one_shot) == {
        "hand-written prompts": ["*50.0*"], "third": ["30.0"], "broken": ["–"],
    }  # fmt: skip
    assert table.columns == ("method", "a", "b", "average")
    assert texts(table) == {
        "hand-written prompts": ["50.0", "*85.0*", "67.5"],
        "first": ["*62.0 ± 2.0*", "80.0 ± 10.0", "*71.0 ± 6.0*"],
        "second": ["*62.0 ± 0.0*", "40.0 (1 of 3)", "51.0 (1 of 3)"],
        "fourth": ["20.0", "–", "–"],
    }
    assert any(note.startswith("–") for note in table.notes)
    assert any("(1 of 3)" in note for note in table.notes)
    assert over.title == "Over shots: accuracy, %, a"
    assert texts(over)["third"] == ["30.0", "–"]
    assert of_classes.title == "16 shots: mean of the classes' accuracies, %"
    assert texts(of_classes)["first"] == ["*52.0 ± 2.0*", "70.0 ± 10.0", "*61.0 ± 6.0*"]
    assert texts(of_classes)["hand-written prompts"] == ["40.0", "*75.0*", "57.5"]


def test_shots_side_by_side_are_of_the_data_sets_that_have_them_all(tmp_path: Path) -> None:
    rows = [
        Row("m", data, (accuracy,), shots=shots)
        for data, shots, accuracy in (
            ("a", 1, 0.2), ("a", 2, 0.4), ("b", 1, 0.4), ("b", 2, 0.8), ("only", 2, 0.0),
        )
    ]  # fmt: skip
    (sheet,) = sheets(tmp_path, *rows)
    over = accuracy_tables(sheet, NAMES)[2]
    assert over.title == "Over shots: accuracy, %, average of 2 data sets"
    assert over.columns == ("method", "1 shot", "2 shots")
    assert texts(over)["m"] == ["30.0", "*60.0*"]
    assert over.notes == ("Over a, b.",)


def test_what_reads_the_same_is_bold_together_and_a_lone_figure_is_not() -> None:
    near, same, low = (Measured({1: x}, 1) for x in (0.62049, 0.61951, 0.6194))
    lines = {"a": [near, low], "b": [same, Measured({}, 1)], "c": [low, Measured({}, 1)]}
    table = figures_table("t", ("x", "y"), lines)
    assert texts(table) == {"a": ["*62.0*", "61.9"], "b": ["*62.0*", "–"], "c": ["61.9", "–"]}


def test_base_to_new_tables(tmp_path: Path) -> None:
    def row(method: str, data: str, *halves: tuple[float, float | None] | None) -> Row:
        found = [
            None if pair is None else dict(zip(("base", "new"), pair, strict=True))
            for pair in halves
        ]
        return Row(method, data, found, protocol="base-to-new")

    (sheet,) = sheets(
        tmp_path,
        row("m", "a", (0.8, 0.4), (0.6, 0.6)),
        row("head", "a", (0.9, None), (0.9, None)),
        row("m", "b", (0.4, 0.4), (0.2, 0.2)),
        row("head", "b", (0.5, None), None),
    )
    on_a, on_b, over = accuracy_tables(sheet, NAMES)
    assert on_a.columns == ("method", "base", "new", "H")
    assert texts(on_a) == {
        "hand-written prompts": ["50.0", "*50.0*", "50.0"],
        "m": ["70.0 ± 14.1", "*50.0 ± 14.1*", "*56.7 ± 4.7*"],
        "head": ["*90.0 ± 0.0*", "–", "–"],
    }
    assert texts(on_b)["head"] == ["*50.0 (1 of 2)*", "–", "–"]
    # Seed 1: base (0.8 + 0.4)/2, new 0.4, H 0.48; seed 2: both 0.4. Mean 0.44, deviation 0.08/√2.
    assert texts(over)["m"] == ["50.0 ± 14.1", "40.0 ± 0.0", "44.0 ± 5.7"]
    assert texts(over)["head"] == ["*70.0 (1 of 2)*", "–", "–"]
    assert any("harmonic mean of the averages" in note for note in over.notes)
    assert not any("harmonic mean of the averages" in note for note in on_a.notes)


def test_transfers_are_tables_of_their_targets(tmp_path: Path) -> None:
    (sheet,) = sheets(
        tmp_path,
        Row("m", "source", ({"x": 0.4, "y": 0.8}, {"x": 0.6, "y": 0.8}), protocol="cross-data-set"),
    )
    (table,) = accuracy_tables(sheet, Names("t", {}, {"source": "Source", "x": "X"}, {}, {}))
    assert table.title == "Tuned on Source, 16 shots: accuracy, %"
    assert table.columns == ("method", "X", "y", "average")
    assert texts(table)["m"] == ["*50.0 ± 14.1*", "*80.0 ± 0.0*", "*65.0 ± 7.1*"]
    assert sheet.of_unit("m", "source", 16).mean == pytest.approx(0.65)


def test_costs_are_means_with_the_images_found_encoded_paid_for(tmp_path: Path) -> None:
    (sheet,) = sheets(tmp_path, Row("m", "a", (0.5, 0.6)), Row("none", "a", ("broke",)))
    (table,) = costs_tables(replace(sheet, images=ImagePass(0.025, None)))
    # 10 s of its own and 40 images of 25 ms.
    assert texts(table) == {"m": ["2", "100", "20", "1,200", "50", "11.0", "–", "1,000"]}
    assert any("25 ms" in note for note in table.notes)
    (free,) = costs_tables(sheet)
    assert texts(free)["m"][5] == "10.0"
    assert any("not recorded" in note for note in free.notes)
    measured = replace(OUTCOME, peak_memory_mb=200.0, needs="losses")
    (sheet,) = sheets(tmp_path / "more", Row("m", "a", (0.5,), outcome=measured))
    (alone,) = costs_tables(replace(sheet, images=ImagePass(0.025, 300.0)))
    assert texts(alone)["m"][6] == "300"  # of the process that encoded the images
    assert "m needs losses." in alone.notes


def test_costs_are_of_a_methods_most_shots_alone(tmp_path: Path) -> None:
    """Costs with other shots are in a table of their own."""
    dear = replace(OUTCOME, queries=900)
    rows = (
        Row("m", "a", (0.5,), shots=1), Row("m", "a", (0.5,), outcome=dear),
        Row("one shot", "a", (0.5,), shots=1), Row("dear", "b", (0.5,), outcome=dear),
    )  # fmt: skip
    (sheet,) = sheets(tmp_path / "some", *rows)

    def found() -> dict[str, dict[str, list[str]]]:
        tables = costs_tables(sheet)
        assert all(table.columns[:3] == ("method", "cells", "queries") for table in tables)
        return {t.title: {name: line[:2] for name, line in texts(t).items()} for t in tables}

    assert found() == {
        "Costs of a cell, 16 shots": {"m": ["1", "900"], "dear": ["1", "900"]},
        "Costs of a cell, 1 shot": {"one shot": ["1", "100"]},
    }
    (sheet,) = sheets(tmp_path / "partly", *rows[::2], Row("m", "a", (None,)))
    assert found() == {
        "Costs of a cell, 1 shot": {"m": ["1", "100"], "one shot": ["1", "100"]},
    }
    (sheet,) = sheets(tmp_path / "none", Row("m", "a", (None,)))
    assert found() == {}


def test_wins_ties_losses_and_ranks(tmp_path: Path) -> None:
    found = sheets(
        tmp_path,
        # 0.6 against 0.6004 reads the same, so it is a tie; "c" is below both.
        Row("a", "x", (0.6, 0.6)), Row("b", "x", (0.6004, 0.6004)), Row("c", "x", (0.5, 0.5)),
        # 40.0 ± 42.4 against 60.0 (1 of 2): "b" is the better one in the table; "c" is above both.
        Row("a", "y", (0.7, 0.1)), Row("b", "y", (0.6, None)), Row("c", "y", (0.9, 0.9)),
        # "c" has nothing here: the unit is not shared.
        Row("a", "z", (0.2, 0.2)), Row("b", "z", (0.4, 0.4)), Row("c", "z", ("broke", None)),
        Row("failed", "z", ("broke", "broke")),
    )  # fmt: skip
    ranking = rank_methods(units_of(found))
    assert ranking.methods == ("a", "b", "c")
    assert ranking.records["a", "b"] == Record(0, 1, 2)
    assert ranking.records["b", "a"] == Record(2, 1, 0)
    assert ranking.records["c", "a"] == Record(1, 0, 1)
    assert ranking.n_shared == 2
    # x: 1.5, 1.5, 3; y: 3, 2, 1.
    assert ranking.ranks == {"a": 2.25, "b": 1.75, "c": 2.0}
    table = ranking_table(ranking)
    assert table is not None
    assert texts(table)["a"] == ["·", "0 / 1 / 2", "1 / 0 / 1", "2.25"]
    assert texts(table)["b"][-1] == "*1.75*"
    (note,) = table.notes
    assert "mean over 2 combinations of data set and shots that all methods have." in note


@pytest.mark.parametrize("other", [0.6494, 0.6504, 0.65049, 0.6505, 0.651, 0.6515])
def test_bold_and_wins_agree(other: float, tmp_path: Path) -> None:
    """Means are equal for both if they read the same, and only then."""
    found = sheets(tmp_path, Row("a", "x", (0.65,)), Row("b", "x", (other,)))
    bold = texts(accuracy_tables(found[0], NAMES)[0])
    a, b = (bold[name][0] for name in ("a", "b"))
    record = rank_methods(units_of(found)).records["a", "b"]
    assert record == Record(b[0] != "*", a == b, a[0] != "*")
    ranking = ranking_table(Ranking(("a", "b"), {("a", "b"): record, ("b", "a"): record}, 3,
                                    {"a": 1.001, "b": 1.002}))  # fmt: skip
    assert ranking is not None
    assert [line[-1] for line in texts(ranking).values()] == ["*1.00*"] * 2


def test_units_of_other_protocols_and_models_are_never_mixed(tmp_path: Path) -> None:
    halves = {"base": 0.5, "new": 0.5}
    found = sheets(
        tmp_path,
        Row("a", "x", (0.6,)), Row("b", "x", (0.5,), model="other"),
        Row("b", "x", (halves,), protocol="base-to-new"),
    )  # fmt: skip
    assert [(sheet.protocol, sheet.model) for sheet in found] == [
        ("few-shot", "clip"), ("few-shot", "other"), ("base-to-new", "clip"),
    ]  # fmt: skip
    ranking = rank_methods(units_of(found))
    assert ranking.records["a", "b"] == Record(0, 0, 0)
    assert ranking.ranks == {"a": None, "b": None}


def test_calibration_is_pooled_over_data_sets_and_seeds(tmp_path: Path) -> None:
    results = store_of(tmp_path, [Row("zip", "d", [0.5, 0.7]), Row("gda", "d", [0.5])])
    (sheet,) = sheets_of(results.view(PLAN).results)
    assert calibration_table(sheet) is None  # results of a version that did not measure it
    bins = [(Bin(7, 100, 0.5, 0.4),), (Bin(7, 50, 0.5, 0.6), Bin(14, 50, 1.0, 0.8))]

    def measured(result: Result) -> Result:
        if result.outcome is None or result.cell.method != "zip":
            return result
        (one,) = result.outcome.scores
        seed = result.cell.seed
        scores = (replace(one, nll=seed / 10, brier=seed / 5, reliability=bins[seed - 1]),)
        return replace(result, outcome=replace(result.outcome, scores=scores))

    own = replace(sheet, results=tuple(map(measured, sheet.results)))
    table = calibration_table(own)
    assert table is not None
    # |100 · −0.1 + 50 · 0.1| + |50 · −0.2| of 200 images.
    assert [[word.text for word in row] for row in table.rows] == [["zip", "7.5", "0.150", "0.300"]]

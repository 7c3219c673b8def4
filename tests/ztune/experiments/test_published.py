"""Figures of papers: the data file's form, and the measured ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.ztune.experiments.bench_results import PLAN, Row, store_of
from ztune.data.named import NAMED
from ztune.errors import ConfigError, FormatError
from ztune.experiments.literature import matched_table, pairs_of, unmatched_table
from ztune.experiments.published import AVERAGE, AVERAGED, Published, published, published_in
from ztune.experiments.summary import Names, Sheet, sheets_of
from ztune.methods.registry import METHODS

KNOWN = {name: name for name in AVERAGED}
NAMES = Names("a title", {"mine": "zip"}, {}, KNOWN, {})
GOOD = """
protocol = "few-shot"
model = "ViT-B/16"
shots = 16
[[series]]
method = "zip"
title = "ZIP"
paper = "ZIP, ICLR 2025"
arxiv = "2504.06838"
origin = "a table"
queries = 5000
accuracy = { dtd = 47.8, "average of 11" = 60.0 }
"""
PRINTED = {
    "zero-shot CLIP": ("2103.00020", "", {AVERAGE: 65.4}),
    "ZIP, re-run": ("2504.06838", "", {AVERAGE: 71.0}),
    "BBT": ("2201.03514", "", {AVERAGE: 72.4}),
    "SharpZO": ("2506.20990", "20,000 steps", {
        AVERAGE: 75.6, "imagenet": 71.6, "oxfordpets": 94.1, "flowers102": 88.0,
        "fgvcaircraft": 32.3, "dtd": 64.0, "eurosat": 79.4, "stanfordcars": 72.5, "food101": 87.1,
        "sun397": 70.9, "caltech101": 95.1, "ucf101": 77.1,
    }),
    "Tip-Adapter": ("2207.09519", "", {AVERAGE: 76.4}),
    "linear probe": ("2103.00020", "", {AVERAGE: 78.4}),
    "CoOp, with gradients": ("2109.01134", "", {AVERAGE: 79.0}),
    "LP++": ("2404.02285", "", {AVERAGE: 80.3}),
    "GDA": ("2402.04087", "", {AVERAGE: 81.7}),
    "ProKeR": ("2501.11175", "", {AVERAGE: 82.0}),
    "ZIP": ("2504.06838", "5,000 queries", {
        "caltech101": 94.0, "flowers102": 70.4, "food101": 86.4, "fgvcaircraft": 26.8,
        "sun397": 63.3, "dtd": 47.8, "eurosat": 64.6, "ucf101": 69.8, "imagenet": 66.2,
    }),
}  # fmt: skip
"""What the papers print, written down once more: number at arXiv, budget and accuracies."""


def test_every_figure_is_a_percentage_with_known_names_and_a_source() -> None:
    figures = published()
    assert len({(f.title, f.data) for f in figures}) == len(figures) > 0
    for figure in figures:
        assert 0 < figure.accuracy < 100
        assert figure.method is None or figure.method in METHODS
        assert figure.data == AVERAGE or figure.data in NAMED
        assert figure.origin
        assert "arXiv" in figure.paper
        assert (figure.protocol, figure.model, figure.shots) == ("few-shot", "ViT-B/16", 16)


def test_the_file_says_what_the_papers_print_to_the_digit() -> None:
    found = {
        (f.title, f.paper[f.paper.index("(arXiv") :], f.budget, f.data, f.accuracy)
        for f in published()
    }
    assert found == {
        (title, f"(arXiv {number})", budget, data, accuracy)
        for title, (number, budget, accuracies) in PRINTED.items()
        for data, accuracy in accuracies.items()
    }


def test_an_average_agrees_with_the_figures_it_is_of() -> None:
    own = {f.data: f.accuracy for f in published() if f.title == "SharpZO"}
    mean = sum(own[name] for name in AVERAGED) / 11
    assert mean == pytest.approx(own[AVERAGE], abs=0.1)


def test_coops_data_sets_are_eleven_known_ones() -> None:
    assert len(set(AVERAGED)) == 11
    assert set(AVERAGED) <= set(NAMED)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("47.8", "147.8", r"\$\.series\[0\]\.accuracy\[\.\.\.\]: expected float <= 100"),
        ("dtd =", "dtdd =", 'unknown data set "dtdd"'),
        ('method = "zip"', 'method = "zipp"', "zipp"),
        (
            'arxiv = "2504.06838"',
            'arxiv = "25"',
            r"\$\.series\[0\]\.arxiv: expected str matching .*, got .25.",
        ),
        ("queries = 5000", "queries = 5000\nsteps = 2", "not both"),
        ("queries = 5000", "query = 5000", 'unknown key "query".*known: method, title'),
        ('origin = "a table"', "", "origin"),
        ("shots = 16", "shots = 0", "shots"),
    ],
)
def test_a_wrong_entry_is_named(old: str, new: str, says: str) -> None:
    assert len(published_in(GOOD)) == 2
    assert old in GOOD
    with pytest.raises(FormatError, match=says):
        published_in(GOOD.replace(old, new))


def test_what_is_no_toml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"published\.toml"):
        published_in("[[series")


def figure(data: str, accuracy: float, method: str | None = "zip") -> Published:
    return Published(
        method, "ZIP", "ZIP, 2025 (arXiv 1)", "a table", "few-shot", "B", 16, "5 queries",
        data, accuracy,
    )  # fmt: skip


def sheets(folder: Path, *rows: Row) -> list[Sheet]:
    return sheets_of(store_of(folder, rows).view(PLAN).results)


def test_measured_and_published_figures_with_their_difference(tmp_path: Path) -> None:
    found = sheets(
        tmp_path,
        Row("mine", "dtd", (0.40, 0.50)),
        Row("mine", "eurosat", (0.9,), shots=8),
        Row("mine", "ucf101", ("broke",)),
        Row("other", "flowers102", (0.9,)),
    )
    names = replace(NAMES, uses={"mine": "zip", "other": "spsa"})
    theirs = [figure("dtd", 47.8), figure("eurosat", 64.6), figure("ucf101", 69.8)]
    theirs.append(figure("flowers102", 70.4))
    (pair,) = pairs_of(theirs, found, names)
    assert (pair.published.data, pair.label, pair.model, pair.queries) == (
        "dtd",
        "mine",
        "clip",
        100,
    )
    assert pair.difference == pytest.approx(-2.8)
    table = matched_table([pair])
    assert table is not None
    assert [word.text for word in table.rows[0]] == [
        "mine", "DTD", "ZIP, 2025 (arXiv 1)", "47.8", "B", "5 queries", "45.0 ± 7.1", "clip",
        "100", "−2.8",
    ]  # fmt: skip
    assert "not due to the method alone" in table.notes[0]
    left = unmatched_table(theirs, [pair])
    assert left is not None
    assert left.columns == ("paper", "model", "budget", "Flowers102", "EuroSAT", "UCF101")
    assert [word.text for word in left.rows[0][3:]] == ["70.4", "64.6", "69.8"]


def test_an_average_is_compared_only_where_all_eleven_are_there(tmp_path: Path) -> None:
    rows = [Row("mine", name, (0.1 * (k % 2),)) for k, name in enumerate(AVERAGED)]
    theirs = [figure(AVERAGE, 40.0)]
    (pair,) = pairs_of(theirs, sheets(tmp_path / "all", *rows), NAMES)
    assert pair.measured.mean == pytest.approx(0.5 / 11)
    assert pairs_of(theirs, sheets(tmp_path / "ten", *rows[1:]), NAMES) == []


def test_templates_are_compared_with_zero_shot_whatever_the_method(tmp_path: Path) -> None:
    found = sheets(tmp_path, Row("mine", "dtd", (0.9, 0.8), zero_shot=0.44))
    (pair,) = pairs_of([figure("dtd", 40.0, "zero-shot")], found, NAMES)
    assert pair.difference == pytest.approx(4.0)
    table = matched_table([pair])
    assert table is not None
    assert [word.text for word in table.rows[0][6:]] == ["44.0", "clip", "–", "+4.0"]


def test_a_method_that_we_lack_is_listed_without_ours(tmp_path: Path) -> None:
    found = sheets(tmp_path, Row("mine", "dtd", (0.9,)))
    theirs = [figure("dtd", 79.0, None)]
    assert pairs_of(theirs, found, NAMES) == []
    assert matched_table([]) is None
    assert unmatched_table([], []) is None
    assert unmatched_table(theirs, []) is not None


def test_a_data_set_that_is_only_called_like_a_known_one_is_not_paired(tmp_path: Path) -> None:
    found = sheets(tmp_path, Row("mine", "dtd", (0.9,)), Row("mine", "photos", (0.4,)))
    names = replace(NAMES, data={"photos": "DTD"}, known_as={})
    assert pairs_of([figure("dtd", 47.8)], found, names) == []
    (pair,) = pairs_of([figure("dtd", 47.8)], found, replace(names, known_as={"photos": "dtd"}))
    assert pair.measured.mean == 0.4

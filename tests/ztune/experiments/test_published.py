"""Figures of papers: the data file's form, and the measured ones."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ztune.experiments.bench_results import PLAN, Row, store_of
from ztune.data.coop import CoopSplit, Item
from ztune.data.library import NamedData
from ztune.data.named import NAMED
from ztune.errors import ConfigError, FormatError
from ztune.experiments.literature import (
    IMAGENET_CLASSES,
    matched_table,
    pairs_of,
    unmatched_table,
)
from ztune.experiments.published import AVERAGE, AVERAGED, Published, published, published_in
from ztune.experiments.summary import Names, Sheet, sheets_of
from ztune.methods.registry import METHODS

KNOWN = {name: name for name in AVERAGED}
NAMES = Names("a title", {"mine": "zip"}, {}, KNOWN, {})
GOOD = """
protocol = "few-shot"
model = "ViT-B/16"
shots = 16
[sources.one]
paper = "A paper, 2024"
arxiv = "2401.00001"
table = "Table 3"
[[series]]
method = "zip"
title = "ZIP"
paper = "ZIP, ICLR 2025"
arxiv = "2504.06838"
source = "one"
queries = 5000
accuracy = { dtd = 47.8, "average of 11" = 60.0 }
"""
COLUMNS = (
    "imagenet", "oxfordpets", "flowers102", "fgvcaircraft", "dtd", "eurosat", "stanfordcars",
    "food101", "sun397", "caltech101", "ucf101", AVERAGE,
)  # fmt: skip
"""Of SharpZO's Table 1, in its order."""
SHARPZO = {
    ("ZS-CLIP", ""): "66.73 89.21 71.34 24.72 44.39 47.6 65.32 86.06 62.5 92.94 66.75 65.23",
    ("BBT", ""): "70.15 92.7 82.41 29.49 59.26 70.48 70.19 86.42 70.33 94.75 70.48 72.42",
    ("ZIP", "5,000 queries"): "66.2 - 70.4 26.8 47.8 64.6 - 86.4 63.3 94 69.8 -",
    ("ZIP, re-run", "20,000 steps"):
        "68.35 93.18 73 28.32 54.26 74.19 67.58 87.01 67.43 94.97 72.51 70.98",
    ("SharpZO", "20,000 steps"):
        "71.6 94.06 88.02 32.34 63.95 79.42 72.5 87.13 70.86 95.09 77.08 75.64",
}  # fmt: skip
"""Its rows for ViT-B/16, written down once more, by title and budget; a dash: left out."""
CLIP_SVD = {
    "zero-shot CLIP": 65.36, "Tip-Adapter": 76.44, "linear probe": 78.39,
    "CoOp, with gradients": 79.01, "LP++": 80.32, "GDA": 81.70, "ProKeR": 82.01,
}  # fmt: skip
"""Averages with 16 shots in CLIP-SVD's table."""


def test_every_figure_is_a_percentage_with_known_names_and_a_source() -> None:
    figures = published()
    assert len({(f.title, f.data) for f in figures}) == len(figures) > 0
    for figure in figures:
        assert 0 < figure.accuracy < 100
        assert figure.method is None or figure.method in METHODS
        assert figure.data == AVERAGE or figure.data in NAMED
        assert "arXiv" in figure.paper
        assert (figure.protocol, figure.model, figure.shots) == ("few-shot", "ViT-B/16", 16)


def test_every_figure_has_the_table_that_prints_it() -> None:
    for figure in published():
        assert re.fullmatch(r".+ \(arXiv \d{4}\.\d{5}\), [Tt]able \S.*", figure.source), figure


def test_the_file_says_what_the_tables_print_to_the_digit() -> None:
    in_sharpzo = {
        ("SharpZO, NeurIPS 2025 (arXiv 2506.20990), Table 1", *row, data, float(accuracy))
        for row, accuracies in SHARPZO.items()
        for data, accuracy in zip(COLUMNS, accuracies.split(), strict=True)
        if accuracy != "-"
    }
    table = "table Natural Few-shot Evaluation in the README of github.com/HealthX-Lab/CLIP-SVD"
    in_clip_svd = {
        (f"CLIP-SVD, 2025 (arXiv 2509.03740), {table}", title, "", AVERAGE, accuracy)
        for title, accuracy in CLIP_SVD.items()
    }
    found = {(f.source, f.title, f.budget, f.data, f.accuracy) for f in published()}
    assert found == in_sharpzo | in_clip_svd


@pytest.mark.parametrize("title", ["ZS-CLIP", "BBT", "ZIP, re-run", "SharpZO"])
def test_an_average_agrees_with_the_figures_it_is_of(title: str) -> None:
    own = {f.data: f.accuracy for f in published() if f.title == title}
    mean = sum(own[name] for name in AVERAGED) / 11
    assert mean == pytest.approx(own[AVERAGE], abs=0.006)


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
        ('source = "one"', "", "source"),
        ('source = "one"', 'source = "two"', 'unknown source "two"'),
        ('table = "Table 3"', "", "table"),
        ('table = "Table 3"', 'table = "somewhere"', r"\$\.sources\[\.\.\.\]\.table"),
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
        method, "ZIP", "ZIP, 2025 (arXiv 1)", "A (arXiv 2), Table 3", "few-shot", "B", 16,
        "5 queries", data, accuracy,
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
    assert table.notes[1:] == ("ZIP: A (arXiv 2), Table 3.",)
    left = unmatched_table(theirs, [pair])
    assert left is not None
    assert left.notes == ("ZIP: A (arXiv 2), Table 3.",)
    assert left.columns == ("paper", "model", "budget", "Flowers102", "EuroSAT", "UCF101")
    assert [word.text for word in left.rows[0][3:]] == ["70.4", "64.6", "69.8"]


def test_an_average_is_compared_only_where_all_eleven_are_there(tmp_path: Path) -> None:
    rows = [Row("mine", name, (0.1 * (k % 2),)) for k, name in enumerate(AVERAGED)]
    theirs = [figure(AVERAGE, 40.0)]
    (pair,) = pairs_of(theirs, sheets(tmp_path / "all", *rows), NAMES)
    assert pair.measured.mean == pytest.approx(0.5 / 11)
    table = matched_table([pair])
    assert table is not None
    assert table.notes[1].startswith("ImageNet is measured over 998 classes")
    assert pairs_of(theirs, sheets(tmp_path / "ten", *rows[1:]), NAMES) == []


def test_imagenet_has_fewer_names_than_labels(tmp_path: Path) -> None:
    """The names are OpenAI's, which CoOp's classnames.txt lists too."""
    names = pytest.importorskip("open_clip").IMAGENET_CLASSNAMES
    items = tuple(Item(f"{n}.jpg", n, name) for n, name in enumerate(names))
    data = NamedData(NAMED["imagenet"], tmp_path, CoopSplit(items), None)
    assert (len(data.classes), len(data.dataset().classes)) == (1000, IMAGENET_CLASSES)
    assert [name for name, n in Counter(names).items() if n > 1] == ["missile", "sunglasses"]
    (pair,) = pairs_of(
        [figure("imagenet", 66.2)], sheets(tmp_path, Row("mine", "imagenet", (0.7,))), NAMES
    )
    table = matched_table([pair])
    assert table is not None
    assert f"{IMAGENET_CLASSES} classes" in table.notes[1]


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

"""The report's files: whole for whatever is there, and what a program or LaTeX reads of them."""

import csv
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from tests.ztune.experiments.bench_results import OUTCOME, PLAN, Row, curve, digest_of, store_of
from ztune.experiments import figures
from ztune.experiments.cells import key_of
from ztune.experiments.figures import styles_of
from ztune.experiments.plan_document import DataDocument
from ztune.experiments.render import (
    as_csv,
    as_latex,
    as_markdown,
    code_in_markdown,
    in_latex,
    in_markdown,
)
from ztune.experiments.report import write_report
from ztune.experiments.summary import Names
from ztune.experiments.tables import Table, Word
from ztune.io.config import as_json
from ztune.methods.registry import METHODS
from ztune.report_compare import N_COLOURS, N_LOOKS, Level, Line, level_style, line_style

HALVES = {"base": 0.8, "new": 0.4}
MIXED = (
    Row("zip", "dtd", (0.4, 0.5, None)),
    Row("gda", "dtd", (0.6, "ran | out of\nmemory", "ran | out of\nmemory")),
    Row("zip", "dtd", (HALVES,), protocol="base-to-new"),
    Row("gda", "dtd", ({"base": 0.9, "new": None},), protocol="base-to-new"),
    Row("zip", "dtd", ({"x": 0.3, "y": 0.5},), protocol="out-of-distribution"),
)


def report(folder: Path, rows: Sequence[Row], **plan: Any) -> tuple[str, list[Path]]:
    """Return report.md and all files."""
    files = write_report(store_of(folder, rows, **plan).view(PLAN), folder / "report")
    assert files[0] == folder / "report" / "report.md"
    assert all(path.is_file() for path in files)
    return files[0].read_text(), files


def table_rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_missing_and_what_failed_is_said(tmp_path: Path) -> None:
    text, _ = report(tmp_path, MIXED)
    assert "6 of 9 cells finished, 2 failed, 1 cell not run yet." in text
    assert "| zip | 45.0 ± 7.1 (2 of 3) |" in text
    assert "| gda | **60.0 (1 of 3)** |" in text
    assert "few-shot, clip, dtd, gda, 16 shots (seeds 2, 3): ran | out of memory" in text
    assert "\n- 1 cell not run yet.\n" in text
    for heading in ("few-shot, clip", "base-to-new, clip", "out-of-distribution, clip"):
        assert f"\n## {heading}\n" in text


def test_what_is_unusual_about_the_data_is_said_first(tmp_path: Path) -> None:
    said = ("2 test images\nequal <tuned> ones", "# x has *few* images")
    store = store_of(tmp_path, MIXED, remarks={"dtd": said})
    view = store.view(PLAN)
    text = write_report(view, tmp_path / "report")[0].read_text()
    assert (
        "not run yet.\n\n## Data\n\n"
        "- dtd: 2 test images equal \\<tuned> ones\n"
        "- dtd: # x has \\*few\\* images\n\n## few-shot, clip\n"
    ) in text
    # There may be copies among them.
    assert "nothing was tuned on" not in text
    nothing: tuple[dict[str, DataDocument], ...] = ({"dtd": DataDocument("DTD")}, {})
    for data in nothing:
        document = structs.replace(view.document, data=data)
        text = write_report(replace(view, document=document), tmp_path / "report")[0].read_text()
        assert "## Data" not in text


def test_equal_sessions_are_listed_once(tmp_path: Path) -> None:
    store = store_of(tmp_path, MIXED)
    view = store.view(PLAN)
    first = view.sessions[1]
    alike_too = store.begin_session({**first, "began": "2026-02-04T00:00:00"})
    other = store.begin_session(
        {"began": "2026-02-05T00:00:00", "commit": None, "command": "a `b`"}
    )
    store.begin_session({**first, "began": "2026-02-06T00:00:00"})  # found nothing to do
    cells = [result.cell for result in view.results[:3]]
    store.set_plan(PLAN, {"title": "less"}, dict(zip(cells, "klm", strict=True)))
    for cell, key, session in zip(cells, "klm", (1, alike_too, other), strict=True):
        store.finish(key, cell, OUTCOME, session)
    text = write_report(store.view(PLAN), tmp_path / "report")[0].read_text()
    lines = text[text.index("## Environment") :].splitlines()
    assert "- Left out: 6 results of no plan." in lines
    (alike,) = [line for line in lines if "2026-02-03" in line]
    assert alike.startswith("- 2026-02-03T04:05:06, 2026-02-04T00:00:00 (2 cells of this report)")
    for words in (
        "`ztune bench plan.toml --out out`", "2 workers (process)", "provider cpu",
        "commit 0123abc", "processor a processor, cores 4", "ztune 0.1.0, numpy 2.0",
    ):  # fmt: skip
        assert words in alike
    assert any(line.endswith(": `` a `b` ``.") and "2026-02-05" in line for line in lines)
    assert not any("2026-02-06" in line for line in lines)


def test_a_report_of_nothing_yet_is_a_report(tmp_path: Path) -> None:
    text, files = report(tmp_path, [Row("zip", "dtd", (None, "broke"))])
    assert "0 of 2 cells finished, 1 failed, 1 cell not run yet." in text
    assert "No finished cell." in text
    assert {path.name for path in files} == {"report.md", "tables.csv", "cells.csv", "tables.tex"}
    assert [row["status"] for row in table_rows(tmp_path, "cells.csv")] == ["missing", "failed"]
    assert table_rows(tmp_path, "tables.csv") == []


def test_a_report_is_of_one_plan(tmp_path: Path) -> None:
    store = store_of(tmp_path, MIXED)
    cell = store.view(PLAN).results[-1].cell
    key = key_of(as_json(cell))
    # Two cells may be the same but for what the plan calls them, and share a result.
    store.set_plan("other", {"title": "other"}, {cell: key, replace(cell, method="again"): key})
    text = write_report(store.view("other"), tmp_path / "report")[0].read_text()
    assert text.startswith("# other\n\n2 of 2 cells finished.\n")
    assert "Left out" not in text
    assert [row["method"] for row in table_rows(tmp_path, "cells.csv")] == ["zip", "again"]


def test_one_thing_is_no_plural(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tracked(monkeypatch)
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.8))
    rows = [Row(name, "dtd", (0.5,), shots=1, outcome=steps) for name in ("zip", "gda")]
    text, _ = report(tmp_path, [*rows, Row("zip", "dtd", ("broke",), protocol="base-to-new")])
    assert "mean over 1 combination of data set and shots that all methods" in text
    said = text + (tmp_path / "report" / "tables.tex").read_text()
    said += "".join(title for _, _, _, title in drawn.values())
    assert not re.findall(r"(?<![\d.,–-])1 (?:shot|cell|seed|set|data set|combination)s\b", said)


def test_published_figures_are_compared(tmp_path: Path) -> None:
    text, _ = report(tmp_path, [Row("mine", "Textures", (0.5,))], uses={"mine": "zip"},
                     known_as={"Textures": "dtd"})  # fmt: skip
    published = text[text.index("## Published figures") :]
    ours = next(line for line in published.splitlines() if line.startswith("| mine | DTD |"))
    assert "| 47.8 | ViT-B/16 | 5,000 queries | 50.0 | clip | 100 | +2.2 |" in ours
    assert "CoOp, with gradients" in published


def test_tables_csv_has_a_row_per_part(tmp_path: Path) -> None:
    store = store_of(tmp_path, MIXED, uses={"zip": "zip", "gda": "gda"})
    store.add_pass(digest_of("clip"), 100, 2.5)
    write_report(store.view(PLAN), tmp_path / "report")
    rows = table_rows(tmp_path, "tables.csv")
    assert [(row["protocol"], row["method"], row["part"]) for row in rows] == [
        ("few-shot", "zip", "test"), ("few-shot", "gda", "test"),
        ("base-to-new", "zip", "base"), ("base-to-new", "zip", "new"),
        ("base-to-new", "zip", "harmonic mean"),
        ("base-to-new", "gda", "base"), ("base-to-new", "gda", "new"),
        ("base-to-new", "gda", "harmonic mean"),
        ("out-of-distribution", "zip", "x"), ("out-of-distribution", "zip", "y"),
    ]  # fmt: skip
    first = rows[0]
    assert (first["n_seeds"], first["n_seeds_wanted"], first["shots"]) == ("2", "3", "16")
    assert float(first["accuracy_mean"]) == pytest.approx(0.45)
    assert float(first["accuracy_sd"]) == pytest.approx(0.1 / 2**0.5)
    assert float(first["class_accuracy_mean"]) == pytest.approx(0.35)
    assert float(first["zero_shot_mean"]) == 0.5
    assert float(first["queries_mean"]) == 100
    assert float(first["seconds_mean"]) == pytest.approx(10 + 40 * 0.025)
    assert float(rows[4]["accuracy_mean"]) == pytest.approx(0.64 / 1.2)
    assert rows[6]["accuracy_mean"] == ""


def test_what_encoding_takes_is_found_by_the_bundle_of_a_model(tmp_path: Path) -> None:
    store = store_of(tmp_path, [Row("zip", "dtd", (0.5,), model=one) for one in ("clip", "other")])
    store.add_pass(digest_of("clip"), 100, 2.5)
    store.add_pass("other", 100, 2.5)  # a bundle of another plan, whatever it is called here
    write_report(store.view(PLAN), tmp_path / "report")
    seconds = {row["model"]: row["seconds_alone"] for row in table_rows(tmp_path, "cells.csv")}
    assert seconds == {"clip": "11.0", "other": "10.0"}


def test_cells_csv_has_a_row_per_cell(tmp_path: Path) -> None:
    report(tmp_path, MIXED)
    rows = table_rows(tmp_path, "cells.csv")
    assert len(rows) == 9
    assert [row["status"] for row in rows[:5]] == [
        "finished", "finished", "missing", "finished", "failed",
    ]  # fmt: skip
    assert rows[4]["reason"] == "ran | out of\nmemory"
    assert (rows[0]["test accuracy"], rows[0]["base accuracy"]) == ("0.4", "")
    assert (rows[6]["base accuracy"], rows[6]["new accuracy"]) == ("0.8", "0.4")
    assert rows[0]["config"] == '{"n_context": 8}'
    assert rows[0]["text_forwards"] == "1200"


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ('=HYPERLINK("http://x","y")', '\'=HYPERLINK("http://x","y")'),
        ("+1+1", "'+1+1"),
        ("-1+1", "'-1+1"),
        ("-0.3 ± 0.1", "'-0.3 ± 0.1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "'  =1"),
        ("\u00a0=1", "'\u00a0=1"),
        ("\t=1", r"'\t=1"),
        ("\ra", r"'\ra"),
        ("\n=1", "'\n=1"),
        ("＝1+1", "'＝1+1"),
        ("a=1", "a=1"),
        ("a\nb", "a\nb"),
        ("it's", "it's"),
        ("-1.5", "-1.5"),
        ("+1e-3", "+1e-3"),
        (-1.5, "-1.5"),
        (-2, "-2"),
        (None, ""),
        ("a\x1b[2J", r"a\x1b[2J"),
        ("https://me:s3cr3t@host/x", "https://***@host/x"),
    ],
)
def test_no_cell_of_a_csv_is_a_formula(cell: object, written: str) -> None:
    text = as_csv(("name", "=head"), [{"name": cell}])
    assert list(csv.reader(text.splitlines(keepends=True))) == [["name", "'=head"], [written, ""]]


def test_names_in_a_report_have_no_effect(tmp_path: Path) -> None:
    name = "\x1b[2J\u202e|`<script>\n# x"
    report(tmp_path, [Row("=1+1", name, (0.5, "\x1b[31m"))], title=name, data={name: name})
    texts = {path.name: path.read_text() for path in (tmp_path / "report").glob("*.[mtc]*")}
    assert len(texts) == 4
    for text in texts.values():
        assert [sign for sign in text if not sign.isprintable() and sign != "\n"] == []
    shown = r"\\x1b\[2J\\u202e|\`\<script> # x"
    assert texts["report.md"].startswith(f"# {shown}\n")
    assert "\n# x" not in texts["report.md"]
    assert r"\textbackslash{}x1b{[}2J\textbackslash{}u202e\textbar{}" in texts["tables.tex"]
    assert [row["method"] for row in table_rows(tmp_path, "cells.csv")] == ["'=1+1"] * 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a b", "`a b`"),
        ("a `b`", "`` a `b` ``"),
        ("``\n<b>\x1b", r"``` `` <b>\x1b ```"),
    ],
)
def test_code_in_markdown_is_one_span(text: str, code: str) -> None:
    assert code_in_markdown(text) == code


NASTY = Table(
    r"50% of $x$ & y_z #1 {a} \b ~c ^d",
    ("method", "a_b & c%"),
    ((Word(r"[x]*\_{}"), Word("62.0 ± 2.0", bold=True)), (Word("a|b`c"), Word("–"))),
    ("a note\nof two lines",),
)


def test_latex_is_escaped_and_as_wide_as_it_says(tmp_path: Path) -> None:
    lines = as_latex(NASTY, "head")
    assert lines[:2] == [f"% head: {NASTY.title}", "% a note of two lines"]
    assert lines[2] == r"\begin{tabular}{lr}"
    assert lines[4] == r"method & a\_b \& c\% \\"
    assert lines[6] == r"{[}x]{*}\textbackslash{}\_\{\} & \textbf{62.0 $\pm$ 2.0} \\"
    assert lines[7] == r"a\textbar{}b`c & -- \\"
    report(tmp_path, MIXED, title="50% & more")
    text = (tmp_path / "report" / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == 7
    for width, body in re.findall(r"\{tabular\}\{(\w+)\}(.*?)\\bottomrule", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(width) - 1}


def test_the_head_of_the_latex_says_what_it_needs(tmp_path: Path) -> None:
    report(tmp_path, MIXED)
    text = (tmp_path / "report" / "tables.tex").read_text()
    head, _, body = text.partition("\n\n")
    assert all(line.startswith("% ") for line in head.splitlines())
    assert r"\usepackage{booktabs}" in head
    assert r"\input" not in head
    assert body.startswith("% few-shot, clip: ")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("é ± ß ł –", r"é $\pm$ ß ł --"),
        ("e\u0301 n\u0303", "é ñ"),  # as macOS has names of files
        ("x_y{z}^~", r"x\_y\{z\}\textasciicircum{}\textasciitilde{}"),
    ],
)
def test_latin_letters_are_what_latex_has(text: str, written: str) -> None:
    assert in_latex(text) == written


def test_markdown_shows_names_as_they_are() -> None:
    lines = as_markdown(NASTY, 3)
    assert lines[0] == r"### 50% of \$x\$ \& y_z #1 {a} \\b \~c ^d"
    assert lines[4] == r"| \[x]\*\\\_{} | **62.0 ± 2.0** |"
    assert lines[5] == r"| a\|b\`c | – |"
    assert lines[7] == "- a note of two lines"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("_b_ and __b__", r"\_b\_ and \_\_b\_\_"),
        ("sharpzo_long_é_1", "sharpzo_long_é_1"),
        ("a_(b)_c", r"a\_(b)\_c"),
        ("&amp; ~~x~~ $x$ <b>", r"\&amp; \~\~x\~\~ \$x\$ \<b>"),
        ("## a - b # c > d", r"\## a - b # c > d"),
        ("-a +2.2", "-a +2.2"),
    ],
)
def test_markdown_of_a_text_shows_it(text: str, written: str) -> None:
    assert in_markdown(text) == written


def tracked(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Return what the plots are drawn of, by file name, in place of drawing them."""
    drawn: dict[str, tuple[Any, ...]] = {}

    def note(*arguments: Any) -> None:
        *rest, path = arguments
        drawn[path.name] = tuple(rest)
        path.write_bytes(b"")

    monkeypatch.setattr(figures, "draw_accuracy_against_cost", note)
    monkeypatch.setattr(figures, "draw_over_shots", note)
    return drawn


def test_accuracy_is_drawn_against_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = tracked(monkeypatch)
    steps = curve((0, 0.0, 0.1), (10, 2.0, 0.2), (100, None, 0.6))
    store = store_of(
        tmp_path,
        [
            Row("zip", "dtd", (0.1,), shots=1, outcome=steps),
            Row("zip", "dtd", (0.6, 0.7), outcome=steps),
            Row("gda", "dtd", (0.7,), outcome=replace(OUTCOME, queries=0)),
        ],
    )
    store.add_pass(digest_of("clip"), 10, 1.0)
    files = write_report(store.view(PLAN), tmp_path / "report")
    assert [path.name for path in files[4:]] == [
        "accuracy-shots.png", "accuracy-queries.png", "accuracy-seconds.png",
    ]  # fmt: skip
    cost, lines, levels, title = drawn["accuracy-queries.png"]
    (line,) = lines
    assert isinstance(line, Line)
    assert cost == "queries"
    assert (line.cost.tolist(), line.mean.tolist()) == ([10, 100], [0.2, 0.6])
    assert line.accuracy == pytest.approx(0.65)  # as in the table
    place = list(METHODS).index("gda")
    assert levels == [Level("gda", place, 0.7), Level("hand-written prompts", None, 0.5)]
    assert title == "dtd on clip, 16 shots, mean of 2 seeds (band: lowest to highest)"
    _, (line,), levels, _ = drawn["accuracy-seconds.png"]
    # 40 images found encoded at 0.1 s each; the result's own time is the cell's 10 s.
    np.testing.assert_allclose(line.cost, [4, 6, 14])
    assert levels[0] == Level("gda", place, 0.7, 14.0)


def test_accuracy_over_shots_is_drawn_by_model_and_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = tracked(monkeypatch)
    rows = [
        Row("zip", data, (accuracy, accuracy + 0.2), shots=shots, model=model)
        for model in ("a/b", "c") for data, shots, accuracy in
        (("x", 1, 0.2), ("x", 2, 0.4), ("y", 1, 0.4), ("y", 2, 0.6))
    ]  # fmt: skip
    report(tmp_path, [*rows, Row("gda", "x", ("broke",), model="c")])
    assert sorted(drawn) == ["accuracy-shots-a_b.png", "accuracy-shots-c.png"]
    panels, _ = drawn["accuracy-shots-a_b.png"]
    assert [panel.title for panel in panels] == ["average of 2 data sets", "x", "y"]
    (track,) = panels[0].tracks
    assert track.shots.tolist() == [1, 2]
    np.testing.assert_allclose(track.mean, [0.4, 0.6])
    np.testing.assert_allclose(track.deviation, [0.2 / 2**0.5] * 2)
    assert panels[0].hand_written == 0.5


def test_no_plot_is_written_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tracked(monkeypatch)
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.8))
    data = ("d_x", "d x", "D x", "d_x-2")
    _, files = report(tmp_path, [Row("zip", one, (0.5,), outcome=steps) for one in data])
    ends = ("d_x", "d_x-2", "D_x-3", "d_x-2-2")
    assert sorted(drawn) == sorted(
        f"accuracy-{cost}-{end}.png" for end in ends for cost in ("queries", "seconds")
    )
    assert len(set(files)) == len(files)
    titles = [drawn[f"accuracy-queries-{end}.png"][3] for end in ends]
    assert [title.split(" on ")[0] for title in titles] == list(data)


@pytest.mark.parametrize("name", ["../../up", "/tmp/x", "a\\b", "..", "x" * 300, "ü" * 300, "a\nb"])
def test_names_in_results_make_no_paths(tmp_path: Path, name: str) -> None:
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.8))
    rows = [
        Row("zip", data, (0.5,), shots=shots, model=model, outcome=steps)
        for data in (name, "dtd")
        for model in (name, "clip")
        for shots in (1, 2)
    ]
    (tmp_path / "a" / "b").mkdir(parents=True)
    _, files = report(tmp_path / "a" / "b", rows)
    assert len(files) == 4 + 2 + 8
    folder = tmp_path / "a" / "b" / "report"
    assert {path for path in tmp_path.rglob("*.*") if path.suffix != ".sqlite"} == set(files)
    assert {path.parent for path in files} == {folder}


def test_plots_of_an_earlier_report_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked(monkeypatch)
    folder = tmp_path / "report"
    folder.mkdir()
    ours = ("accuracy-shots.png", "accuracy-queries-d_x.png", "accuracy-seconds-clip-a+b.c-2.png")
    others = ("accuracy-shots.txt", "accuracy.png", "accuracy-queriesless.png", "my photo.png")
    for name in (*ours, *others):
        (folder / name).write_bytes(b"old")
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.8))
    _, files = report(tmp_path, [Row("zip", "d x", (0.5,), outcome=steps)])
    there = {path.name for path in folder.iterdir()}
    assert there == {path.name for path in files} | set(others)
    assert "accuracy-queries.png" in there
    assert (folder / "my photo.png").read_bytes() == b"old"


def test_without_few_shot_base_classes_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = tracked(monkeypatch)
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.8))
    report(tmp_path, [Row("zip", "dtd", (HALVES,), protocol="base-to-new", outcome=steps)])
    assert sorted(drawn) == ["accuracy-queries.png", "accuracy-seconds.png"]
    _, (line,), levels, title = drawn["accuracy-queries.png"]
    assert line.mean.tolist() == [0.2, 0.8]
    assert levels == [Level("hand-written prompts", None, 0.5)]
    assert title == "dtd on clip, base classes, 16 shots"


def test_methods_look_by_their_place_and_labels_of_one_method_differ() -> None:
    labels = ("again", "zip", "gda", "third")
    names = Names("t", dict.fromkeys(("again", "zip", "third"), "zip"), {}, {}, {})
    styles = styles_of(labels, names)
    order = list(METHODS)
    assert (styles["again"], styles["gda"]) == (order.index("zip"), order.index("gda"))
    assert len({place % N_COLOURS for place in styles.values()}) == len(labels)


@pytest.mark.parametrize("labels", [("linear-probe", "ogn"), ("ogn",)])
@pytest.mark.parametrize("n", [2, 13, 40, N_LOOKS + 2])
def test_all_labels_of_a_method_look_different_while_they_can(
    labels: tuple[str, ...], n: int
) -> None:
    more = [f"gda {i}" for i in range(n)]
    styles = styles_of([*more, *labels], Names("t", dict.fromkeys(more, "gda"), {}, {}, {}))
    assert [styles[one] for one in ("gda 0", *labels)] == [
        list(METHODS).index(one) for one in ("gda", *labels)
    ]
    assert set(styles) == {*more, *labels}
    looks = {tuple(line_style(style).items()) for style in styles.values()}
    assert len(looks) == min(n + len(labels), N_LOOKS)
    if len(styles) <= N_COLOURS - len(labels):
        assert len({place % N_COLOURS for place in styles.values()}) >= len(styles) - 1
    if n <= 40:
        levels = {str(level_style(style)) for style in styles.values()}
        assert len(levels) == len(styles)


def test_plots_are_images(tmp_path: Path) -> None:
    steps = curve((10, 2.0, 0.2), (100, 9.0, 0.6))
    names = [f"data{i}" for i in range(6)]
    rows = [Row("zip", one, (0.6, 0.5), shots=k, outcome=steps) for one in names for k in (1, 4)]
    text, files = report(tmp_path, rows)
    images = [path for path in files if path.suffix == ".png"]
    assert len(images) == 1 + 2 * len(names)
    for path in images:
        assert f"]({path.name})" in text
        with Image.open(path) as image:
            assert min(image.size) > 400


def test_the_report_loads_numpy_and_nothing_to_draw_with() -> None:
    program = """
import sys, ztune.experiments.report
tops = {name.split(".")[0] for name in sys.modules}
foreign = {"matplotlib", "PIL", "onnxruntime", "torch", "rich"} & tops
sys.exit(f"it loads {sorted(foreign)}" if foreign else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

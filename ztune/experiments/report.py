"""The report of a bench: report.md, tables.csv, cells.csv, tables.tex and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ztune.experiments.csv_rows import (
    CELL_COLUMNS,
    TABLE_COLUMNS,
    cell_rows,
    part_columns,
    table_rows,
)
from ztune.experiments.environment import (
    describe_environment,
    describe_progress,
    list_failures,
    list_remarks,
)
from ztune.experiments.figures import Drawn, draw_all, remove_others
from ztune.experiments.literature import matched_table, pairs_of, unmatched_table
from ztune.experiments.published import published
from ztune.experiments.ranking import rank_methods, units_of
from ztune.experiments.render import as_csv, as_latex, as_markdown, in_markdown
from ztune.experiments.store import ImagePass, View
from ztune.experiments.summary import Names, Sheet, names_of, sheets_of
from ztune.experiments.tables import (
    Table,
    accuracy_tables,
    calibration_table,
    costs_tables,
    ranking_table,
)
from ztune.io.files import write_bytes

LATEX_HEAD = r"""% Tables of ztune bench. They need \usepackage{booktabs}, and for non-ASCII names
% \usepackage[T1]{fontenc}; characters outside T1 need LuaLaTeX."""


def write_report(view: View, folder: Path) -> list[Path]:
    """Write the report of all results so far, and return its files, report.md first.

    Plots of an earlier report that this one does not draw are removed.

    Raises: FormatError for a plan's document without a title, or with invalid remarks.
    """
    names, results = names_of(view.document), view.results
    images = image_passes(view)
    sheets = sheets_of(results, images)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_all(sheets, names, folder)
    columns = (*CELL_COLUMNS, *part_columns(results))
    texts = {
        "report.md": "\n".join(_markdown(view, sheets, names, drawn)),
        "tables.csv": as_csv(TABLE_COLUMNS, table_rows(sheets, names)),
        "cells.csv": as_csv(columns, cell_rows(results, names, images)),
        "tables.tex": "\n".join(_latex(sheets, names)),
    }
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    remove_others(drawn, folder)
    return [*(folder / name for name in texts), *(one.path for one in drawn)]


def image_passes(view: View) -> dict[str, ImagePass]:
    """Return the cost of encoding by model, where measured."""
    digests = names_of(view.document).digests
    return {
        model: view.passes[digest] for model, digest in digests.items() if digest in view.passes
    }


def _markdown(
    view: View,
    sheets: Sequence[Sheet],
    names: Names,
    drawn: Sequence[Drawn],
) -> list[str]:
    results = view.results
    lines = [f"# {in_markdown(names.title)}", "", in_markdown(describe_progress(results)), ""]
    lines += _listed("Data", list_remarks(view))
    for sheet in sheets:
        lines += [f"## {in_markdown(_heading(sheet))}", "", *_sheet(sheet, names)]
    lines += _overall(sheets)
    lines += _literature(sheets, names)
    lines += _plots(drawn)
    lines += _listed("Failures", list_failures(results))
    return lines + _listed("Environment", describe_environment(view))


def _heading(sheet: Sheet) -> str:
    return f"{sheet.protocol}, {sheet.model}"


def _main_tables(sheet: Sheet, names: Names) -> list[Table]:
    probabilities = calibration_table(sheet)
    own = [] if probabilities is None else [probabilities]
    return [*accuracy_tables(sheet, names), *own, *costs_tables(sheet)]


def _sheet(sheet: Sheet, names: Names) -> list[str]:
    tables = _main_tables(sheet, names)
    if not tables:
        return ["No finished cell.", ""]
    if (ranking := ranking_table(rank_methods(units_of([sheet])))) is not None:
        tables.append(ranking)
    explained = (
        "Accuracy: mean ± sample standard deviation over the seeds, in points, on the test "
        "images; the best mean of a column is bold, with ties."
    )
    return [explained, "", *(line for table in tables for line in as_markdown(table, 3))]


def _overall(sheets: Sequence[Sheet]) -> list[str]:
    """Return wins, ties and losses over all protocols and models, if there are several."""
    table = ranking_table(rank_methods(units_of(sheets))) if len(sheets) > 1 else None
    if table is None:
        return []
    return ["## All protocols and models", "", *as_markdown(table, 3)]


def _literature(sheets: Sequence[Sheet], names: Names) -> list[str]:
    figures = published()
    pairs = pairs_of(figures, sheets, names)
    tables = (matched_table(pairs), unmatched_table(figures, pairs))
    shown = [line for table in tables if table is not None for line in as_markdown(table, 3)]
    figure = figures[0]
    said = (
        f"Published {figure.protocol} figures with {figure.shots} shots per class and "
        f"{figure.model}; averages are over CoOp's 11 data sets."
    )
    return ["## Published figures", "", said, "", *shown]


def _plots(drawn: Sequence[Drawn]) -> list[str]:
    if not drawn:
        return []
    images = [f"![{in_markdown(one.caption)}]({one.path.name})" for one in drawn]
    return ["## Plots", "", *(line for image in images for line in (image, ""))]


def _listed(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *(f"- {line}" for line in lines), ""] if lines else []


def _latex(sheets: Sequence[Sheet], names: Names) -> list[str]:
    tables = [(sheet, table) for sheet in sheets for table in _main_tables(sheet, names)]
    return [
        LATEX_HEAD,
        "",
        *(line for sheet, table in tables for line in as_latex(table, _heading(sheet))),
    ]

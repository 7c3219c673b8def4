"""Tables as Markdown and LaTeX, rows as CSV."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from ztune.experiments.tables import Table, Word
from ztune.printing import one_line, printable_lines

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "*": "{*}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "–": "--", "·": r"$\cdot$", "×": r"$\times$", "−": "$-$",
}  # fmt: skip
# An underscore within a word needs no escape.
_MARKDOWN = re.compile(
    r"[\\`*\[<&~$]|(?<![^\W_])_|_(?![^\W_])|^>|^(?:[-+]|#+)(?=\s|$)"  # last: starts of blocks
)

# Some spreadsheets also accept full-width forms.
_FORMULA = re.compile(r"[\t\r]|\s*[=+@\uff1d\uff0b\uff0d\uff20-]")


def in_markdown(text: str) -> str:
    """Return a text escaped for Markdown, in one line."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def code_in_markdown(text: str) -> str:
    """Return a text as inline code, with backticks handled."""
    text = one_line(text)
    fence = "`"
    while fence in text:
        fence += "`"
    room = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{room}{text}{room}{fence}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown, first column left-aligned, the others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def as_markdown(table: Table, level: int) -> list[str]:
    """Return a table's lines under a heading, with a final blank line."""
    columns = [in_markdown(column) for column in table.columns]
    rows = [[_marked(word) for word in row] for row in table.rows]
    notes = [f"- {in_markdown(note)}" for note in table.notes]
    return [
        f"{'#' * level} {in_markdown(table.title)}",
        "",
        *markdown_table(columns, rows),
        "",
        *([*notes, ""] if notes else []),
    ]


def _marked(word: Word) -> str:
    text = in_markdown(word.text)
    return f"**{text}**" if word.bold else text


def in_latex(text: str) -> str:
    """Return a text escaped for LaTeX, in one line."""
    # LaTeX needs composed accents; some file systems decompose them.
    signs = unicodedata.normalize("NFC", one_line(text))
    return "".join(_LATEX.get(sign, sign) for sign in signs)


def as_latex(table: Table, heading: str) -> list[str]:
    """Return a table as a `tabular` for the package booktabs, its title and notes as comments."""
    rows = [" & ".join(_set(word) for word in row) + r" \\" for row in table.rows]
    return [
        *(f"% {one_line(text)}" for text in (f"{heading}: {table.title}", *table.notes)),
        r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}",
        r"\toprule",
        " & ".join(map(in_latex, table.columns)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]


def _set(word: Word) -> str:
    text = in_latex(word.text)
    return rf"\textbf{{{text}}}" if word.bold else text


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as CSV; a missing figure is empty.

    A text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_in_csv, columns))
    writer.writerows([_in_csv(row.get(column, "")) for column in columns] for row in rows)
    return text.getvalue()


def _in_csv(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    mark = "'" if _FORMULA.match(cell) and not _is_number(cell) else ""
    return mark + printable_lines(cell)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

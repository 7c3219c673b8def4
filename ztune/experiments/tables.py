"""The report's tables, independent of their rendering.

Accuracies are per cent, mean ± sample standard deviation over the seeds; the best mean of a column
is bold, with ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ztune.experiments.ranking import Ranking
from ztune.experiments.store import ImagePass
from ztune.experiments.summary import (
    Costs,
    Measured,
    Names,
    Sheet,
    accuracy_of,
    average,
    calibration_of,
    class_accuracy_of,
    combined,
    costs_of,
    harmonic_mean,
    zero_shot_class_accuracy_of,
    zero_shot_of,
)

HAND_WRITTEN = "hand-written prompts"
DASH = "–"
_NO_SPREAD = 1e-9  # of templates, which have no seed, up to rounding


@dataclass(frozen=True)
class Word:
    """The text of one table entry."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Word, ...], ...]
    notes: tuple[str, ...] = ()
    """Footnotes."""


Lines = Mapping[str, Sequence[Measured]]
"""Figures of every row under the columns after the first."""


def accuracy_tables(sheet: Sheet, names: Names) -> list[Table]:
    """Return a sheet's tables of accuracies; empty without finished cells."""
    if not sheet.outcomes():
        return []
    if sheet.protocol == "few-shot":
        return _few_shot_tables(sheet, names)
    if sheet.protocol == "base-to-new":
        return _base_to_new_tables(sheet, names)
    return _transfer_tables(sheet, names)


def figures_table(
    title: str, columns: Sequence[str], lines: Lines, notes: Sequence[str] = ()
) -> Table:
    """Return accuracies as a table, with notes on its marks."""
    best = [_best(column) for column in zip(*lines.values(), strict=True)]
    rows = [
        (
            Word(label),
            *(
                Word(shown(label, one), top is not None and one.points == top)
                for one, top in zip(line, best, strict=True)
            ),
        )
        for label, line in lines.items()
    ]
    found = [figure for line in lines.values() for figure in line if figure.n]
    if partial := [figure for figure in found if not figure.is_whole]:
        mark = _seeds(partial[0])
        notes = [*notes, f"{mark}: over the finished seeds of the plan."]
    return Table(title, ("method", *columns), tuple(rows), tuple(notes))


def percent(figure: Measured) -> str:
    """Return a mean in per cent, or a dash."""
    return DASH if figure.points is None else f"{figure.points:.1f}"


def spread(figure: Measured) -> str:
    """Return mean ± deviation, with the number of seeds if some are missing."""
    words = [percent(figure)]
    if figure.deviation is not None:
        words.append(f"± {100 * figure.deviation:.1f}")
    if figure.n and not figure.is_whole:
        words.append(_seeds(figure))
    return " ".join(words)


def _seeds(figure: Measured) -> str:
    return f"({figure.n} of {figure.n_wanted})"


def _best(column: Sequence[Measured]) -> float | None:
    """Return the highest mean of a column as shown; None for fewer than two."""
    found = [figure.points for figure in column if figure.points is not None]
    return max(found) if len(found) > 1 else None


def shown(label: str, figure: Measured) -> str:
    """Return a row's figure; templates without seeds have no deviation."""
    fixed = label == HAND_WRITTEN and (figure.deviation or 0.0) < _NO_SPREAD
    return percent(figure) if fixed else spread(figure)


def _lines(
    sheet: Sheet,
    of_method: Callable[[str], list[Measured]],
    hand_written: list[Measured],
) -> dict[str, list[Measured]]:
    """Return the figures of every row; a method without requested cells has none."""
    lines = {method: of_method(method) for method in sheet.methods}
    requested = {name: line for name, line in lines.items() if any(one.n_wanted for one in line)}
    return {HAND_WRITTEN: hand_written, **requested}


def _with_average(lines: Lines, columns: Sequence[str]) -> tuple[Lines, list[str], list[str]]:
    """Return lines and columns with their average, and a note if one is missing."""
    if len(columns) < 2:
        return lines, list(columns), []
    whole = {label: [*line, average(line)] for label, line in lines.items()}
    gaps = any(line[-1].mean is None for line in whole.values())
    note = f"{DASH} under average: no seed is finished in all columns."
    return whole, [*columns, "average"], [note] if gaps else []


def counted(n: int, what: str) -> str:
    """Return a count with its noun, as `1 cell` and `2,000 cells`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _n_shots(shots: int) -> str:
    return counted(shots, "shot")


def _few_shot_tables(sheet: Sheet, names: Names) -> list[Table]:
    tables = [_by_data(sheet, names, shots) for shots in sheet.shots]
    if (over := _over_shots(sheet, names)) is not None:
        tables.append(over)
    return [*tables, _by_data(sheet, names, sheet.shots[-1], of_classes=True)]


def _by_data(sheet: Sheet, names: Names, shots: int, *, of_classes: bool = False) -> Table:
    """Return methods × data sets at some shots."""
    ours = class_accuracy_of if of_classes else accuracy_of
    theirs = zero_shot_class_accuracy_of if of_classes else zero_shot_of
    data = sheet.data_with(shots)
    lines = _lines(
        sheet,
        lambda method: [sheet.measured(method, one, "test", shots, ours) for one in data],
        [sheet.hand_written(one, "test", shots, theirs) for one in data],
    )
    whole, columns, notes = _with_average(lines, [names.of_data(one) for one in data])
    what = "mean of the classes' accuracies" if of_classes else "accuracy"
    return figures_table(f"{_n_shots(shots)}: {what}, %", columns, whole, notes)


def _over_shots(sheet: Sheet, names: Names) -> Table | None:
    """Return methods × shots over the data sets with all of them; None for one number."""
    data = [one for one in sheet.data if sheet.shots_with(one) == sheet.shots]
    if len(sheet.shots) < 2 or not data:
        return None
    lines = _lines(
        sheet,
        lambda method: [over_data(sheet, method, data, shots) for shots in sheet.shots],
        [over_data(sheet, None, data, shots) for shots in sheet.shots],
    )
    over = names.of_data(data[0]) if len(data) == 1 else f"average of {len(data)} data sets"
    notes = [] if len(data) == len(sheet.data) else [f"Over {', '.join(map(names.of_data, data))}."]
    title = f"Over shots: accuracy, %, {over}"
    return figures_table(title, [_n_shots(shots) for shots in sheet.shots], lines, notes)


def over_data(sheet: Sheet, method: str | None, data: Sequence[str], shots: int) -> Measured:
    """Return few-shot accuracy averaged over data sets; method None: of the templates."""
    if method is None:
        return average([sheet.hand_written(one, "test", shots) for one in data])
    return average([sheet.measured(method, one, "test", shots) for one in data])


def _base_to_new_tables(sheet: Sheet, names: Names) -> list[Table]:
    tables = []
    for shots in sheet.shots:
        data = sheet.data_with(shots)
        groups = [(names.of_data(one), [one]) for one in data]
        if len(data) > 1:
            groups.append((f"Average of {len(data)} data sets", list(data)))
        tables += [_halves(sheet, title, group, shots) for title, group in groups]
    return tables


def _halves(sheet: Sheet, title: str, data: Sequence[str], shots: int) -> Table:
    """Return methods × base, new and their harmonic mean, averaged over data sets."""

    def columns(of_part: Callable[[str, str], Measured]) -> list[Measured]:
        halves = [average([of_part(one, part) for one in data]) for part in ("base", "new")]
        return [*halves, combined(halves, harmonic_mean)]

    lines = _lines(
        sheet,
        lambda method: columns(lambda one, part: sheet.measured(method, one, part, shots)),
        columns(lambda one, part: sheet.hand_written(one, part, shots)),
    )
    notes = [f"{DASH}: not run, failed, or no support for classes that it was not tuned on."]
    if len(data) > 1:
        notes.append("H of an average: harmonic mean of the averages, seed by seed.")
    gaps = any(figure.mean is None for line in lines.values() for figure in line)
    return figures_table(
        f"{title}, {_n_shots(shots)}: accuracy, %",
        ("base", "new", "H"),
        lines,
        notes if gaps else notes[1:],
    )


def _transfer_tables(sheet: Sheet, names: Names) -> list[Table]:
    return [
        _targets(sheet, names, source, shots)
        for source in sheet.data
        for shots in sheet.shots_with(source)
        if sheet.outcomes(data=source, shots=shots)
    ]


def _targets(sheet: Sheet, names: Names, source: str, shots: int) -> Table:
    """Return methods × test data."""
    parts = sheet.parts(source)
    lines = _lines(
        sheet,
        lambda method: [sheet.measured(method, source, part, shots) for part in parts],
        [sheet.hand_written(source, part, shots) for part in parts],
    )
    whole, columns, notes = _with_average(lines, [names.of_data(part) for part in parts])
    title = f"Tuned on {names.of_data(source)}, {_n_shots(shots)}: accuracy, %"
    return figures_table(title, columns, whole, notes)


def costs_tables(sheet: Sheet) -> list[Table]:
    """Return methods × costs, a table per number of shots.

    A method is in the table of its most shots: a mean over all would mix unlike cells.
    """
    costs = [costs_of(sheet, method) for method in sheet.methods]
    found = [one for one in costs if one is not None]
    most = sorted({one.shots for one in found}, reverse=True)
    return [_costs([one for one in found if one.shots == k], k, sheet.images) for k in most]


def _costs(found: Sequence[Costs], shots: int, images: ImagePass | None) -> Table:
    rows = [
        tuple(
            Word(text)
            for text in (
                one.method,
                f"{one.n_cells:,}",
                f"{one.queries:,.0f}",
                f"{one.probe_queries:,.0f}",
                f"{one.text_forwards:,.0f}",
                f"{one.image_forwards:,.0f}",
                f"{one.seconds:,.1f}",
                DASH if one.peak_memory_mb is None else f"{one.peak_memory_mb:,.0f}",
                f"{one.result_bytes:,.0f}",
            )
        )
        for one in found
    ]
    columns = (
        "method", "cells", "queries", "probe queries", "text forwards", "image forwards",
        "seconds", "peak MB", "result bytes",
    )  # fmt: skip
    charged = (
        "cells share a cache, so each is charged "
        f"{1000 * images.seconds_per_image:.2g} ms per cached image, as if it had encoded it."
        if images is not None
        else "the cost of encoding was not recorded, so cached images are free."
    )
    notes = (
        f"Means over the finished cells with {_n_shots(shots)}, the most that these methods have.",
        f"Seconds: {charged}",
        f"Peak MB: the largest; {DASH}: measured only with `isolate = true` in the plan.",
        *(f"{one.method} needs {one.needs}." for one in found if one.needs),
    )
    return Table(f"Costs of a cell, {_n_shots(shots)}", columns, tuple(rows), notes)


def calibration_table(sheet: Sheet) -> Table | None:
    """Return methods × figures of their probabilities, at the most shots; None without any."""
    if not sheet.shots:
        return None
    shots, rows = sheet.shots[-1], []
    for method in sheet.methods:
        outcomes = sheet.outcomes(method, shots=shots)
        own = [score for one in outcomes for score in one.scores if score.accuracy is not None]
        if (found := calibration_of(own)) is not None:
            figures = f"{100 * found.ece:.1f}", f"{found.nll:.3f}", f"{found.brier:.3f}"
            rows.append((Word(method), *map(Word, figures)))
    if not rows:
        return None
    note = (
        "ECE: expected calibration error with 15 bins, all test images of all data sets and seeds "
        "in one set of bins. NLL (nats) and Brier score: means over the results. Methods that "
        "have no temperature are as the model was trained."
    )
    columns = ("method", "ECE, %", "NLL", "Brier")
    return Table(f"Probabilities, {_n_shots(shots)}", columns, tuple(rows), (note,))


def ranking_table(ranking: Ranking) -> Table | None:
    """Return wins, ties and losses, row against column; None for fewer than two methods."""
    methods = ranking.methods
    if len(methods) < 2:
        return None
    ranks = {name: None if r is None else round(r, 2) for name, r in ranking.ranks.items()}
    best = min((rank for rank in ranks.values() if rank is not None), default=None)
    rows = []
    for one in methods:
        against = [str(ranking.records[one, o]) if o != one else "·" for o in methods]
        rank = ranks[one]
        last = Word(DASH) if rank is None else Word(f"{rank:.2f}", rank == best)
        rows.append((Word(one), *map(Word, against), last))
    note = (
        "Row against column: wins / ties / losses over common data sets and shots, by the means "
        "of the tables above (H in base-to-new, the average of the targets in a transfer), each "
        "over its method's finished seeds; means that read the same are a tie. Rank: 1 is best, a "
        "tie counts half, mean over "
        f"{counted(ranking.n_shared, 'combination')} of data set and shots that all methods have."
    )
    columns = ("method", *methods, "mean rank")
    return Table("Wins / ties / losses", columns, tuple(rows), (note,))

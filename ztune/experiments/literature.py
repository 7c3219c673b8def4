"""Published figures compared with this report's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ztune.data.named import NAMED
from ztune.experiments.published import AVERAGE, AVERAGED, Published
from ztune.experiments.summary import Measured, Names, Sheet, average, mean_of
from ztune.experiments.tables import DASH, HAND_WRITTEN, Table, Word, shown

IMAGENET_CLASSES = 998
"""Different names among those of ImageNet's 1,000 labels; missile and sunglasses occur twice."""


@dataclass(frozen=True)
class Pair:
    """A published figure and the measured one."""

    published: Published
    label: str
    """Name of the method in the plan."""
    model: str
    measured: Measured
    queries: float | None
    """Mean over the cells; None without tuning."""

    @property
    def difference(self) -> float:
        """Measured minus published, in points."""
        return 100 * (self.measured.mean or 0.0) - self.published.accuracy


def pairs_of(figures: Iterable[Published], sheets: Sequence[Sheet], names: Names) -> list[Pair]:
    """Return every published figure with each measurement of it, in the figures' order."""
    return [
        pair
        for figure in figures
        for sheet in sheets
        if sheet.protocol == figure.protocol
        for label in _labels(figure, sheet, names)
        if (pair := _pair(figure, sheet, label, names)) is not None
    ]


def _labels(figure: Published, sheet: Sheet, names: Names) -> list[str]:
    """Return the plan's names of a figure's method; templates are scored with every method."""
    if figure.method is None:
        return []
    labels = [label for label in sheet.methods if names.method_of(label) == figure.method]
    return labels or ([HAND_WRITTEN] if figure.method == "zero-shot" else [])


def _pair(figure: Published, sheet: Sheet, label: str, names: Names) -> Pair | None:
    known = {names.known_as.get(one): one for one in sheet.data_with(figure.shots)}
    wanted = AVERAGED if figure.data == AVERAGE else (figure.data,)
    if not all(one in known for one in wanted):
        return None
    data = [known[one] for one in wanted]
    measured = average([_measured(sheet, label, one, figure.shots) for one in data])
    if measured.mean is None:
        return None
    outcomes = [o for one in data for o in sheet.outcomes(label, one, figure.shots)]
    return Pair(figure, label, sheet.model, measured, mean_of(o.queries for o in outcomes))


def _measured(sheet: Sheet, label: str, data: str, shots: int) -> Measured:
    if label == HAND_WRITTEN:
        return sheet.hand_written(data, "test", shots)
    return sheet.measured(label, data, "test", shots)


def matched_table(pairs: Sequence[Pair]) -> Table | None:
    """Return the pairs as a table; None without pairs."""
    rows = [
        tuple(
            Word(text)
            for text in (
                pair.label,
                _shown(pair.published.data),
                _source(pair.published),
                f"{pair.published.accuracy:.1f}",
                pair.published.model,
                pair.published.budget or DASH,
                shown(pair.label, pair.measured),
                pair.model,
                DASH if pair.queries is None else f"{pair.queries:,.0f}",
                f"{pair.difference:+.1f}".replace("-", "−"),
            )
        )
        for pair in pairs
    ]
    columns = (
        "method", "data set", "paper", "published, %", "published model", "published budget",
        "measured, %", "model", "queries", "difference, points",
    )  # fmt: skip
    notes = [
        "If the models differ, so do the figures: the difference is not due to the method alone.",
        *_merged_names([pair.published for pair in pairs]),
        *sources([pair.published for pair in pairs]),
    ]
    return Table("Reproduced figures", columns, tuple(rows), tuple(notes)) if rows else None


def unmatched_table(figures: Sequence[Published], pairs: Sequence[Pair]) -> Table | None:
    """Return the published figures without a measurement, a row per series."""
    matched = [pair.published for pair in pairs]
    left = [figure for figure in figures if figure not in matched]
    if not left:
        return None
    series: dict[tuple[str, str, str], dict[str, float]] = {}
    for figure in left:
        key = (_source(figure), figure.model, figure.budget or DASH)
        series.setdefault(key, {})[figure.data] = figure.accuracy
    order = [AVERAGE, *NAMED]
    data = sorted({figure.data for figure in left}, key=order.index)
    rows = [
        tuple(
            Word(text)
            for text in (*key, *(f"{own[one]:.1f}" if one in own else DASH for one in data))
        )
        for key, own in series.items()
    ]
    columns = ("paper", "model", "budget", *map(_shown, data))
    notes = tuple(sources(left))
    return Table("Published figures not measured here: accuracy, %", columns, tuple(rows), notes)


def sources(figures: Sequence[Published]) -> list[str]:
    """Return the tables that print the figures, a line each."""
    titles: dict[str, dict[str, None]] = {}
    for figure in figures:
        titles.setdefault(figure.source, {})[figure.title] = None
    return [f"{'; '.join(named)}: {source}." for source, named in titles.items()]


def _merged_names(figures: Sequence[Published]) -> list[str]:
    """Return what distinguishes measured figures on ImageNet from published ones."""
    if not any(figure.data in ("imagenet", AVERAGE) for figure in figures):
        return []
    return [
        f"ImageNet is measured over {IMAGENET_CLASSES} classes, as two pairs of its 1,000 labels "
        "have one name each; the papers keep 1,000. This favours the measured figure of a prompt "
        "by up to 0.2 points (0.02 in an average of 11)."
    ]


def _source(figure: Published) -> str:
    """Return a method's published name and paper, without repetition."""
    if figure.paper.startswith(f"{figure.title},"):
        return figure.paper
    return f"{figure.title}: {figure.paper}"


def _shown(data: str) -> str:
    return data if data == AVERAGE else NAMED[data].title

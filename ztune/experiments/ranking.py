"""Pairwise wins, ties and losses of methods over units, and mean ranks.

A unit is one data set with some shots under one protocol with one model; methods are compared by
Sheet.of_unit, as the tables show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ztune.experiments.summary import Measured, Sheet, mean_of

Unit = Mapping[str, Measured]
"""Figures of all methods in one unit, empty ones included."""


@dataclass(frozen=True)
class Record:
    """Wins, ties and losses of one method against another."""

    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{self.wins} / {self.ties} / {self.losses}"


@dataclass(frozen=True)
class Ranking:
    """Records and ranks of all methods that have a figure."""

    methods: tuple[str, ...]
    records: Mapping[tuple[str, str], Record]
    """By method and opponent."""
    n_shared: int
    """Units in which all methods can be compared."""
    ranks: Mapping[str, float | None]
    """Mean over the shared units, 1 is best; None without such units."""


def units_of(sheets: Iterable[Sheet]) -> list[Unit]:
    """Return every unit of the sheets, in plan order."""
    return [
        {method: sheet.of_unit(method, data, shots) for method in sheet.methods}
        for sheet in sheets
        for data in sheet.data
        for shots in sheet.shots_with(data)
    ]


def rank_methods(units: Sequence[Unit]) -> Ranking:
    """Return the records of all pairs, and the mean ranks over shared units."""
    named = dict.fromkeys(method for unit in units for method in unit)
    methods = tuple(m for m in named if any(m in unit and unit[m].n for unit in units))
    records = {
        (one, other): _record([lead(unit, one, other) for unit in units])
        for one in methods
        for other in methods
        if one != other
    }
    ranks = [found for unit in units if (found := ranks_in(unit, methods)) is not None]
    means = {method: mean_of(found[method] for found in ranks) for method in methods}
    return Ranking(methods, records, len(ranks), means)


def lead(unit: Unit, one: str, other: str) -> float | None:
    """Return the difference of `one` and `other` in points, 0 for a tie; None if one is missing."""
    mine, theirs = (unit[name].points if name in unit else None for name in (one, other))
    return None if mine is None or theirs is None else mine - theirs


def _record(leads: Sequence[float | None]) -> Record:
    found = [one for one in leads if one is not None]
    wins, losses = sum(one > 0 for one in found), sum(one < 0 for one in found)
    return Record(wins, len(found) - wins - losses, losses)


def ranks_in(unit: Unit, methods: Sequence[str]) -> dict[str, float] | None:
    """Return each method's rank in a unit: 1 + losses + ties / 2.

    None if two methods cannot be compared.
    """
    ranks = {}
    for method in methods:
        leads = [lead(unit, method, other) for other in methods if other != method]
        found = [one for one in leads if one is not None]
        if len(found) < len(leads):
            return None
        ranks[method] = 1 + sum(one < 0 for one in found) + 0.5 * sum(one == 0 for one in found)
    return ranks

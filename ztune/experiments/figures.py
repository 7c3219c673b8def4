"""The report's plots: accuracy over shots, and accuracy curves over queries and seconds."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ztune.experiments.cells import Outcome
from ztune.experiments.curves import MeanCurve, mean_curve
from ztune.experiments.figure_shots import Panel, Track, draw_over_shots
from ztune.experiments.store import ImagePass
from ztune.experiments.summary import Measured, Names, Sheet, mean_of, seconds_alone
from ztune.experiments.tables import HAND_WRITTEN, counted, over_data
from ztune.methods.registry import method_names
from ztune.report_compare import N_COLOURS, N_LOOKS, Level, Line, draw_accuracy_against_cost
from ztune.types import F64

_LONGEST = 200  # bytes of a plot's name, without number and suffix
_OURS = re.compile(r"accuracy-(shots|queries|seconds)(-[\w.+-]+)?\.png")


@dataclass(frozen=True)
class Drawn:
    """A written plot."""

    path: Path
    caption: str


def draw_all(sheets: Sequence[Sheet], names: Names, folder: Path) -> list[Drawn]:
    """Draw all plots that have data."""
    styles = styles_of([method for sheet in sheets for method in sheet.methods], names)
    few = [sheet for sheet in sheets if sheet.protocol == "few-shot"]
    halves = [sheet for sheet in sheets if sheet.protocol == "base-to-new"]
    drawn = []
    taken: set[str] = set()
    for sheet in few:
        path = folder / _named("accuracy-shots", few, sheet, taken)
        drawn += _draw_shots(sheet, names, styles, path)
    for sheet in few or halves:
        for data in sheet.data:
            if not any(one.curve for one in sheet.outcomes(data=data)):
                continue
            for cost in ("queries", "seconds"):
                path = folder / _named(f"accuracy-{cost}", few or halves, sheet, taken, data)
                drawn += draw_cost(cost, sheet, data, names, styles, path)
    return drawn


def remove_others(drawn: Iterable[Drawn], folder: Path) -> None:
    """Remove plots of an earlier report that this one did not draw."""
    kept = [one.path for one in drawn]
    for path in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
        # By file: on some file systems "DTD.png" and "dtd.png" are the same.
        if path.is_file() and not any(path.samefile(one) for one in kept):
            path.unlink()


def styles_of(labels: Iterable[str], names: Names) -> dict[str, int]:
    """Return a style per method: its index in the table of methods.

    A further label of the same method gets an unused style, in the least used colour.
    """
    places = {name: place for place, name in enumerate(method_names())}
    styles: dict[str, int] = {}
    further = []
    for label in dict.fromkeys(labels):
        place = places.get(names.method_of(label))
        if place is None or place in styles.values():
            further.append(label)
        else:
            styles[label] = place
    looks = Counter(styles.values())
    colours = Counter(place % N_COLOURS for place in styles.values())
    for label in further:
        place = min(range(N_LOOKS), key=lambda one: (looks[one], colours[one % N_COLOURS]))
        looks[place] += 1
        colours[place % N_COLOURS] += 1
        styles[label] = place
    return styles


def _named(
    stem: str, sheets: Sequence[Sheet], sheet: Sheet, taken: set[str], data: str | None = None
) -> str:
    """Return an unused file name, with model and data set if several; add it to `taken`."""
    parts = [stem]
    if len(sheets) > 1:
        parts.append(sheet.model)
    if data is not None and len(sheet.data) > 1:
        parts.append(data)
    name = re.sub(r"[^\w.+-]+", "_", "-".join(parts))
    name = name.encode()[:_LONGEST].decode(errors="ignore")
    numbered = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    # Some file systems ignore case.
    free = next(one for one in numbered if one.casefold() not in taken)
    taken.add(free.casefold())
    return f"{free}.png"


def _draw_shots(sheet: Sheet, names: Names, styles: Mapping[str, int], path: Path) -> list[Drawn]:
    """Draw accuracy over shots, averaged and by data set, if there are several numbers of shots."""
    data = [one for one in sheet.data if sheet.shots_with(one) == sheet.shots]
    if len(sheet.shots) < 2 or not data:
        return []
    panels = [_panel(sheet, [one], names.of_data(one), styles) for one in data]
    if len(data) > 1:
        title = f"average of {len(data)} data sets"
        panels.insert(0, _panel(sheet, data, title, styles))
    if not any(panel.tracks for panel in panels):
        return []
    spread = " (band: ± sample standard deviation over the seeds)"
    bands = any(np.any(track.deviation > 0) for panel in panels for track in panel.tracks)
    draw_over_shots(panels, f"{names.title}: {sheet.model}{spread if bands else ''}", path)
    return [Drawn(path, f"accuracy over shots, {sheet.model}")]


def _panel(sheet: Sheet, data: Sequence[str], title: str, styles: Mapping[str, int]) -> Panel:
    tracks = [
        _track(method, styles[method], sheet.shots, figures)
        for method in sheet.methods
        for figures in [[over_data(sheet, method, data, shots) for shots in sheet.shots]]
        if any(figure.n for figure in figures)
    ]
    prompts = [over_data(sheet, None, data, shots).mean for shots in sheet.shots]
    found = [one for one in prompts if one is not None]
    return Panel(title, tuple(tracks), found[-1] if found else None)


def _track(name: str, style: int, shots: Sequence[int], figures: Sequence[Measured]) -> Track:
    found = [(k, one) for k, one in zip(shots, figures, strict=True) if one.n]
    return Track(
        name,
        style,
        np.array([k for k, _ in found], dtype=np.float64),
        np.array([one.mean for _, one in found], dtype=np.float64),
        np.array([one.deviation or 0.0 for _, one in found], dtype=np.float64),
    )


def draw_cost(
    cost: str,
    sheet: Sheet,
    data: str,
    names: Names,
    styles: Mapping[str, int],
    path: Path,
) -> list[Drawn]:
    """Draw accuracy against a cost at the most shots, if any method has a result."""
    shots = sheet.shots_with(data)[-1]
    part = "base" if sheet.protocol == "base-to-new" else "test"
    lines, levels = [], []
    for method in sheet.methods:
        found = sheet.measured(method, data, part, shots)
        outcomes = sheet.outcomes(method, data, shots)
        curve = mean_curve(outcomes, sheet.images)
        if curve is not None and (line := _line(method, styles[method], cost, curve)) is not None:
            lines.append(replace(line, accuracy=found.mean))
        elif found.mean is not None and not any(one.curve for one in outcomes):
            levels.append(
                Level(method, styles[method], found.mean, _level_cost(cost, outcomes, sheet.images))
            )
    if not lines and not levels:
        return []
    prompts = sheet.hand_written(data, part, shots).mean
    if prompts is not None and not any(names.method_of(one.name) == "zero-shot" for one in levels):
        levels.append(Level(HAND_WRITTEN, None, prompts))
    counts = [sheet.measured(one.name, data, part, shots).n for one in lines]
    over = _over_seeds(counts) if lines else ""
    classes = ", base classes" if part == "base" else ""
    what = f"{names.of_data(data)} on {sheet.model}{classes}"
    draw_accuracy_against_cost(cost, lines, levels, f"{what}, {counted(shots, 'shot')}{over}", path)
    return [Drawn(path, f"accuracy against {cost}, {what}")]


def _over_seeds(counts: Sequence[int]) -> str:
    """Return the part of a title about seeds."""
    if max(counts) == 1:
        return ""
    up_to = "" if min(counts) == max(counts) else "up to "
    return f", mean of {up_to}{max(counts)} seeds (band: lowest to highest)"


def _level_cost(cost: str, outcomes: Sequence[Outcome], images: ImagePass | None) -> float | None:
    """Return a level's cost; None if it is 0, which a logarithmic axis cannot show."""
    if cost == "seconds":
        return mean_of(seconds_alone(one, images) for one in outcomes) or None
    return mean_of(one.queries for one in outcomes) or None


def _line(name: str, style: int, cost: str, curve: MeanCurve) -> Line | None:
    """Return a curve over a cost, without points at cost 0 (logarithmic axis)."""
    costs: F64 = curve.seconds if cost == "seconds" else curve.queries
    shown = np.isfinite(costs) & (costs > 0)
    if not shown.any():
        return None
    return Line(name, style, costs[shown], curve.mean[shown], curve.low[shown], curve.high[shown])

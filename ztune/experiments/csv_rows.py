"""Rows of the CSV files: accuracies in 0…1, means rounded to seven digits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from ztune.experiments.cells import Outcome
from ztune.experiments.store import ImagePass, Result
from ztune.experiments.summary import (
    Measured,
    Names,
    Sheet,
    calibration_of,
    class_accuracy_of,
    combined,
    harmonic_mean,
    mean_of,
    memory_alone,
    seconds_alone,
)

TABLE_COLUMNS = (
    "protocol", "model", "data", "part", "method", "uses", "shots", "n_seeds", "n_seeds_wanted",
    "accuracy_mean", "accuracy_sd", "class_accuracy_mean", "zero_shot_mean", "ece", "nll_mean",
    "brier_mean", "queries_mean", "seconds_mean",
)  # fmt: skip
CELL_COLUMNS = (
    "protocol", "model", "data", "method", "uses", "shots", "seed", "status", "reason", "session",
    "run", "artifact", "config", "stop_reason", "train_loss", "result_bytes", "n_train", "n_val",
    "copies", "queries", "probe_queries", "text_forwards", "image_forwards",
    "image_forwards_cached", "seconds", "seconds_alone", "peak_memory_mb", "peak_memory_alone_mb",
    "needs",
)  # fmt: skip
HARMONIC = "harmonic mean"
"""Part name in the rows of base-to-new's H."""
_PLAIN = (
    "run", "artifact", "stop_reason", "train_loss", "result_bytes", "n_train", "n_val",
    "copies", "queries", "probe_queries", "text_forwards", "image_forwards",
    "image_forwards_cached", "seconds", "peak_memory_mb", "needs",
)  # fmt: skip
_OF_PART = (
    "n", "classes", "accuracy", "class_accuracy", "zero_shot", "zero_shot_class_accuracy", "ece",
    "nll", "brier",
)  # fmt: skip
Row = dict[str, object]


def table_rows(sheets: Sequence[Sheet], names: Names) -> Iterator[Row]:
    """Yield a row per protocol, model, data set, shots, method and part."""
    for sheet in sheets:
        for data in sheet.data:
            for shots in sheet.shots_with(data):
                for method in sheet.methods:
                    if sheet.of(method, data, shots):
                        yield from _unit_rows(sheet, names, data, shots, method)


def _unit_rows(sheet: Sheet, names: Names, data: str, shots: int, method: str) -> Iterator[Row]:
    outcomes = sheet.outcomes(method, data, shots)
    common: Row = {
        "protocol": sheet.protocol,
        "model": sheet.model,
        "data": data,
        "method": method,
        "uses": names.method_of(method),
        "shots": shots,
        "queries_mean": _rounded(mean_of(one.queries for one in outcomes)),
        "seconds_mean": _rounded(mean_of(seconds_alone(one, sheet.images) for one in outcomes)),
    }
    for part in sheet.parts(data):
        figure = sheet.measured(method, data, part, shots)
        of_classes = sheet.measured(method, data, part, shots, class_accuracy_of)
        prompts = sheet.hand_written(data, part, shots)
        yield {
            **common,
            "part": part,
            **_spread(figure),
            "class_accuracy_mean": _rounded(of_classes.mean),
            "zero_shot_mean": _rounded(prompts.mean),
            **{name: _rounded(figure) for name, figure in _calibration(outcomes, part).items()},
        }
    if sheet.protocol == "base-to-new" and sheet.parts(data):
        halves = [sheet.hand_written(data, part, shots) for part in ("base", "new")]
        yield {
            **common,
            "part": HARMONIC,
            **_spread(sheet.harmonic(method, data, shots)),
            "zero_shot_mean": _rounded(combined(halves, harmonic_mean).mean),
        }


def _calibration(outcomes: Sequence[Outcome], part: str) -> dict[str, float | None]:
    found = calibration_of(score for one in outcomes for score in one.scores if score.part == part)
    if found is None:
        return {}
    return {"ece": found.ece, "nll_mean": found.nll, "brier_mean": found.brier}


def _spread(figure: Measured) -> Row:
    return {
        "n_seeds": figure.n,
        "n_seeds_wanted": figure.n_wanted,
        "accuracy_mean": _rounded(figure.mean),
        "accuracy_sd": _rounded(figure.deviation),
    }


def part_columns(results: Sequence[Result]) -> list[str]:
    """Return the columns of all scored parts, as `test accuracy`."""
    parts = dict.fromkeys(
        score.part
        for result in results
        if result.outcome is not None
        for score in result.outcome.scores
    )
    return [f"{part} {name}" for part in parts for name in _OF_PART]


def cell_rows(
    results: Sequence[Result], names: Names, images: Mapping[str, ImagePass]
) -> Iterator[Row]:
    """Yield a row per cell of the plan, run or not."""
    for result in results:
        cell, outcome = result.cell, result.outcome
        status = "finished" if outcome else "failed" if result.reason else "missing"
        yield {
            **{name: getattr(cell, name) for name in ("protocol", "model", "data", "method")},
            "uses": names.method_of(cell.method),
            "shots": cell.shots,
            "seed": cell.seed,
            "status": status,
            "reason": result.reason,
            "session": result.session,
            **(_measured(outcome, images.get(cell.model)) if outcome else {}),
        }


def _measured(outcome: Outcome, images: ImagePass | None) -> Row:
    return {
        **{name: getattr(outcome, name) for name in _PLAIN},
        "config": json.dumps(dict(outcome.config), ensure_ascii=False, sort_keys=True),
        "seconds_alone": _rounded(seconds_alone(outcome, images)),
        "peak_memory_alone_mb": memory_alone(outcome, images),
        **{
            f"{score.part} {name}": getattr(score, name)
            for score in outcome.scores
            for name in _OF_PART
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")

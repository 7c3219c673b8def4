"""Accuracy curves of a method, averaged over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ztune.experiments.cells import Outcome, Point
from ztune.experiments.store import ImagePass
from ztune.experiments.summary import seconds_alone
from ztune.types import F64


@dataclass(frozen=True)
class MeanCurve:
    """A method's accuracy curve over its seeds; all arrays f64[n]."""

    queries: F64
    seconds: F64
    """Mean over the seeds at these queries; NaN where a point has none."""
    mean: F64
    low: F64
    high: F64


def mean_curve(outcomes: Sequence[Outcome], images: ImagePass | None) -> MeanCurve | None:
    """Return one method's curve; None if no outcome has one.

    Seeds are interpolated to the same query counts, over their common range. Cached images are
    charged.
    """
    curves = [_points(outcome, images) for outcome in outcomes if outcome.curve]
    if not curves:
        return None
    first = max(one[0, 0] for one in curves)
    last = min(one[-1, 0] for one in curves)
    grid = np.unique(np.concatenate([one[:, 0] for one in curves]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid):  # one seed stopped before another's first point
        return None
    seconds = np.stack([np.interp(grid, one[:, 0], one[:, 1]) for one in curves])
    accuracy = np.stack([np.interp(grid, one[:, 0], one[:, 2]) for one in curves])
    return MeanCurve(
        grid,
        seconds.mean(axis=0),
        accuracy.mean(axis=0),
        accuracy.min(axis=0),
        accuracy.max(axis=0),
    )


def _points(outcome: Outcome, images: ImagePass | None) -> F64:
    """Return f64[n, 3]: queries, seconds, accuracy."""
    unpaid = seconds_alone(outcome, images) - outcome.seconds
    rows = [(p.queries, _seconds_at(p, outcome) + unpaid, p.accuracy) for p in outcome.curve]
    return np.array(rows, dtype=np.float64)


def _seconds_at(point: Point, outcome: Outcome) -> float:
    """Return the seconds of a point, always known for the result itself."""
    if point.seconds is not None:
        return point.seconds
    return outcome.seconds if point is outcome.curve[-1] else math.nan

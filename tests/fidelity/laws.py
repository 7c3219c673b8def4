"""Distributions, and tests whether a sample follows one.

A bound is five standard errors, which a correct draw exceeds once in two million times; with fixed
seeds it never does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ztune.types import F64

ERRORS = 5.0
# The chance that √n times the largest distance of the distribution functions exceeds 2.75 is
# 2 exp(−2 · 2.75²), about that of five standard errors.
_DISTANCE = 2.75


@dataclass(frozen=True)
class Law:
    """A distribution of one value."""

    mean: float
    deviation: float
    kurtosis: float
    """The fourth central moment over the squared variance."""
    support: tuple[float, float]
    below: Callable[[float], float]
    """The distribution function."""


def normal(mean: float, deviation: float) -> Law:
    """Return N(mean, deviation²)."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - mean) / deviation / math.sqrt(2)))

    return Law(mean, deviation, 3.0, (-math.inf, math.inf), below)


def uniform(low: float, high: float) -> Law:
    """Return U[low, high]."""

    def below(x: float) -> float:
        return min(1.0, max(0.0, (x - low) / (high - low)))

    return Law((low + high) / 2, (high - low) / math.sqrt(12), 1.8, (low, high), below)


def require_mean(sample: F64, mean: float, deviation: float) -> None:
    """Check the mean of independent values with a known deviation."""
    limit = ERRORS * deviation / math.sqrt(sample.size)
    assert abs(float(sample.mean()) - mean) <= limit, f"{sample.mean()}, not {mean} ± {limit}"


def require_law(sample: F64, law: Law, *, rounding: float = 1e-9) -> None:
    """Check support, mean, deviation and distribution function of independent values."""
    values = np.sort(sample.ravel())
    n = len(values)
    low, high = law.support
    assert values[0] >= low - rounding
    assert values[-1] <= high + rounding
    require_mean(values, law.mean, law.deviation)
    limit = ERRORS * law.deviation * math.sqrt((law.kurtosis - 1) / (4 * n))
    deviation = math.sqrt(float(((values - law.mean) ** 2).mean()))
    assert abs(deviation - law.deviation) <= limit, f"{deviation}, not {law.deviation} ± {limit}"
    expected = np.array([law.below(float(value)) for value in values])
    steps = np.arange(n + 1) / n
    distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    assert distance <= _DISTANCE / math.sqrt(n), f"distribution functions differ by {distance}"


def require_share(n_hits: int, n: int, share: float) -> None:
    """Check how often something happened in n independent trials."""
    limit = ERRORS * math.sqrt(n * share * (1 - share))
    assert abs(n_hits - n * share) <= limit, f"{n_hits} of {n}, not {n * share} ± {limit}"


def require_uncorrelated(first: F64, second: F64) -> None:
    """Check that pairs of values with means of zero have no correlation."""
    a, b = first.ravel(), second.ravel()
    correlation = float((a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    assert abs(correlation) <= ERRORS / math.sqrt(len(a)), f"correlation of {correlation}"

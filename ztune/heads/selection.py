"""How heads choose hyper-parameters: on validation pictures, else by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from ztune.errors import ConfigError, ZtuneError
from ztune.heads.shots import Shots
from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64

T = TypeVar("T")

Predict = Callable[[F64], Iterator[F64]]
"""From unit features f64[N, e] to logits f64[N, C], once per setting of a grid, in its order."""

# What a setting may be: far beyond what helps, and within what float64 solves and float32 holds.
LEAST, MOST = 1e-6, 1e6
N_FOLDS = 4
_ROWS = 2048  # pictures judged at a time: a kernel over 16,000 keys then takes 260 MB


def choose(
    grid: Sequence[T], default: T, fit: Callable[[Shots], Predict], shots: Shots, seed: int
) -> T:
    """Return the setting with the best accuracy, then loss; the first of equals.

    Judged on the validation pictures where there are any, else by stratified folds over the
    training pictures, all views of a picture in one. Where a class has a single picture and nothing
    can be held out, it is `default`.
    """
    if len(grid) == 1:
        return grid[0]
    wrong = np.zeros(len(grid), dtype=np.int64)
    losses = np.zeros(len(grid))

    def judge(predict: Predict, features: F32, labels: I64) -> None:
        for start in range(0, len(labels), _ROWS):
            rows = slice(start, start + _ROWS)
            predictions = predict(features[rows].astype(np.float64))
            for i, logits in zip(range(len(grid)), predictions, strict=True):
                wrong[i] += np.count_nonzero(logits.argmax(axis=1) != labels[rows])
                losses[i] += cross_entropy(logits.astype(np.float32), labels[rows]).sum()

    if shots.held_out is not None:
        judge(fit(shots), *shots.held_out)
    else:
        folds = stratified_folds(shots, seed)
        if folds is None:
            return default
        for k in range(int(folds.max()) + 1):
            out = np.tile(folds == k, shots.n_views)
            judge(fit(shots.without(folds == k)), shots.features[out], shots.labels[out])
    return grid[min(range(len(grid)), key=lambda i: (wrong[i], losses[i]))]


def stratified_folds(shots: Shots, seed: int) -> I64 | None:
    """Return the fold i64[n_pictures] of every picture, or None where a class has only one."""
    labels = shots.labels[: len(shots.labels) // shots.n_views]
    n_folds = min(N_FOLDS, int(np.bincount(labels, minlength=shots.n_classes).min()))
    if n_folds < 2:
        return None
    rng = np.random.default_rng([seed, 4])
    folds = np.empty(len(labels), dtype=np.int64)
    for c in range(shots.n_classes):
        members = rng.permutation(np.flatnonzero(labels == c))
        folds[members] = np.arange(len(members)) % n_folds
    return folds


def options(value: float | None, grid: Sequence[float]) -> tuple[float, ...]:
    """Return what is to be tried: the configured value alone, or the grid."""
    return tuple(grid) if value is None else (value,)


@contextmanager
def solvable(method: str) -> Iterator[None]:
    """Say in one line that a head's linear system has no solution; decorates its fit.

    Raises: ZtuneError.
    """
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise ZtuneError(
            f"{method} cannot be fitted to these features with these settings ({error}); "
            "use less extreme settings, or leave them open"
        ) from None


def require_positive(name: str, value: float | None, *, or_zero: bool = False) -> None:
    """Check a hyper-parameter that may be left open.

    Raises: ConfigError when it is no number, too small or too large.
    """
    if value is None or LEAST <= value <= MOST or (or_zero and value == 0):
        return
    zero = "0, or " if or_zero else ""
    raise ConfigError(f"{name} is {value}, expected {zero}{LEAST:g} to {MOST:g}")

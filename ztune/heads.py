"""Inputs, results and hyper-parameter selection of closed-form heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ztune.errors import ConfigError, ZtuneError
from ztune.logits import FeatureClassifier, Kernel
from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64, Json

T = TypeVar("T")

Predict = Callable[[F64], Iterator[F64]]
"""Yields logits f64[N, C] of unit features f64[N, e], one per setting of a grid, in order."""

# Limits of a setting: far beyond useful values, within float64's and float32's range.
LEAST, MOST = 1e-6, 1e6
N_FOLDS = 4
_ROWS = 2048  # images evaluated at a time: a kernel over 16,000 keys then takes 260 MB


@dataclass(frozen=True)
class Shots:
    """Features of the labelled images, and text features of the templates."""

    features: F32
    """f32[n, e], unit rows; with views row v * n_images + i is view v of image i."""
    labels: I64
    """i64[n], every class at least once."""
    text_features: F32
    """f32[C, e], unit rows."""
    logit_scale: float
    logit_bias: float = 0.0
    held_out: tuple[F32, I64] | None = None
    """Validation features f32[N, e] and their labels, or None."""
    n_views: int = 1

    @property
    def n_classes(self) -> int:
        return len(self.text_features)

    @property
    def zero_shot(self) -> F64:
        """The zero-shot classifier f64[C, e] times the logit scale, without the bias."""
        return np.asarray(np.float64(self.logit_scale) * self.text_features.astype(np.float64))

    @property
    def images(self) -> tuple[F64, I64]:
        """Unit rows f64[n_images, e], the mean direction of each image's views, and labels."""
        n_images = len(self.labels) // self.n_views
        views = self.features.astype(np.float64).reshape(self.n_views, n_images, -1)
        mean = views.mean(axis=0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return np.asarray(mean), self.labels[:n_images]

    @property
    def queries(self) -> F32:
        """One unit row f32[n_images, e] per image, as `images`; without views its own."""
        return self.features if self.n_views == 1 else self.images[0].astype(np.float32)

    def without(self, left_out: NDArray[np.bool_]) -> Shots:
        """Return the shots without some images bool[n_images] and without validation images."""
        kept = np.tile(~left_out, self.n_views)
        return replace(self, features=self.features[kept], labels=self.labels[kept], held_out=None)


@dataclass(frozen=True)
class Fitted:
    """A head's classifier and its settings."""

    classifier: FeatureClassifier
    chosen: Mapping[str, Json]
    """All settings of the head, including those it chose."""


def classifier_of(weight: F64, bias: F64, kernel: Kernel | None = None) -> FeatureClassifier:
    """Return the classifier of weight f64[C, e] and bias f64[C], rounded to float32."""
    return FeatureClassifier(weight.astype(np.float32), bias.astype(np.float32), kernel)


def choose(
    grid: Sequence[T], default: T, fit: Callable[[Shots], Predict], shots: Shots, seed: int
) -> T:
    """Return the setting with the best accuracy, then loss; the first in a tie.

    Evaluated on the validation images if any, else by stratified cross-validation over the
    training images, all views of an image in one fold; `default` if a class has a single image.
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
    """Return the fold i64[n_images] of every image, or None if a class has a single image."""
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


def keep_whole_classes(folds: I64, labels: I64, n_classes: int) -> I64:
    """Return folds i64[n] in which no class is held out as a whole.

    A class whose images all have one fold is in every fit: its images get −1.
    """
    lowest = np.full(n_classes, np.iinfo(np.int64).max)
    highest = np.full(n_classes, -1)
    np.minimum.at(lowest, labels, folds)
    np.maximum.at(highest, labels, folds)
    return np.where((lowest == highest)[labels], -1, folds)


def first_of_each_class(labels: I64, n_classes: int, most: int) -> I64:
    """Return the sorted indices of the first images of each class, about `most` in all."""
    per_class = max(1, most // n_classes)
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(n_classes))
    rank = np.arange(len(labels)) - starts[labels[order]]
    return np.sort(order[rank < per_class])


def grid_values(value: float | None, grid: Sequence[float]) -> tuple[float, ...]:
    """Return the values to try: the configured value, or the grid."""
    return tuple(grid) if value is None else (value,)


@contextmanager
def explain_singular(method: str) -> Iterator[None]:
    """Turn a linear algebra error into one line; decorates a head's fit.

    Raises: ZtuneError.
    """
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise ZtuneError(
            f"{method} cannot be fitted to these features with these settings ({error}); "
            "use less extreme settings, or the defaults"
        ) from None


def require_positive(name: str, value: float | None, *, or_zero: bool = False) -> None:
    """Check an optional hyper-parameter.

    Raises: ConfigError for NaN, or a value too small or too large.
    """
    if value is None or LEAST <= value <= MOST or (or_zero and value == 0):
        return
    zero = "0, or " if or_zero else ""
    raise ConfigError(f"{name} is {value}, expected {zero}{LEAST:g} to {MOST:g}")

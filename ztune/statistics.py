"""Accuracy with its interval, the confusion table, and how well probabilities are calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ztune.errors import ZtuneError
from ztune.logits import log_probabilities
from ztune.types import F32, F64, I64

N_BINS = 15
"""Bins of equal width of the expected calibration error."""
_ROWS = 4096  # images at a time: float64 probabilities of 1,000 classes then take 33 MB
_Z = 1.959964  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Proportion:
    """The number of correct images of n."""

    n_right: int
    n: int

    @property
    def accuracy(self) -> float:
        """In 0…1."""
        return self.n_right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson score interval of the accuracy."""
        n, p = self.n, self.accuracy
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Bin:
    """The images whose largest probability is in one of N_BINS intervals of equal width."""

    number: int
    """From 0: the interval starts at number / N_BINS."""
    n: int
    confidence: float
    """Their mean largest probability."""
    accuracy: float


def ece_of(bins: Iterable[Bin]) -> float:
    """Return the expected calibration error: the mean over images of |accuracy − confidence|.

    Bins of several results with the same number are one bin. Source: Guo et al., ICML 2017, eq. 3.

    Example:
        >>> round(ece_of([Bin(14, 3, 0.95, 1.0), Bin(7, 1, 0.5, 0.0)]), 4)
        0.1625

    """
    excess: dict[int, float] = {}
    n = 0
    for one in bins:
        n += one.n
        gap = one.n * (one.accuracy - one.confidence)
        excess[one.number] = excess.get(one.number, 0.0) + gap
    return sum(map(abs, excess.values())) / n if n else math.nan


@dataclass(frozen=True)
class Score:
    """A classifier's results on n labelled images."""

    predictions: I64
    """i64[n]"""
    labels: I64
    classes: tuple[str, ...]
    confidences: F64
    """f64[n]: the largest probability of each image."""
    nll: float
    """Mean negative log-likelihood of the labels, in nats."""
    brier: float
    """Mean of Σ_c (p_c − [c = label])², 0 to 2 (Brier 1950)."""

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """In 0…1."""
        return float((self.predictions == self.labels).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson score interval of the accuracy."""
        return Proportion(int((self.predictions == self.labels).sum()), self.n).interval

    @property
    def class_accuracy(self) -> float:
        """The mean accuracy over classes with images, in 0…1."""
        right = self.predictions == self.labels
        return float(np.mean([right[self.labels == c].mean() for c in np.unique(self.labels)]))

    @property
    def without_images(self) -> tuple[str, ...]:
        """The classes without images, whose accuracy is unknown."""
        present = set(self.labels.tolist())
        return tuple(name for c, name in enumerate(self.classes) if c not in present)

    @property
    def reliability(self) -> tuple[Bin, ...]:
        """Return the bins of the confidences, from the lowest; empty ones are left out."""
        right = self.predictions == self.labels
        own = np.minimum((self.confidences * N_BINS).astype(np.int64), N_BINS - 1)
        return tuple(
            Bin(
                int(k),
                int((own == k).sum()),
                float(self.confidences[own == k].mean()),
                float(right[own == k].mean()),
            )
            for k in np.unique(own)
        )

    @property
    def ece(self) -> float:
        """The expected calibration error, in 0…1."""
        return ece_of(self.reliability)

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return accuracy and n of every class with images."""
        result = {}
        for c, name in enumerate(self.classes):
            own = self.labels == c
            if own.any():
                right = float((self.predictions[own] == c).mean())
                result[name] = {"accuracy": right, "n": int(own.sum())}
        return result

    def confusion(self) -> I64:
        """Return i64[C, C]: images of class (row) classified as class (column)."""
        table = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(table, (self.labels, self.predictions), 1)
        return table


def score(
    logits: F32, labels: I64, classes: tuple[str, ...], temperature: float | None = None
) -> Score:
    """Compare the argmax and the probabilities of logits f32[n, C] with labels i64[n].

    Raises: ZtuneError for logits that are not finite.
    """
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise ZtuneError(
            f"the classifier's logits are not finite for image {broken[0] + 1} of {len(logits)} "
            f"({len(broken)} such images in total; tune again with other settings)"
        )
    n = len(logits)
    confidences, losses, squares = np.empty(n), np.empty(n), np.empty(n)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        own, log_p = labels[rows], log_probabilities(logits[rows], temperature or 1.0)
        p, each = np.exp(log_p), np.arange(len(own))
        confidences[rows] = p.max(axis=1)
        losses[rows] = -log_p[each, own]
        squares[rows] = (p**2).sum(axis=1) - 2 * p[each, own] + 1
    predictions = logits.argmax(axis=1).astype(np.int64)
    nll, brier = float(losses.mean()), float(squares.mean())
    return Score(predictions, labels, classes, confidences, nll, brier)

"""Accuracy with its interval, and the confusion table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ztune.errors import ZtuneError
from ztune.types import F32, I64

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
class Score:
    """A classifier's results on n labelled images."""

    predictions: I64
    """i64[n]"""
    labels: I64
    classes: tuple[str, ...]

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
        """The classes of which there are no images, so that nothing is known of them."""
        present = set(self.labels.tolist())
        return tuple(name for c, name in enumerate(self.classes) if c not in present)

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


def score(logits: F32, labels: I64, classes: tuple[str, ...]) -> Score:
    """Compare the argmax of logits f32[n, C] with labels i64[n].

    Raises: ZtuneError for logits that are not finite.
    """
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise ZtuneError(
            f"the classifier's logits are not finite for image {broken[0] + 1} of {len(logits)} "
            f"({len(broken)} such images in total; tune again with other settings)"
        )
    return Score(logits.argmax(axis=1).astype(np.int64), labels, classes)

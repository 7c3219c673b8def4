"""Whether an image belongs to none of the classes: docs/research/none-of-these.md.

The score of an image is its cosine to the nearest prototype. The prototype of a class is the mean
direction of its training images and of its text feature, which counts as TEXT_COUNT images and is
moved from the centre of the texts to the centre of the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.logits import InlierTest
from ztune.statistics import Proportion
from ztune.types import F32, F64, I64, Json

TEXT_COUNT = 3.0
"""Images as which a class's text feature counts."""
_MOST_FOLDS = 32
_MARGIN = 1e-5  # below the threshold, for the rounding of other processors
_TINY = 1e-12


def fit_inlier_test(features: F32, labels: I64, texts: F32, share: float) -> InlierTest:
    """Return the test that refuses about a `share` of images like the training images.

    The threshold is from scores by prototypes without the image itself. Shapes: features f32[n, e]
    and texts f32[C, e], unit rows; labels i64[n].
    """
    threshold = _low_score(out_of_fold_scores(features, labels, texts), share) - _MARGIN
    prototypes = class_prototypes(features, labels, texts).astype(np.float32)
    return InlierTest(prototypes, float(np.float32(threshold)), share)


def is_extrapolated(share: float, n_images: int) -> bool:
    """Return whether so few images have no score as low as the threshold of a share."""
    return share * (n_images + 1) < 1


def _low_score(scores: F64, share: float) -> float:
    """Return the score below which a new image of the classes is with probability `share`.

    It is below the k-th lowest of n scores with probability k / (n + 1). Below the lowest the tail
    is taken as exponential, with the scale of the lower half of the scores.
    """
    n = len(scores)
    low = float(np.quantile(scores, share, method="weibull"))
    if is_extrapolated(share, n):
        scale = (np.median(scores) - low) / np.log((n + 1) / 2)
        low -= float(scale * np.log(1 / (share * (n + 1))))
    return low


def class_prototypes(features: F32, labels: I64, texts: F32) -> F64:
    """Return unit rows f64[C, e]; a class may have no images."""
    return _prototypes(*_sums(features, labels, len(texts)), texts.astype(np.float64))


def _sums(features: F32, labels: I64, n_classes: int) -> tuple[F64, F64]:
    """Return the sums f64[C, e] of the features by class, and the numbers f64[C, 1] of images."""
    sums = np.zeros((n_classes, features.shape[1]))
    np.add.at(sums, labels, features.astype(np.float64))
    return sums, np.bincount(labels, minlength=n_classes)[:, None].astype(np.float64)


def _prototypes(sums: F64, counts: F64, texts: F64) -> F64:
    centre = (sums / np.maximum(counts, 1))[counts[:, 0] > 0].mean(axis=0)
    rows = sums + TEXT_COUNT * (centre + texts - texts.mean(axis=0))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.where(lengths > _TINY, rows / np.maximum(lengths, _TINY), texts))


def out_of_fold_scores(features: F32, labels: I64, texts: F32) -> F64:
    """Return the scores f64[n] of training images by prototypes that were made without them."""
    n, wide = len(labels), texts.astype(np.float64)
    folds = np.empty(n, dtype=np.int64)
    folds[np.argsort(labels, kind="stable")] = np.arange(n) % min(n, _MOST_FOLDS)
    sums, counts = _sums(features, labels, len(texts))
    scores = np.empty(n)
    for k in range(min(n, _MOST_FOLDS)):
        own = folds == k
        held_out, n_held_out = _sums(features[own], labels[own], len(texts))
        # A class of which no image is left has a sum of 0, without the rounding of a difference.
        n_left = counts - n_held_out
        prototypes = _prototypes(np.where(n_left > 0, sums - held_out, 0), n_left, wide)
        scores[own] = (features[own].astype(np.float64) @ prototypes.T).max(axis=1)
    return scores


@dataclass(frozen=True)
class Refusals:
    """Inlier scores of images of the classes, and of foreign images; those below 0 are refused."""

    share: float
    """The share of images of the classes that was to be refused."""
    own: F32
    """f32[n]"""
    foreign: F32 | None = None
    """f32[m]"""
    n_shared: int = 0
    """Foreign images that are also training, validation or test images, by content."""

    @property
    def refused(self) -> Proportion:
        """The refused images of the classes."""
        return Proportion(int((self.own < 0).sum()), len(self.own))

    @property
    def accepted(self) -> Proportion | None:
        """The foreign images that were not refused."""
        if self.foreign is None:
            return None
        return Proportion(int((self.foreign >= 0).sum()), len(self.foreign))

    @property
    def auroc(self) -> float | None:
        return None if self.foreign is None else auroc(self.own, self.foreign)

    def to_json(self) -> dict[str, Json]:
        """Return shares with their 95 % intervals, and the AUROC."""
        found: dict[str, Json] = {"reject": self.share, "own_refused": _described(self.refused)}
        if self.accepted is None:
            return found
        return found | {
            "foreign_accepted": _described(self.accepted),
            "foreign_shared": self.n_shared,
            "auroc": self.auroc,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return lines of a table: what, its value, 95 % interval and images."""
        shares = {"own images refused": self.refused, "foreign images accepted": self.accepted}
        rows = [
            (what, f"{p.accuracy:.1%}", f"{p.interval[0]:.1%} to {p.interval[1]:.1%}", str(p.n))
            for what, p in shares.items()
            if p is not None
        ]
        return rows if self.auroc is None else [*rows, ("AUROC", f"{self.auroc:.3f}", "", "")]


def _described(found: Proportion) -> dict[str, Json]:
    return {"share": found.accuracy, "interval": [*found.interval], "n": found.n}


def auroc(own: F32, foreign: F32) -> float:
    """Return the probability that an own image has a higher score than a foreign one; ties ½.

    Example:
        >>> import numpy as np
        >>> auroc(np.float32([2, 3]), np.float32([1, 2]))
        0.875

    """
    order = np.sort(own)
    at_most = np.searchsorted(order, foreign, side="right")
    below = np.searchsorted(order, foreign, side="left")
    return float(1 - (at_most + below).mean() / (2 * len(own)))

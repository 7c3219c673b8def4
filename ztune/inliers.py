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

    The threshold is the quantile of scores by prototypes without the image itself. Shapes: features
    f32[n, e] and texts f32[C, e], unit rows; labels i64[n].
    """
    scores = out_of_fold_scores(features, labels, texts)
    # With the method `weibull` a new image is below the quantile with this probability.
    threshold = np.quantile(scores, share, method="weibull") - _MARGIN
    prototypes = class_prototypes(features, labels, texts).astype(np.float32)
    return InlierTest(prototypes, float(np.float32(threshold)))


def class_prototypes(features: F32, labels: I64, texts: F32) -> F64:
    """Return unit rows f64[C, e]; a class may have no images."""
    C = len(texts)
    counts = np.bincount(labels, minlength=C)[:, None]
    sums = np.zeros((C, features.shape[1]))
    np.add.at(sums, labels, features.astype(np.float64))
    wide = texts.astype(np.float64)
    centre = (sums / np.maximum(counts, 1))[counts[:, 0] > 0].mean(axis=0)
    rows = sums + TEXT_COUNT * (centre + wide - wide.mean(axis=0))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.where(lengths > _TINY, rows / np.maximum(lengths, _TINY), wide))


def out_of_fold_scores(features: F32, labels: I64, texts: F32) -> F64:
    """Return the scores f64[n] of training images by prototypes that were made without them."""
    n = len(labels)
    folds = np.empty(n, dtype=np.int64)
    folds[np.argsort(labels, kind="stable")] = np.arange(n) % min(n, _MOST_FOLDS)
    scores = np.empty(n)
    for k in range(min(n, _MOST_FOLDS)):
        own = folds == k
        prototypes = class_prototypes(features[~own], labels[~own], texts)
        scores[own] = (features[own].astype(np.float64) @ prototypes.T).max(axis=1)
    return scores


@dataclass(frozen=True)
class Refusals:
    """Scores of images of the classes, and of foreign images; those below 0 are refused."""

    own: F32
    """f32[n]"""
    foreign: F32 | None = None
    """f32[m]"""

    @property
    def refused(self) -> Proportion:
        """The refused images of the classes."""
        return Proportion(int((self.own < 0).sum()), len(self.own))

    def to_json(self) -> dict[str, Json]:
        """Return shares with their 95 % intervals, and the AUROC."""
        found: dict[str, Json] = {"own_refused": _described(self.refused)}
        if self.foreign is None:
            return found
        accepted = Proportion(int((self.foreign >= 0).sum()), len(self.foreign))
        return found | {
            "foreign_accepted": _described(accepted),
            "auroc": auroc(self.own, self.foreign),
        }


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

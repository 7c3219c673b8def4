"""What a closed-form head is fitted on, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ztune.logits import FeatureClassifier, Kernel
from ztune.types import F32, F64, I64, Json


@dataclass(frozen=True)
class Shots:
    """The labelled pictures' features, and the hand-written prompts' text features."""

    features: F32
    """f32[n, e], unit rows; with views row v * n_pictures + i is view v of picture i."""
    labels: I64
    """i64[n], every class at least once."""
    text_features: F32
    """f32[C, e], unit rows."""
    logit_scale: float
    logit_bias: float = 0.0
    held_out: tuple[F32, I64] | None = None
    """Validation pictures f32[N, e] and their labels, where there are any."""
    n_views: int = 1

    @property
    def n_classes(self) -> int:
        return len(self.text_features)

    @property
    def zero_shot(self) -> F64:
        """The zero-shot classifier f64[C, e], the logit scale in it; the bias apart."""
        return np.asarray(np.float64(self.logit_scale) * self.text_features.astype(np.float64))

    @property
    def pictures(self) -> tuple[F64, I64]:
        """One unit row f64[n_pictures, e] and label a picture: the mean direction of its views."""
        n_pictures = len(self.labels) // self.n_views
        views = self.features.astype(np.float64).reshape(self.n_views, n_pictures, -1)
        mean = views.mean(axis=0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return np.asarray(mean), self.labels[:n_pictures]

    def without(self, left_out: NDArray[np.bool_]) -> Shots:
        """Return the shots less some pictures bool[n_pictures], all their views and validation."""
        kept = np.tile(~left_out, self.n_views)
        return replace(self, features=self.features[kept], labels=self.labels[kept], held_out=None)


@dataclass(frozen=True)
class Fitted:
    """A head's classifier, and the settings that it comes from."""

    classifier: FeatureClassifier
    chosen: Mapping[str, Json]
    """Every setting of the head and nothing else, those that were left open as it chose them."""


def classifier_of(weight: F64, bias: F64, kernel: Kernel | None = None) -> FeatureClassifier:
    """Round weight f64[C, e] and bias f64[C] once, at the very end."""
    return FeatureClassifier(weight.astype(np.float32), bias.astype(np.float32), kernel)

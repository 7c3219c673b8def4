"""What a closed-form head is fitted on, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ztune.logits import FeatureClassifier
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
        return np.float64(self.logit_scale) * self.text_features.astype(np.float64)


@dataclass(frozen=True)
class Fitted:
    """A head's classifier, and the hyper-parameters that it chose."""

    classifier: FeatureClassifier
    chosen: Mapping[str, Json]

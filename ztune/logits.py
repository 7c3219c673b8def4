"""Classifiers from image features to logits, which all artifacts reduce to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ztune.types import F32, F64

LEAST_LENGTH = np.float32(1e-12)
"""Of a whitened feature: shorter ones are not scaled to unit length."""


@dataclass(frozen=True)
class Whitening:
    """An affine map of features, scaled to unit length: A (f − centre) / |A (f − centre)|."""

    centre: F32
    """f32[e]"""
    matrix: F32
    """A f32[e, e], symmetric."""

    def __call__(self, features: F32) -> F32:
        """Return unit rows f32[N, e]; 0 for a feature at the centre."""
        moved = (features - self.centre) @ self.matrix
        lengths = np.sqrt((moved * moved).sum(axis=1, keepdims=True))
        return np.asarray(moved / np.maximum(lengths, LEAST_LENGTH))


@dataclass(frozen=True)
class InlierTest:
    """Whether unit features are near a prototype: a score below 0 means none of the classes.

    The score is the largest cosine to a prototype minus the threshold.
    """

    prototypes: F32
    """f32[C, e], unit rows."""
    threshold: float
    share: float
    """The share of images of the classes that it was set to refuse."""

    def __call__(self, features: F32) -> F32:
        """Return scores f32[N] of unit features f32[N, e]."""
        nearest = (features @ self.prototypes.T).max(axis=1)
        return np.asarray(nearest - np.float32(self.threshold))


@dataclass(frozen=True)
class Kernel:
    """The cache part of the logits: exp(−sharpness (1 − f keysᵀ)) values.

    On unit features 1 − f·k is half the squared distance: this is an RBF kernel.
    """

    keys: F32
    """f32[n, e], unit rows."""
    values: F32
    """f32[n, C]"""
    sharpness: float
    whitening: Whitening | None = None
    """Applied to the features first; the keys are whitened."""

    def __call__(self, features: F32) -> F32:
        """Return f32[N, C] of unit features f32[N, e]."""
        if self.whitening is not None:
            features = self.whitening(features)
        distances = np.float32(1) - features @ self.keys.T
        return np.asarray(np.exp(-np.float32(self.sharpness) * distances) @ self.values)


@dataclass(frozen=True)
class FeatureClassifier:
    """Logits of unit features: `weight f + bias`, plus a kernel's if any.

    Probabilities are the softmax of the logits divided by the temperature.
    """

    weight: F32
    """f32[C, e]"""
    bias: F32
    """f32[C]"""
    kernel: Kernel | None = None
    temperature: float = 1.0

    def of_classes(self, rows: Sequence[int]) -> FeatureClassifier:
        """Return the classifier of some classes."""
        chosen, kernel = list(rows), self.kernel
        if kernel is not None:
            kernel = replace(kernel, values=np.ascontiguousarray(kernel.values[:, chosen]))
        return replace(self, weight=self.weight[chosen], bias=self.bias[chosen], kernel=kernel)

    def logits(self, features: F32) -> F32:
        """Return f32[N, C] of unit features f32[N, e]."""
        affine: F32 = features @ self.weight.T + self.bias
        return affine if self.kernel is None else affine + self.kernel(features)


def log_probabilities(logits: F32, temperature: float = 1.0) -> F64:
    """Return the logarithms f64[N, C] of the softmax of logits f32[N, C] / temperature."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))

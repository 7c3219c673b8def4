"""Classifiers from image features to logits, which all artifacts reduce to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.types import F32


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

    def __call__(self, features: F32) -> F32:
        """Return f32[N, C] of unit features f32[N, e]."""
        distances = np.float32(1) - features @ self.keys.T
        return np.asarray(np.exp(-np.float32(self.sharpness) * distances) @ self.values)


@dataclass(frozen=True)
class FeatureClassifier:
    """Logits of unit features: `weight f + bias`, plus a kernel's if any."""

    weight: F32
    """f32[C, e]"""
    bias: F32
    """f32[C]"""
    kernel: Kernel | None = None

    def logits(self, features: F32) -> F32:
        """Return f32[N, C] of unit features f32[N, e]."""
        affine: F32 = features @ self.weight.T + self.bias
        return affine if self.kernel is None else affine + self.kernel(features)

"""Text features of a mixture of prompts: W = Σ_j w_j T(c_j), and those of other class names."""

from __future__ import annotations

import numpy as np

from ztune.errors import DataError
from ztune.types import F32, F64, PromptEncoder

_SHARE = 0.2  # of the mixture, for other class names
_TOO_LARGE = 1e30  # products with a logit scale and features could overflow float32


def mix_text_features(encoder: PromptEncoder, contexts: F32, weights: F32, at_once: int) -> F32:
    """Return Σ_j weights_j T(contexts_j), f32[..., C, e], summed in float64.

    Shapes: contexts f32[K, m, d], weights f32[..., K]. `at_once` is the number of contexts per
    call: in low precision it must equal that of the weights' fit.

    Raises: DataError if the sum is not finite, or too large for a classifier.
    """
    total: F64 = np.zeros(())
    for first in range(0, len(contexts), at_once):
        some = slice(first, first + at_once)
        texts = encoder.encode(np.ascontiguousarray(contexts[some]))
        total = total + np.tensordot(weights[..., some].astype(np.float64), texts, 1)
    if not np.abs(total).max() < _TOO_LARGE:  # also catches NaN
        raise DataError(
            "the mixture's text features are not finite or far too large: its weights are damaged"
        )
    return np.asarray(total, dtype=np.float32)


def blend_for_other_classes(mixed: F32, hand_written: F32) -> F32:
    """Return text features f32[C, e] of class names that a mixture's weights were not fitted to.

    Weights of both signs cancel on their own classes and not on others, where the sum can be many
    times as long as a text feature. Then its direction is rarely right: it is scaled to a mean
    length of at most 1, and gets a small share (docs/research/auto.md).
    """
    length = float(np.linalg.norm(mixed.astype(np.float64), axis=1).mean())
    blended = _SHARE / max(1.0, length) * mixed.astype(np.float64) + (1 - _SHARE) * hand_written
    return np.asarray(blended, dtype=np.float32)

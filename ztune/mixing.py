"""Text features of a mixture of prompts, W = Σ_j w_j T(c_j), encoded some prompts at a time."""

from __future__ import annotations

import numpy as np

from ztune.errors import DataError
from ztune.types import F32, F64, PromptEncoder

_TOO_LARGE = 1e30  # times a logit scale and a feature's values, float32 might not hold it


def mixed_texts(encoder: PromptEncoder, contexts: F32, weights: F32, at_once: int) -> F32:
    """Return Σ_j weights_j T(contexts_j), f32[C, e], summed in float64.

    Shapes: contexts f32[K, m, d], weights f32[K]. `at_once` contexts go into a call, which low
    precision scales by what is in it: as many as when the weights were found.

    Raises: DataError when the sum is not finite, or too large for a classifier.
    """
    total: F64 = np.zeros(())
    for first in range(0, len(contexts), at_once):
        some = slice(first, first + at_once)
        texts = encoder.encode(np.ascontiguousarray(contexts[some]))
        total = total + np.tensordot(weights[some].astype(np.float64), texts, 1)
    if not np.abs(total).max() < _TOO_LARGE:  # as NaN is not either
        raise DataError(
            "the mixture's text features are not finite or far too large: its weights are damaged"
        )
    return np.asarray(total, dtype=np.float32)

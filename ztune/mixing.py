"""Text features of a mixture of prompts, W = Σ_j w_j T(c_j), encoded in chunks."""

from __future__ import annotations

import numpy as np

from ztune.errors import DataError
from ztune.types import F32, F64, PromptEncoder

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

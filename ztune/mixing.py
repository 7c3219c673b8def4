"""Text features of a mixture of prompts, W = Σ_j w_j T(c_j), encoded some prompts at a time."""

from __future__ import annotations

import numpy as np

from ztune.errors import DataError
from ztune.types import F32, F64, PromptEncoder


def mixed_texts(encoder: PromptEncoder, contexts: F32, weights: F32, at_once: int) -> F32:
    """Return Σ_j weights_j T(contexts_j), f32[C, e], summed in float64.

    Shapes: contexts f32[K, m, d], weights f32[K]. `at_once` contexts go into a call, which low
    precision scales by what is in it: as many as when the weights were found.

    Raises: DataError when the sum is not finite.
    """
    total: F64 = np.zeros(())
    for first in range(0, len(contexts), at_once):
        some = slice(first, first + at_once)
        texts = encoder.encode(np.ascontiguousarray(contexts[some]))
        total = total + np.tensordot(weights[some].astype(np.float64), texts, 1)
    if not np.isfinite(total).all() or np.abs(total).max() > np.finfo(np.float32).max:
        raise DataError("the mixture's text features are not finite: its weights are damaged")
    return np.asarray(total, dtype=np.float32)

"""Text features of a mixture of prompts, W = Σ_j w_j T(c_j), encoded some prompts at a time."""

from __future__ import annotations

import numpy as np

from ztune.types import F32, F64, PromptEncoder

MIXED_AT_ONCE = 10


def mixed_texts(encoder: PromptEncoder, contexts: F32, weights: F32, at_once: int) -> F32:
    """Return Σ_j weights_j T(contexts_j), f32[C, e], summed in float64.

    Shapes: contexts f32[K, m, d], weights f32[K]. `at_once` contexts go into a call.
    """
    total: F64 = np.zeros(())
    for first in range(0, len(contexts), at_once):
        some = slice(first, first + at_once)
        texts = encoder.encode(np.ascontiguousarray(contexts[some]))
        total = total + np.tensordot(weights[some].astype(np.float64), texts, 1)
    return np.asarray(total, dtype=np.float32)

"""Contexts of words: the point names rows of the token table."""

from __future__ import annotations

import numpy as np

from ztune.types import F32, F64, Prompts


class VocabularyContext:
    """context = table[point]: token ids f64[m], whole numbers."""

    def __init__(self, table: F32, n_tokens: int):
        """Take the token table f32[vocabulary, d] and m."""
        self._table = table
        self._n_tokens = n_tokens

    @property
    def dim(self) -> int:
        return self._n_tokens

    def __call__(self, points: F64) -> Prompts:
        return Prompts(contexts=np.asarray(self._table[points.astype(np.int64)], np.float32))

"""Scores from an endpoint that returns only the probabilities of its top classes."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ztune.objective import cross_entropy
from ztune.types import I64, Batch, Prompts, Scorer, Scores

Real = TypeVar("Real", np.float32, np.float64)

_LEAST = 1e-6  # minimum probability of a class that the endpoint leaves out


def top_k_logits(logits: NDArray[Real], k: int) -> NDArray[Real]:
    """Return log-probabilities [..., C] estimated from the k most probable classes.

    The other classes share the remaining probability evenly. With k ≥ C these are the
    log-probabilities of the logits [..., C].
    """
    C = logits.shape[-1]
    moved = logits.astype(np.float64)
    moved -= moved.max(axis=-1, keepdims=True)
    moved -= np.log(np.exp(moved).sum(axis=-1, keepdims=True))
    if k < C:
        p = np.exp(moved)
        top = np.argsort(-p, axis=-1, kind="stable")[..., :k]
        known = np.zeros(p.shape, dtype=bool)
        np.put_along_axis(known, top, True, axis=-1)
        rest = np.maximum(1 - np.where(known, p, 0).sum(axis=-1, keepdims=True), 0) / (C - k)
        moved = np.log(np.maximum(np.where(known, p, rest), _LEAST))
    return moved.astype(logits.dtype)


class TopClasses:
    """Scores computed from an endpoint's top k probabilities (a Scorer)."""

    def __init__(self, scorer: Scorer, k: int):
        self._scorer = scorer
        self._k = k

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        scores = self._scorer(prompts, batch, labels)
        if scores.logits is None:
            return scores
        logits = top_k_logits(scores.logits, self._k)
        losses = cross_entropy(logits, labels).mean(axis=-1)
        return Scores(losses, scores.accuracies, logits)

"""What an endpoint still tells that says less than its logits: probabilities of its top classes."""

from __future__ import annotations

import numpy as np

from ztune.objective import cross_entropy
from ztune.optim.convex import softmax
from ztune.types import F32, I64, Batch, Prompts, Scorer, Scores

_LEAST = 1e-6  # probability of a class that the endpoint says nothing of


def top_k_logits(logits: F32, k: int) -> F32:
    """Return log-probabilities f32[..., C] as known from the k most probable classes alone.

    What the endpoint leaves out is shared by the other classes evenly. Logits f32[..., C] whose
    k is C or more come back as log-probabilities, which differ by a constant for each picture.
    """
    C = logits.shape[-1]
    if k >= C:
        moved = logits - logits.max(axis=-1, keepdims=True)
        return np.asarray(moved - np.log(np.exp(moved).sum(axis=-1, keepdims=True)), np.float32)
    p = softmax(logits)
    order = np.argsort(-p, axis=-1, kind="stable")
    kept = np.zeros_like(p)
    top = order[..., :k]
    np.put_along_axis(kept, top, np.take_along_axis(p, top, axis=-1), axis=-1)
    rest = np.maximum(1 - kept.sum(axis=-1, keepdims=True), 0) / (C - k)
    return np.asarray(np.log(np.maximum(np.where(kept > 0, kept, rest), _LEAST)), dtype=np.float32)


class TopClasses:
    """Scores as an endpoint's top k probabilities tell them (a Scorer)."""

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

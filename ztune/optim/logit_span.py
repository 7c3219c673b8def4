"""A low-rank basis of the logits of many prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ZtuneError
from ztune.types import F32, F64

_NEGLIGIBLE = 1e-5  # share of the logits' energy outside the basis
_LEAST_ENERGY = 1e-30  # of logits that do not distinguish classes


@dataclass
class LogitSpan:
    """Logits of K prompts on the same images, kept as at most 2 · rank linear combinations."""

    rank: int
    rows: F32
    """f32[R, N, C]: Σ_j mixing[j, r] Z_j, each Z_j centred over the classes."""
    mixing: F64
    """f64[K, R], orthonormal columns."""
    total: F64
    """f64[N, C]: Σ_j Z_j."""
    squares: float
    """Sum of squares of all logits."""

    @classmethod
    def empty(cls, rank: int) -> LogitSpan:
        return cls(rank, np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros((0, 0)), 0.0)

    def add(self, logits: F32) -> None:
        """Add the logits f32[P, N, C] of more prompts."""
        new = logits - logits.mean(axis=-1, keepdims=True)
        self.squares += float((new.astype(np.float64) ** 2).sum())
        if not len(self.mixing):
            self.total = np.zeros(new.shape[1:])
            self.rows = np.zeros((0, *new.shape[1:]), np.float32)
        self.total = self.total + new.sum(axis=0, dtype=np.float64)
        (K, R), P = self.mixing.shape, len(new)
        mixing = np.zeros((K + P, R + P))
        mixing[:K, :R], mixing[K:, R:] = self.mixing, np.eye(P)
        self.mixing, self.rows = mixing, np.concatenate([self.rows, new])
        if len(self.rows) > 2 * self.rank:
            turn = self._principal()
            self.rows, self.mixing = _combined(turn, self.rows), self.mixing @ turn

    def _principal(self) -> F64:
        """Return f64[R, r], the at most `rank` combinations of rows with the most energy."""
        flat = self.rows.reshape(len(self.rows), -1)
        products = (flat @ flat.T).astype(np.float64)
        if not np.isfinite(products).all():
            raise ZtuneError(
                f"the products of the logits of {len(self.mixing)} prompts are not finite (matrix "
                "products may be wrong on this machine: run ztune doctor)"
            )
        values, vectors = np.linalg.eigh(products)
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        left_over = 1 - np.cumsum(values) / max(float(values.sum()), _LEAST_ENERGY)
        enough = int((left_over > _NEGLIGIBLE).sum()) + 1
        return np.ascontiguousarray(vectors[:, : min(self.rank, enough)])

    def contrasts(self) -> tuple[F32, F64]:
        """Return a basis f32[r, N, C] and its mixing f64[K, r], whose columns sum to 0.

        The component common to all prompts is left out: weights moved along the basis keep their
        sum, and so the part of the text features that does not depend on the prompt.
        """
        turn = self._principal()
        sums = (self.mixing @ turn).sum(axis=0)
        r = len(sums)
        # An orthonormal basis of the orthogonal complement of the sums.
        whole, _ = np.linalg.qr(np.concatenate([sums[:, None], np.eye(r)], axis=1))
        turn = turn @ whole[:, 1:r]
        return _combined(turn, self.rows), self.mixing @ turn

    @property
    def mean_square(self) -> float:
        return self.squares / (len(self.mixing) * self.total.size)


def _combined(turn: F64, rows: F32) -> F32:
    flat = turn.T.astype(np.float32) @ rows.reshape(len(rows), -1)
    return np.asarray(flat.reshape(-1, *rows.shape[1:]))

"""Softmax regression along given directions of logits: the convex problem of a Gauss–Newton step.

Logits are Z + Σ_k a_k D_k, linear in a; their cross-entropy is convex in them, so in a as well:

    min over a of  meanᵢ CE(Zᵢ + Σ_k a_k D_kᵢ, yᵢ) + ½ aᵀ R a.

Newton's method with the exact curvature Dᵀ (diag p − p pᵀ) D needs no queries. Source of the
curvature: the generalised Gauss–Newton matrix, Schraudolph, Neural Computation 14, 2002, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64

_ENOUGH = 1e-6  # minimum gain of a Newton step in nats
_SUFFICIENT = 1e-4  # share of the predicted decrease (Armijo)
_SHORTEST = 1e-3
_VALUES_AT_ONCE = 4_000_000  # weighted copies of the directions: 16 MB


@dataclass(frozen=True)
class Terms:
    """Sums over some images of the loss and its derivatives in a."""

    n: int
    loss: float
    gradient: F64
    """f64[K]"""
    curvature: F64
    """f64[K, K]"""

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            self.n + other.n,
            self.loss + other.loss,
            self.gradient + other.gradient,
            self.curvature + other.curvature,
        )

    def __sub__(self, other: Terms) -> Terms:
        return Terms(
            self.n - other.n,
            self.loss - other.loss,
            self.gradient - other.gradient,
            self.curvature - other.curvature,
        )

    def step(self, a: F64, ridge: F64) -> F64:
        """Return Newton's step f64[K] from a on the mean loss with a ridge f64[K, K]."""
        matrix = self.curvature / self.n + ridge
        # Directions without curvature and ridge do not move.
        matrix[np.diag_indices_from(matrix)] += 1e-10 * np.trace(matrix) / len(matrix) + 1e-30
        return np.asarray(-np.linalg.solve(matrix, self.gradient / self.n + ridge @ a))


@dataclass(frozen=True)
class SoftmaxProblem:
    """Logits linear in a, and their labels."""

    base: F32
    """Z f32[N, C]."""
    directions: F32
    """D f32[K, N, C]."""
    labels: I64
    """i64[N]"""

    def logits(self, a: F64) -> F32:
        """Return Z + Σ_k a_k D_k, f32[N, C]."""
        K = len(self.directions)
        moved = a.astype(np.float32) @ self.directions.reshape(K, self.base.size)
        return self.base + moved.reshape(self.base.shape)

    def rows(self, chosen: np.ndarray) -> SoftmaxProblem:
        """Return the problem of a subset of the images."""
        return SoftmaxProblem(self.base[chosen], self.directions[:, chosen], self.labels[chosen])

    def loss(self, a: F64, ridge: F64) -> float:
        """Return the objective: the mean cross-entropy in nats and the ridge."""
        return float(cross_entropy(self.logits(a), self.labels).mean() + 0.5 * a @ ridge @ a)

    def terms(self, a: F64) -> Terms:
        """Return loss, gradient and curvature at a."""
        logits = self.logits(a)
        p = softmax(logits)
        residual = p.copy()
        residual[np.arange(len(p)), self.labels] -= 1
        K, (N, C) = len(self.directions), p.shape
        gradient = self.directions.reshape(K, -1) @ residual.ravel()
        curvature = np.zeros((K, K))
        rows = max(1, _VALUES_AT_ONCE // (K * C))
        for first in range(0, N, rows):
            some = slice(first, first + rows)
            D, P = self.directions[:, some], p[some]
            spread = (D * np.sqrt(P)).reshape(K, -1)
            mean = np.matmul(D.transpose(1, 0, 2), P[:, :, None])[:, :, 0].T
            curvature += spread @ spread.T - mean @ mean.T
        loss = float(cross_entropy(logits, self.labels).sum())
        return Terms(N, loss, gradient.astype(np.float64), curvature)

    def minimise(self, ridge: F64, start: F64, n_steps: int) -> F64:
        """Return a f64[K] after at most `n_steps` of Newton's method with backtracking.

        `ridge` R is f64[K, K], positive semi-definite.
        """
        a = start
        for _ in range(n_steps):
            before = a
            a, gained = self.take_newton_step(a, self.terms(a), ridge)
            if a is before or gained < _ENOUGH:
                break
        return a

    def take_newton_step(self, a: F64, terms: Terms, ridge: F64) -> tuple[F64, float]:
        """Return the point after one Newton step with backtracking, and its gain.

        `terms` are those of all images at a; a is returned if nothing is gained.
        """
        value = float(terms.loss / terms.n + 0.5 * a @ ridge @ a)
        step = terms.step(a, ridge)
        slope = float((terms.gradient / terms.n + ridge @ a) @ step)
        length = 1.0
        while True:
            found = self.loss(a + length * step, ridge)
            if found <= value + _SUFFICIENT * length * slope or length < _SHORTEST:
                break
            length /= 2
        return (a + length * step, value - found) if found < value else (a, 0.0)


def total(terms: Sequence[Terms]) -> Terms:
    """Return the sum of the terms of parts of the images, at the same a."""
    whole = terms[0]
    for one in terms[1:]:
        whole = whole + one
    return whole


def softmax(logits: F32) -> F32:
    """Return the probabilities f32[..., C] of logits f32[..., C]."""
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True), dtype=np.float32)

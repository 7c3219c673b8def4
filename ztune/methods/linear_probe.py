"""Multinomial logistic regression on image features, without texts.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
ICML 2021, section 3.2 and appendix A: only the strength of an L2 penalty is searched.

    minimise  ½ ‖W‖² + C Σᵢ CE(W fᵢ + b, yᵢ),    b without penalty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ztune.heads import (
    Fitted,
    Predict,
    Shots,
    choose,
    classifier_of,
    explain_singular,
    grid_values,
    require_positive,
)
from ztune.methods.base import HeadMethod
from ztune.types import F32, F64, I64

CS = tuple(float(c) for c in np.logspace(-1, 3, 9))
DEFAULT_C = 10.0
MAX_ITERATIONS = 1000
# Relative to the gradient's norm at 0. Comparing settings needs less precision than the result.
_TOLERANCE = 1e-6
_COARSE_TOLERANCE = 1e-3
_MEMORY = 10


@dataclass(frozen=True)
class LinearProbeConfig:
    """C weights the loss against the penalty; null chooses it on held-out images, else 10."""

    C: float | None = None

    def __post_init__(self) -> None:
        require_positive("C", self.C)


def logistic_regression(
    features: F32,
    labels: I64,
    n_classes: int,
    C: float,
    first: F64 | None = None,
    tolerance: float = _TOLERANCE,
) -> F64:
    """Return θ f64[n_classes, e + 1], the last column the bias, from `first` or 0 on.

    With X = [F 1], the Hessian is at most ½ C XᵀX + diag(1 … 1, 0) = L Lᵀ for each class. In the
    variables φ = θ L it is therefore at most the identity for any C and any features, and L-BFGS
    needs few steps. Shapes: features f32[n, e], labels i64[n].
    """
    X = np.concatenate([features.astype(np.float64), np.ones((len(labels), 1))], axis=1)
    penalised = np.ones(X.shape[1])
    penalised[-1] = 0
    L = np.linalg.cholesky(0.5 * C * X.T @ X + np.diag(penalised))
    L_inverse = np.linalg.inv(L)
    own = (np.arange(len(labels)), labels)

    def loss_and_gradient(phi: F64) -> tuple[float, F64]:
        theta = phi @ L_inverse
        p = X @ theta.T
        p -= p.max(axis=1, keepdims=True)
        chosen = p[own]
        np.exp(p, out=p)
        sums = p.sum(axis=1)
        loss = C * float((np.log(sums) - chosen).sum())
        loss += 0.5 * float(np.square(theta * penalised).sum())
        p /= sums[:, None]
        p[own] -= 1
        return loss, (C * (p.T @ X) + theta * penalised) @ L_inverse.T

    phi = np.zeros((n_classes, X.shape[1])) if first is None else first @ L
    loss, gradient = loss_and_gradient(phi)
    enough = tolerance * np.linalg.norm(loss_and_gradient(np.zeros_like(phi))[1])
    pairs: list[tuple[F64, F64]] = []
    for _ in range(MAX_ITERATIONS):
        if np.linalg.norm(gradient) <= enough:
            break
        direction = -_inverse_hessian_times(gradient, pairs)
        slope = float(np.vdot(direction, gradient))
        step = 1.0
        while True:
            new_phi = phi + step * direction
            new_loss, new_gradient = loss_and_gradient(new_phi)
            if new_loss <= loss + 1e-4 * step * slope or step < 1e-6:
                break
            step /= 2
        if new_loss >= loss:  # no further progress in float64
            break
        pairs = [*pairs, (new_phi - phi, new_gradient - gradient)][-_MEMORY:]
        phi, loss, gradient = new_phi, new_loss, new_gradient
    return np.asarray(phi @ L_inverse)


def _inverse_hessian_times(gradient: F64, pairs: list[tuple[F64, F64]]) -> F64:
    """Return L-BFGS's two-loop product from the last steps and gradient differences."""
    q = gradient.copy()
    weights = []
    for s, y in reversed(pairs):
        weights.append(float(np.vdot(s, q) / np.vdot(s, y)))
        q -= weights[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= np.vdot(s, y) / np.vdot(y, y)
    for (s, y), a in zip(pairs, reversed(weights), strict=True):
        q += (a - float(np.vdot(y, q) / np.vdot(s, y))) * s
    return np.asarray(q)


@explain_singular("linear-probe")
def fit_linear_probe(config: LinearProbeConfig, shots: Shots, seed: int) -> Fitted:
    """Return logits `W f + b`, fitted to all views as separate images.

    The grid is fitted from the strongest penalty, each warm-started from the last. It is slow with
    many classes: with 16 images of 1,000 classes at e = 512, an iteration is 33 GFLOP and the grid
    takes about a thousand per fold; set C, or use validation images.
    """
    Cs = grid_values(config.C, CS)

    def fit(training: Shots) -> Predict:
        path: list[F64] = []
        data = training.features, training.labels, training.n_classes
        for C in Cs:
            first = path[-1] if path else None
            path.append(logistic_regression(*data, C, first, _COARSE_TOLERANCE))

        def predict(features: F64) -> Iterator[F64]:
            for theta in path:
                yield features @ theta[:, :-1].T + theta[:, -1]

        return predict

    C = choose(Cs, DEFAULT_C, fit, shots, seed)
    theta = logistic_regression(shots.features, shots.labels, shots.n_classes, C)
    return Fitted(classifier_of(theta[:, :-1], theta[:, -1]), {"C": C})


METHOD = HeadMethod(
    name="linear-probe",
    title="logistic regression on image features, without texts",
    paper="Radford et al., ICML 2021 (arXiv 2103.00020)",
    config=LinearProbeConfig,
    fit=fit_linear_probe,
)

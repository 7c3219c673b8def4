"""Gaussian discriminant analysis on image features, blended with the zero-shot logits.

Source: Wang et al., "A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation", ICLR 2024.
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
from ztune.methods.base import HeadMethod, Preset
from ztune.types import F32, F64, I64

ALPHAS = tuple(float(a) for a in np.logspace(-4, 2, 7))
DEFAULT_ALPHA = 1.0


@dataclass(frozen=True)
class GdaConfig:
    """alpha weights the Gaussian part; null chooses it on held-out images."""

    alpha: float | None = None

    def __post_init__(self) -> None:
        require_positive("alpha", self.alpha, or_zero=True)


def gaussian_classifier(features: F32, labels: I64, n_classes: int) -> tuple[F64, F64]:
    """Return W f64[C, e] and b f64[C] of the shared-covariance Gaussian classifier.

    Σ⁻¹ = e pinv((n − 1) Σ + tr(Σ) I), W = µ Σ⁻¹, b = log π − ½ diag(µ Σ⁻¹ µᵀ), π uniform.
    Shapes: features f32[n, e], labels i64[n], every class at least once.
    """
    wide = features.astype(np.float64)
    e = wide.shape[1]
    means = np.stack([wide[labels == c].mean(axis=0) for c in range(n_classes)])
    centred = wide - means[labels]
    scatter = centred.T @ centred  # (n − 1) Σ
    covariance_trace = np.trace(scatter) / max(len(wide) - 1, 1)
    W = np.zeros_like(means)  # of features without any spread
    if covariance_trace > 0:  # then the matrix has full rank, and its inverse is the pseudo-inverse
        W = e * np.linalg.solve(scatter + covariance_trace * np.eye(e), means.T).T
    b = -np.log(n_classes) - 0.5 * np.einsum("ce,ce->c", W, means)
    return W, b


@explain_singular("gda")
def fit_gda(config: GdaConfig, shots: Shots, seed: int) -> Fitted:
    """Return logits `zero-shot + alpha (W f + b)`, one affine map."""
    alphas = grid_values(config.alpha, ALPHAS)

    def fit(training: Shots) -> Predict:
        W, b = gaussian_classifier(training.features, training.labels, training.n_classes)

        def predict(features: F64) -> Iterator[F64]:
            zero_shot, gaussian = features @ training.zero_shot.T, features @ W.T + b
            for alpha in alphas:
                yield zero_shot + alpha * gaussian

        return predict

    alpha = choose(alphas, DEFAULT_ALPHA, fit, shots, seed)
    W, b = gaussian_classifier(shots.features, shots.labels, shots.n_classes)
    classifier = classifier_of(shots.zero_shot + alpha * W, shots.logit_bias + alpha * b)
    return Fitted(classifier, {"alpha": alpha})


METHOD = HeadMethod(
    name="gda",
    title="Gaussian discriminant analysis on features, blended with zero-shot",
    paper="Wang et al., ICLR 2024",
    config=GdaConfig,
    fit=fit_gda,
    presets={"published": Preset(views=10, least_area=0.5)},
)

"""Gaussian discriminant analysis on image features, blended with the zero-shot logits.

Source: Wang et al., "A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation", ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError
from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64

ALPHAS = tuple(float(a) for a in np.logspace(-4, 2, 7))


@dataclass(frozen=True)
class GdaConfig:
    """alpha weighs the Gaussian part; null chooses it on held-out pictures."""

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha >= 0:
            raise ConfigError(f"alpha is {self.alpha}, expected at least 0")


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
    precision = e * np.linalg.pinv(scatter + covariance_trace * np.eye(e), hermitian=True)
    W = means @ precision
    b = -np.log(n_classes) - 0.5 * np.einsum("ce,ce->c", W, means)
    return W, b


def choose_alpha(zero_shot: F64, gaussian: F64, labels: I64) -> float:
    """Return the alpha of the grid with the best accuracy, then loss, on held-out logits.

    Shapes: f64[N, C] each, labels i64[N].
    """

    def badness(alpha: float) -> tuple[float, float]:
        logits = zero_shot + alpha * gaussian
        wrong = float((logits.argmax(axis=1) != labels).mean())
        return wrong, float(cross_entropy(logits.astype(np.float32), labels).mean())

    return min(ALPHAS, key=badness)


def fit_gda(
    config: GdaConfig,
    features: F32,
    labels: I64,
    zero_shot_weight: F64,
    held_out: tuple[F32, I64] | None,
    seed: int,
    n_views: int = 1,
) -> tuple[F64, float]:
    """Return the blended classifier as one affine map f64[C, e + 1] and the alpha used.

    The last column is the bias; logits are `zero_shot f + alpha (W f + b)`. Shapes: features
    f32[n, e], zero_shot_weight f64[C, e] with the logit scale already in it. alpha is chosen on
    `held_out` where given, else by cross-validation over the training pictures. With views, row
    v * n_pictures + i is view v of picture i.
    """
    n_classes = len(zero_shot_weight)
    W, b = gaussian_classifier(features, labels, n_classes)
    if config.alpha is not None:
        alpha = config.alpha
    elif held_out is not None:
        pictures = held_out[0].astype(np.float64)
        alpha = choose_alpha(pictures @ zero_shot_weight.T, pictures @ W.T + b, held_out[1])
    else:
        alpha = _cross_validated_alpha(features, labels, zero_shot_weight, seed, n_views)
    weight = zero_shot_weight + alpha * W
    return np.concatenate([weight, alpha * b[:, None]], axis=1), alpha


def _cross_validated_alpha(
    features: F32, labels: I64, zero_shot_weight: F64, seed: int, n_views: int
) -> float:
    """Choose alpha by stratified folds; one picture per class leaves nothing to hold out."""
    n_classes = len(zero_shot_weight)
    pictures = labels[: len(labels) // n_views]
    n_folds = min(4, int(np.bincount(pictures, minlength=n_classes).min()))
    if n_folds < 2:
        return 1.0
    rng = np.random.default_rng([seed, 4])
    fold = np.empty(len(pictures), dtype=np.int64)
    for c in range(n_classes):
        members = rng.permutation(np.flatnonzero(pictures == c))
        fold[members] = np.arange(len(members)) % n_folds
    fold = np.tile(fold, n_views)  # all views of a picture are held out together
    zero_shot = features.astype(np.float64) @ zero_shot_weight.T
    gaussian = np.empty_like(zero_shot)
    for k in range(n_folds):
        W, b = gaussian_classifier(features[fold != k], labels[fold != k], n_classes)
        gaussian[fold == k] = features[fold == k].astype(np.float64) @ W.T + b
    return choose_alpha(zero_shot, gaussian, labels)

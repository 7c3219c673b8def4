"""LP++: a linear probe whose weights blend images and texts per class.

Source: Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", CVPR 2024,
arXiv 2404.02285.

Logits are fᵀ (w_k + α_k t_k), the loss L is the mean cross-entropy over n images, and w and α
are two blocks that take turns. With p the probabilities of one image, the Hessian of its loss in
its logits is diag(p) − p pᵀ, and no larger than I/2 for any p. By the chain rule, then,

    L has a Hessian in w    of at most  γ_w = ½ λmax(FᵀF / n),
    L has a Hessian in α    of at most  diag(γ_α),  γ_αk = ½ meanᵢ (fᵢ·t_k)².

A gradient step of 1/γ in a block minimises a quadratic upper bound of L: the loss never rises, and
no step size is searched. The paper's bounds use a quarter, the largest second derivative in one
logit, and one γ_α for all classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError
from ztune.heads import Fitted, Shots, classifier_of, explain_singular
from ztune.methods.base import HeadMethod
from ztune.types import F64, I64

_ROWS = 16_384  # images at a time: 130 MB of probabilities for 1,000 classes


@dataclass(frozen=True)
class LpPlusConfig:
    """iterations: of both blocks. Early stopping regularises; no validation is used."""

    iterations: int = 300

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ConfigError(f"iterations is {self.iterations}, expected at least 0")


@dataclass
class BlendedProbe:
    """The two blocks w f64[C, e] and α f64[C], with their descent steps."""

    F: F64
    """f64[n, e], unit rows."""
    labels: I64
    t: F64
    """f64[C, e], unit rows."""
    w: F64
    alpha: F64

    def __post_init__(self) -> None:
        n = len(self.F)
        largest = float(np.linalg.eigvalsh(self.F.T @ self.F)[-1])
        self._w_bound = largest / (2 * n)
        squares = np.zeros(len(self.t))
        for rows in self._chunks():
            squares += ((self.F[rows] @ self.t.T) ** 2).sum(axis=0)
        # If all cosines of a class are 0, its α has no effect.
        self._alpha_bound = np.maximum(squares / (2 * n), np.finfo(np.float64).tiny)

    def descend(self) -> None:
        """Take one step in w, then one in α at the new w."""
        self.w = self.w - self._residual_products(by_text=False) / self._w_bound
        self.alpha = self.alpha - self._residual_products(by_text=True) / self._alpha_bound

    def loss(self) -> float:
        """Return the mean cross-entropy in nats."""
        total = 0.0
        for rows in self._chunks():
            logits = self.F[rows] @ self.weight.T
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[np.arange(len(logits)), self.labels[rows]]
            total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
        return total / len(self.F)

    @property
    def weight(self) -> F64:
        return self.w + self.alpha[:, None] * self.t

    def _residual_products(self, by_text: bool) -> F64:
        """Return ∂L/∂α f64[C] or ∂L/∂w f64[C, e]: p − y times what the block is multiplied by."""
        weight = self.weight
        gradient = np.zeros_like(weight)
        for rows in self._chunks():
            F = self.F[rows]
            p = F @ weight.T
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            p[np.arange(len(p)), self.labels[rows]] -= 1
            gradient += p.T @ F
        gradient /= len(self.F)
        # A logit changes with α_k as f·t_k: the same products, taken along t_k.
        return np.einsum("ce,ce->c", gradient, self.t) if by_text else gradient

    def _chunks(self) -> list[slice]:
        return [slice(i, i + _ROWS) for i in range(0, len(self.F), _ROWS)]


def start(shots: Shots) -> BlendedProbe:
    """Return the published start: w from the class means, one α for all classes.

    α⁰ = 2.5 scale · mean_k mean_{i in k} f_i·t_k, at least 0. The published factor is 250, for
    models whose logit scale is 100.
    """
    F, t = shots.features.astype(np.float64), shots.text_features.astype(np.float64)
    w = np.stack([F[shots.labels == c].mean(axis=0) for c in range(shots.n_classes)])
    alpha = max(0.0, 2.5 * shots.logit_scale * float(np.einsum("ce,ce->c", w, t).mean()))
    return BlendedProbe(F, shots.labels, t, w, np.full(shots.n_classes, alpha))


@explain_singular("lp++")
def fit_lp_plus(config: LpPlusConfig, shots: Shots, seed: int) -> Fitted:
    """Return logits `f (w + α t)`, fitted to all views as separate images.

    Each iteration is four products of [n, e] by [e, C]: with 16 images of 1,000 classes at e = 512,
    a few minutes in total on a few cores.
    """
    probe = start(shots)
    for _ in range(config.iterations):
        probe.descend()
    bias = np.full(shots.n_classes, shots.logit_bias)
    return Fitted(classifier_of(probe.weight, bias), {"iterations": config.iterations})


METHOD = HeadMethod(
    name="lp++",
    title="a linear probe blended with the text features, step sizes in closed form",
    paper="Huang et al., CVPR 2024 (arXiv 2404.02285)",
    config=LpPlusConfig,
    fit=fit_lp_plus,
)

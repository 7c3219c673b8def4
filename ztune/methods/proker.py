"""ProKeR: kernel ridge regression that stays close to the zero-shot classifier.

Source: Bendou et al., "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language
Models", CVPR 2025, arXiv 2501.11175.

It minimises, over functions near the zero-shot f₀ in the kernel's space,

    Σᵢ ‖f(xᵢ) − yᵢ‖² + ridge ‖f − f₀‖²,    y one-hot.

With g = f − f₀ this is kernel ridge regression of the residuals, so

    f(x) = f₀(x) + k(x, X) (K + ridge I)⁻¹ (Y − f₀(X)),    k(x, x') = exp(−beta (1 − x·x')).

Scale: f₀ are the cosines f·t, as in the published experiments, since one-hot targets have their
size, unlike logits of a hundred. The published code divides K by the ridge only inside the inverse,
which weights the residual part by another factor of the ridge; the minimiser above does not. Logits
are `scale f`, which affects probabilities but not the order of the classes. In the limit of a large
ridge and with the model's scale they are the zero-shot logits.
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
    first_of_each_class,
    grid_values,
    require_positive,
)
from ztune.logits import Kernel
from ztune.methods.base import HeadMethod
from ztune.types import F64, I64

BETAS = (0.5, 1.0, 2.0, 5.0, 10.0)
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALES = (1.0, 0.5, 0.2, 0.1, 0.05)  # of the model's own logit scale
DEFAULT_BETA = 2.0
DEFAULT_RIDGE = 1.0

# Images on which beta and ridge are chosen. The ridge is the ratio of noise to kernel variance and
# does not depend on the number of images, so a subset is enough.
_MOST = 4096


@dataclass(frozen=True)
class ProkerConfig:
    """beta is the kernel's sharpness, scale the logits per unit of f.

    null chooses on held-out images; without any it is beta 2, ridge 1 and the model's logit scale.
    """

    beta: float | None = None
    ridge: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "ridge", "scale"):
            require_positive(name, getattr(self, name))


def residual_coefficients(keys: F64, residuals: F64, beta: float, ridge: float | F64) -> F64:
    """Return (K + ridge I)⁻¹ R, f64[n, C], of unit rows f64[n, e] and R f64[n, C].

    A ridge f64[n] has a value for each row.
    """
    system = keys @ keys.T
    # In place: with 16,000 images this matrix takes 2 GB.
    system -= 1
    system *= beta
    np.exp(system, out=system)
    system[np.diag_indices_from(system)] += ridge
    return np.linalg.solve(system, residuals)


@explain_singular("proker")
def fit_proker(config: ProkerConfig, shots: Shots, seed: int) -> Fitted:
    """Return logits `scale f` as above; a key is the mean direction of an image's views.

    Time is O(n³) and memory O(n²): with 16 images of 1,000 classes a dense system of 16,000
    unknowns, a few minutes and 5 GB. beta and ridge are chosen on at most 4,096 images.
    """
    betas, ridges = grid_values(config.beta, BETAS), grid_values(config.ridge, RIDGES)
    scales = grid_values(config.scale, [shots.logit_scale * factor for factor in SCALES])
    grid = [(b, r, s) for b in betas for r in ridges for s in scales]
    default = (
        DEFAULT_BETA if config.beta is None else config.beta,
        DEFAULT_RIDGE if config.ridge is None else config.ridge,
        scales[0],
    )
    t = shots.text_features.astype(np.float64)

    def fit(training: Shots) -> Predict:
        keys, labels = _thinned(*training.images, training.n_classes)
        residuals = np.eye(training.n_classes)[labels] - keys @ t.T
        coefficients = {
            (beta, ridge): residual_coefficients(keys, residuals, beta, ridge)
            for beta in betas
            for ridge in ridges
        }

        def predict(features: F64) -> Iterator[F64]:
            f0, distances = features @ t.T, 1 - features @ keys.T
            for beta in betas:
                k = np.exp(-beta * distances)
                for ridge in ridges:
                    f = f0 + k @ coefficients[beta, ridge]
                    for scale in scales:
                        yield scale * f

        return predict

    beta, ridge, scale = choose(grid, default, fit, shots, seed)
    keys, labels = shots.images
    residuals = np.eye(shots.n_classes)[labels] - keys @ t.T
    values = scale * residual_coefficients(keys, residuals, beta, ridge)
    bias = np.full(shots.n_classes, shots.logit_bias)
    kernel = Kernel(keys.astype(np.float32), values.astype(np.float32), beta)
    chosen = {"beta": beta, "ridge": ridge, "scale": scale}
    return Fitted(classifier_of(scale * t, bias, kernel), chosen)


def _thinned(keys: F64, labels: I64, n_classes: int) -> tuple[F64, I64]:
    """Keep the first images of each class, up to the limit."""
    if len(labels) <= _MOST:
        return keys, labels
    kept = first_of_each_class(labels, n_classes, _MOST)
    return keys[kept], labels[kept]


METHOD = HeadMethod(
    name="proker",
    title="kernel ridge regression on what zero-shot leaves over",
    paper="Bendou et al., CVPR 2025 (arXiv 2501.11175)",
    config=ProkerConfig,
    fit=fit_proker,
)

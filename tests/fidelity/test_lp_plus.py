"""LP++ (Huang et al., CVPR 2024) on four images of two classes, worked out by hand.

The order along the circle is class 0, 1, 0, 1, which no line through 0 separates: the loss has a
minimum.
"""

import math

import numpy as np
import pytest

from ztune.heads import Shots
from ztune.methods.lp_plus import LpPlusConfig, fit_lp_plus, start
from ztune.types import F64

IMAGES = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
LABELS = np.array([0, 1, 0, 1])
TEXTS = np.array([[0.8, 0.6], [-0.6, 0.8]])
SHOTS = Shots(IMAGES.astype(np.float32), LABELS, TEXTS.astype(np.float32), 4.0, -3.0)

# Class means, and α = 2.5 · scale · mean of (0.8 + 0.96) / 2 and (0 + 0.8) / 2.
W_START = np.array([[0.8, 0.4], [0.4, 0.8]])
ALPHA_START = 2.5 * 4 * 0.64
# FᵀF is [[2, 0.96], [0.96, 2]] with eigenvalues 1.04 and 2.96.
W_BOUND = 0.5 * 2.96 / 4
# Half the mean squared cosine: of 0.8, 1, 0.96, 0.6 with one text, −0.6, 0, 0.28, 0.8 with another.
ALPHA_BOUNDS = 0.5 * 2.9216 / 4, 0.5 * 1.0784 / 4


def residuals(w: F64, alpha: F64) -> list[float]:
    """Return each image's probability of class 0 minus its target, by the logistic function."""
    found = []
    for f, label in zip(IMAGES, LABELS, strict=True):
        margin = f @ (w[0] + alpha[0] * TEXTS[0]) - f @ (w[1] + alpha[1] * TEXTS[1])
        found.append(1 / (1 + math.exp(-margin)) - float(label == 0))
    return found


def gradients(w: F64, alpha: F64) -> tuple[F64, F64]:
    """Return the derivatives of the mean cross-entropy in w and α."""
    in_w, in_alpha = np.zeros((2, 2)), np.zeros(2)
    for f, r in zip(IMAGES, residuals(w, alpha), strict=True):
        in_w += np.array([r * f, -r * f]) / 4
        in_alpha += np.array([r * (f @ TEXTS[0]), -r * (f @ TEXTS[1])]) / 4
    return in_w, in_alpha


def loss(w: F64, alpha: F64) -> float:
    total = 0.0
    for label, r in zip(LABELS, residuals(w, alpha), strict=True):
        p = r + float(label == 0)
        total -= math.log(p if label == 0 else 1 - p)
    return total / 4


def test_the_start() -> None:
    probe = start(SHOTS)
    np.testing.assert_allclose(probe.w, W_START, atol=1e-6)
    np.testing.assert_allclose(probe.alpha, [ALPHA_START, ALPHA_START], rtol=1e-6)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_steps_of_hand_computed_sizes(n_steps: int) -> None:
    """A step in w, then one in α at the new w, each one over the bound of the curvature."""
    w, alpha = W_START.copy(), np.full(2, ALPHA_START)
    for _ in range(n_steps):
        w = w - gradients(w, alpha)[0] / W_BOUND
        slope = gradients(w, alpha)[1]
        alpha = np.array([alpha[k] - slope[k] / ALPHA_BOUNDS[k] for k in range(2)])
    classifier = fit_lp_plus(LpPlusConfig(iterations=n_steps), SHOTS, 1).classifier
    expected = [w[k] + alpha[k] * TEXTS[k] for k in range(2)]
    np.testing.assert_allclose(classifier.weight, expected, atol=1e-5)
    np.testing.assert_array_equal(classifier.bias, [-3, -3])


def test_many_steps_reach_the_loss_of_plain_gradient_descent() -> None:
    w, alpha = W_START.copy(), np.full(2, ALPHA_START)
    first = loss(w, alpha)
    for _ in range(400):
        in_w, in_alpha = gradients(w, alpha)
        w, alpha = w - 0.5 * in_w, alpha - 0.5 * in_alpha
    assert max(np.abs(in_w).max(), np.abs(in_alpha).max()) < 1e-7
    weight = fit_lp_plus(LpPlusConfig(iterations=1000), SHOTS, 1).classifier.weight
    found = loss(weight.astype(np.float64), np.zeros(2))
    assert found == pytest.approx(loss(w, alpha), abs=1e-6)
    assert found < first - 0.1

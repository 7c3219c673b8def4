"""The linear probe (Radford et al., ICML 2021) by other solvers, on a few images in the plane.

The objective is ½ ‖W‖² + C Σᵢ CE(W fᵢ + b, yᵢ), with a bias that is not penalised.
"""

import math

import numpy as np
import pytest

from tests.fidelity.support import unit
from ztune.heads import Shots
from ztune.methods.linear_probe import LinearProbeConfig, fit_linear_probe
from ztune.types import F64, I64

IMAGES = np.array(
    [unit(1, 0.1), unit(1, 0.4), unit(1, 0.9), unit(0.3, 1), unit(-0.2, 1), unit(-1, 0.8)],
    dtype=np.float32,
)
TWO, THREE = np.array([0, 0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])


def shots_of(labels: I64, held_out: tuple[np.ndarray, np.ndarray] | None = None) -> Shots:
    texts = np.array([unit(1, 1)] * (int(labels.max()) + 1), dtype=np.float32)
    return Shots(IMAGES, labels, texts, 100.0, -3.0, held_out)


def logistic(labels: I64, strength: float) -> F64:
    """Return (u, c) f64[3] of two classes by Newton's method.

    For a given u = w₁ − w₀ the penalty is least at w₁ = −w₀ = u / 2, where it is ¼ ‖u‖².
    """
    found = np.zeros(3)
    for _ in range(30):
        gradient = np.array([found[0] / 2, found[1] / 2, 0.0])
        hessian = np.diag([0.5, 0.5, 0.0])
        for f, label in zip(IMAGES.astype(np.float64), labels, strict=True):
            x = np.array([f[0], f[1], 1.0])
            p = 1 / (1 + math.exp(-float(found @ x)))
            gradient += strength * (p - label) * x
            hessian += strength * p * (1 - p) * np.outer(x, x)
        found = found - np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-9
    return found


@pytest.mark.parametrize("strength", [0.3, 5.0])
def test_two_classes_are_a_logistic_regression(strength: float) -> None:
    u0, u1, c = logistic(TWO, strength)
    classifier = fit_linear_probe(LinearProbeConfig(C=strength), shots_of(TWO), 1).classifier
    weight, bias = classifier.weight, classifier.bias
    # The solver ends at a millionth of the first gradient.
    np.testing.assert_allclose(weight, [[-u0 / 2, -u1 / 2], [u0 / 2, u1 / 2]], atol=1e-4)
    assert bias[1] - bias[0] == pytest.approx(c, abs=1e-4)


def test_three_classes_by_plain_gradient_descent() -> None:
    strength, x = 2.0, IMAGES.astype(np.float64)
    W, b = np.zeros((3, 2)), np.zeros(3)
    for _ in range(1200):
        in_W, in_b = W.copy(), np.zeros(3)
        for f, label in zip(x, THREE, strict=True):
            powers = np.exp(W @ f + b)
            for k in range(3):
                residual = strength * (powers[k] / powers.sum() - float(k == label))
                in_W[k] += residual * f
                in_b[k] += residual
        W, b = W - 0.12 * in_W, b - 0.12 * in_b
    assert max(np.abs(in_W).max(), np.abs(in_b).max()) < 1e-5
    classifier = fit_linear_probe(LinearProbeConfig(C=strength), shots_of(THREE), 1).classifier
    np.testing.assert_allclose(classifier.weight, W, atol=1e-4)
    np.testing.assert_allclose(classifier.bias - classifier.bias[0], b - b[0], atol=1e-4)


def test_the_strength_is_the_best_on_validation_images() -> None:
    validation = np.array([unit(8, 6), unit(0, -5), unit(6, 8), unit(-5, 1)], dtype=np.float32)
    labels = np.array([1, 0, 0, 1])
    scores = []
    for i in range(9):
        strength = 10 ** (-1 + i / 2)
        u0, u1, c = logistic(TWO, strength)
        n_wrong, loss = 0, 0.0
        for f, label in zip(validation.astype(np.float64), labels, strict=True):
            margin = (u0 * f[0] + u1 * f[1] + c) * (1 if label else -1)
            n_wrong += margin < 0
            loss += math.log(1 + math.exp(-margin))
        scores.append((n_wrong, loss, strength))
    _, _, expected = min(scores)
    chosen = fit_linear_probe(LinearProbeConfig(), shots_of(TWO, (validation, labels)), 1).chosen
    assert isinstance(chosen["C"], float)
    assert math.isclose(chosen["C"], expected)
    assert math.isclose(expected, math.sqrt(10))  # neither an end of the grid nor the default

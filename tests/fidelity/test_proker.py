"""ProKeR (Bendou et al., CVPR 2025): the minimum of its objective by the stationarity condition."""

import math

import numpy as np
import pytest

from ztune.heads import Shots
from ztune.methods.proker import ProkerConfig, fit_proker
from ztune.types import F64

IMAGES = np.array([[1, 0], [0.6, 0.8], [0, 1]], dtype=np.float32)
LABELS = np.array([0, 1, 1])
TEXTS = np.array([[0.8, 0.6], [-0.6, 0.8]], dtype=np.float32)
COSINES = np.array([[1, 0.6, 0], [0.6, 1, 0.8], [0, 0.8, 1]])  # between images
ZERO_SHOT = np.array([[0.8, -0.6], [0.96, 0.28], [0.6, 0.8]])  # f₀: of images with texts
TARGETS = np.array([[1, 0], [0, 1], [0, 1]])


def solve(matrix: F64, right: F64) -> F64:
    """Return the solution of a linear system by Gauss's elimination with pivots."""
    rows = np.concatenate([matrix, right], axis=1)
    n = len(rows)
    for k in range(n):
        largest = k + int(np.abs(rows[k:, k]).argmax())
        rows[[k, largest]] = rows[[largest, k]]
        rows[k] /= rows[k, k]
        for other in range(n):
            if other != k:
                rows[other] -= rows[other, k] * rows[k]
    return np.asarray(rows[:, n:])


@pytest.mark.parametrize("ridge", [0.1, 2.0])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_the_function_is_stationary(beta: float, ridge: float) -> None:
    """Minimise Σᵢ ‖f(xᵢ) − yᵢ‖² + ridge ‖f − f₀‖² over f = f₀ + Σⱼ aⱼ k(·, xⱼ).

    ‖f − f₀‖² is tr(Aᵀ K A). The derivative in A is 2 K (f₀ + K A − Y) + 2 ridge K A, and it is zero
    for (K K + ridge K) A = K (Y − f₀).
    """
    scale, bias = 20.0, -3.0
    K = np.array([[math.exp(-beta * (1 - COSINES[i, j])) for j in range(3)] for i in range(3)])
    A = solve(K @ K + ridge * K, K @ (TARGETS - ZERO_SHOT))
    shots = Shots(IMAGES, LABELS, TEXTS, 100.0, bias)
    classifier = fit_proker(ProkerConfig(beta, ridge, scale), shots, 1).classifier
    logits = classifier.logits(IMAGES)
    for i in range(3):
        for c in range(2):
            f = ZERO_SHOT[i, c] + sum(K[i, j] * A[j, c] for j in range(3))
            assert logits[i, c] == pytest.approx(scale * f + bias, abs=1e-4)
    # Another image, (0.8, −0.6): cosines 0.8, 0 and −0.6 with images, 0.28 and −0.96 with texts.
    kernel = [math.exp(-beta * (1 - cosine)) for cosine in (0.8, 0, -0.6)]
    expected = [
        scale * (zero_shot + sum(kernel[j] * A[j, c] for j in range(3))) + bias
        for c, zero_shot in enumerate((0.28, -0.96))
    ]
    found = classifier.logits(np.array([[0.8, -0.6]], dtype=np.float32))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)

"""Gaussian discriminant analysis (Wang et al., ICLR 2024) by Bayes' rule with an explicit inverse.

Two dimensions, so that matrices are inverted by their adjugate.
"""

import math

import numpy as np

from tests.fidelity.support import unit
from ztune.heads import Shots
from ztune.methods.gda import GdaConfig, fit_gda, gaussian_classifier
from ztune.types import F64

# Three classes with two, one and three images.
IMAGES = np.array(
    [unit(1, 0.1), unit(1, 0.5), unit(0.2, 1), unit(-1, 0.3), unit(-1, 0.9), unit(-1, -0.2)],
    dtype=np.float32,
)
LABELS = np.array([0, 0, 1, 2, 2, 2])
TEXTS = np.array([unit(1, 1), unit(-0.5, 1), unit(-1, -1)], dtype=np.float32)
TESTED = np.array([unit(0.7, 0.7), unit(-0.3, 0.9), unit(0.1, -1)], dtype=np.float32)
SCALE, BIAS = 100.0, -3.0


def log_joints(f: F64) -> list[float]:
    """Return log p(f | c) + log p(c) of each class, apart from a constant for all classes.

    The paper's precision is d · pinv((n − 1) Σ + tr(Σ) I), and classes are equally likely.
    """
    x, n, d = IMAGES.astype(np.float64), len(IMAGES), 2
    means = []
    for c in range(3):
        own = [x[i] for i in range(n) if LABELS[i] == c]
        means.append(sum(own) / len(own))
    scatter = np.zeros((2, 2))  # (n − 1) Σ
    for i in range(n):
        centred = x[i] - means[LABELS[i]]
        for row in range(2):
            for column in range(2):
                scatter[row, column] += centred[row] * centred[column]
    trace = (scatter[0, 0] + scatter[1, 1]) / (n - 1)  # tr(Σ)
    p, q, r = scatter[0, 0] + trace, scatter[0, 1], scatter[1, 1] + trace
    precision = d * np.array([[r, -q], [-q, p]]) / (p * r - q * q)
    return [
        -0.5 * float((f - means[c]) @ precision @ (f - means[c])) + math.log(1 / 3)
        for c in range(3)
    ]


def test_the_classifier_is_bayes_rule() -> None:
    W, b = gaussian_classifier(IMAGES, LABELS, 3)
    for f in TESTED.astype(np.float64):
        logits, expected = W @ f + b, log_joints(f)
        # fᵀ Σ⁻¹ f is the same for all classes, so only differences are comparable.
        np.testing.assert_allclose(logits - logits[0], np.array(expected) - expected[0], rtol=1e-9)
    # At f = 0 that term vanishes.
    np.testing.assert_allclose(b, log_joints(np.zeros(2)), rtol=1e-9)


def blended(f: F64, alpha: float) -> list[float]:
    """Return differences from the first class of `scale f·t + alpha log p(f, c)`."""
    joints = log_joints(f)
    logits = [SCALE * float(f @ TEXTS[c].astype(np.float64)) + alpha * joints[c] for c in range(3)]
    return [logit - logits[0] for logit in logits]


def test_logits_are_zero_shot_plus_alpha_times_the_log_joint() -> None:
    shots = Shots(IMAGES, LABELS, TEXTS, SCALE, BIAS)
    classifier = fit_gda(GdaConfig(alpha=2.0), shots, seed=1).classifier
    logits = classifier.logits(TESTED)
    for i, f in enumerate(TESTED.astype(np.float64)):
        # float32 logits of about 100
        np.testing.assert_allclose(logits[i] - logits[i, 0], blended(f, 2.0), atol=1e-3)
    at_zero = BIAS + 2 * np.array(log_joints(np.zeros(2)))
    np.testing.assert_allclose(classifier.bias, at_zero, rtol=1e-6)


def test_alpha_is_the_power_of_ten_that_is_best_on_validation_images() -> None:
    # 10 has the fewest errors, although smaller values have lower losses.
    validation = np.array([unit(-1, -6), unit(-3, -1), unit(-5, -1), unit(-6, 2)], np.float32)
    labels = np.array([2, 1, 1, 2])
    scores = []
    for power in range(-4, 3):
        n_wrong, loss = 0, 0.0
        for f, label in zip(validation.astype(np.float64), labels, strict=True):
            logits = blended(f, 10.0**power)
            n_wrong += int(np.argmax(logits)) != label
            loss += math.log(sum(math.exp(z - max(logits)) for z in logits)) + max(logits)
            loss -= logits[label]
        scores.append((n_wrong, loss, 10.0**power))
    expected = min(scores)[2]
    shots = Shots(IMAGES, LABELS, TEXTS, SCALE, BIAS, (validation, labels))
    chosen = fit_gda(GdaConfig(), shots, seed=1).chosen["alpha"]
    assert isinstance(chosen, float)
    assert math.isclose(chosen, expected)
    assert expected == 10  # neither an end of the grid nor the default

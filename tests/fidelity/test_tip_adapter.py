"""Tip-Adapter without training (Zhang et al., ECCV 2022), as sums over the cache."""

import math

import numpy as np

from tests.fidelity.support import unit
from ztune.heads import Shots
from ztune.methods.tip_adapter import ALPHAS, BETAS, TipConfig, fit_tip
from ztune.types import F64

IMAGES = np.array([[1, 0], [0.6, 0.8], [0, 1], [-0.8, 0.6]], dtype=np.float32)
LABELS = np.array([0, 0, 1, 2])
TEXTS = np.array([[0.8, 0.6], [-0.6, 0.8], [-1, 0]], dtype=np.float32)


def test_logits_of_one_image_by_hand() -> None:
    """The image (1, 0) has cosines 1, 0.6, 0 and −0.8 with the cache, and 0.8, −0.6, −1 with texts.

    So its affinities exp(−β (1 − cosine)) are 1, exp(−0.4 β), exp(−β) and exp(−1.8 β).
    """
    shots = Shots(IMAGES, LABELS, TEXTS, 100.0)
    for alpha, beta in ((1.0, 5.5), (3.0, 2.0)):
        logits = fit_tip(TipConfig(alpha, beta), shots, 1).classifier.logits(IMAGES[:1])[0]
        expected = [
            80 + alpha * (1 + math.exp(-0.4 * beta)),
            -60 + alpha * math.exp(-beta),
            -100 + alpha * math.exp(-1.8 * beta),
        ]
        np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_the_key_of_an_image_is_the_direction_of_the_mean_of_its_views() -> None:
    # Views at ±36.87° of (1, 0), whose mean is (0.8, 0); the other image has (0, 1) twice.
    views = np.array([[0.8, 0.6], [0, 1], [0.8, -0.6], [0, 1]], dtype=np.float32)
    shots = Shots(views, np.array([0, 1, 0, 1]), np.eye(2, dtype=np.float32), 10.0, n_views=2)
    classifier = fit_tip(TipConfig(alpha=2.0, beta=3.0), shots, 1).classifier
    logits = classifier.logits(np.array([[0.6, 0.8]], dtype=np.float32))[0]
    expected = [6 + 2 * math.exp(-3 * 0.4), 8 + 2 * math.exp(-3 * 0.2)]
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def summed(f: F64, alpha: float, beta: float) -> list[float]:
    logits = [10 * float(f @ t) for t in TEXTS.astype(np.float64)]
    for key, label in zip(IMAGES.astype(np.float64), LABELS, strict=True):
        logits[label] += alpha * math.exp(-beta * (1 - float(f @ key)))
    return logits


def test_alpha_and_beta_are_the_best_on_validation_images() -> None:
    validation = np.array([unit(0, 8), unit(-3, 7), unit(0, -8), unit(-1, -4)], np.float32)
    labels = np.array([2, 1, 0, 2])
    scores = []
    for beta in BETAS:
        for alpha in ALPHAS:
            n_wrong, loss = 0, 0.0
            for f, label in zip(validation.astype(np.float64), labels, strict=True):
                logits = summed(f, alpha, beta)
                n_wrong += int(np.argmax(logits)) != label
                loss += math.log(sum(math.exp(z) for z in logits)) - logits[label]
            scores.append((n_wrong, loss, alpha, beta))
    _, _, alpha, beta = min(scores)
    assert (alpha, beta) == (20, 1)  # neither ends of the grids nor defaults
    shots = Shots(IMAGES, LABELS, TEXTS, 10.0, held_out=(validation, labels))
    assert fit_tip(TipConfig(), shots, 1).chosen == {"alpha": alpha, "beta": beta}

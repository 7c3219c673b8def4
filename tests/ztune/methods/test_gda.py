from dataclasses import replace

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.heads import Shots
from ztune.methods.gda import ALPHAS, GdaConfig, fit_gda, gaussian_classifier


def blobs(n_per_class: int, seed: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return unit features around three fixed directions."""
    rng = np.random.default_rng(seed)
    centres = np.eye(3, 5)
    labels = np.repeat(np.arange(3), n_per_class)
    features = centres[labels] + spread * rng.standard_normal((len(labels), 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels.astype(np.int64)


def shots_of(
    features: np.ndarray,
    labels: np.ndarray,
    zero_shot: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    n_views: int = 1,
) -> Shots:
    """Return shots whose zero-shot classifier is `zero_shot`."""
    return Shots(features, labels, zero_shot.astype(np.float32), 1.0, 0.0, held_out, n_views)


def alpha_of(shots: Shots) -> object:
    return fit_gda(GdaConfig(), shots, seed=1).chosen["alpha"]


def test_weights_agree_with_a_transcription_of_the_formulas() -> None:
    features, labels = blobs(6, 1)
    x = features.astype(np.float64)
    n, e = x.shape
    means = np.array([x[labels == c].mean(0) for c in range(3)])
    centred = np.array([x[i] - means[labels[i]] for i in range(n)])
    covariance = np.cov(centred.T)  # divides by n − 1
    precision = e * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(e))
    W = means @ precision
    b = np.log(1 / 3) - 0.5 * np.array([mu @ precision @ mu for mu in means])
    got_W, got_b = gaussian_classifier(features, labels, 3)
    np.testing.assert_allclose(got_W, W, rtol=1e-8)
    np.testing.assert_allclose(got_b, b, rtol=1e-8)


def test_it_classifies_and_blends_with_zero_shot() -> None:
    test, truth = blobs(200, 3)
    zero_shot = 10 * np.random.default_rng(4).standard_normal((3, 5))
    shots = replace(shots_of(*blobs(16, 2), zero_shot, blobs(4, 5)), logit_bias=-2.0)
    fitted = fit_gda(GdaConfig(), shots, seed=1)
    assert fitted.chosen["alpha"] in ALPHAS
    assert (fitted.classifier.logits(test).argmax(1) == truth).mean() > 0.8
    nothing = fit_gda(GdaConfig(alpha=0.0), shots, seed=1).classifier
    np.testing.assert_array_equal(nothing.weight, shots.text_features)
    np.testing.assert_array_equal(nothing.bias, np.float32(-2))


def test_alpha_follows_the_held_out_images() -> None:
    features, labels = blobs(16, 2, spread=0.05)
    right = 10 * np.eye(3, 5)
    # Labels that contradict the training images speak for the texts, and the other way round.
    rotated = (features, (labels + 1) % 3)
    wrong = np.roll(right, 1, axis=0)
    assert alpha_of(shots_of(features, labels, wrong, rotated)) == min(ALPHAS)
    assert alpha_of(shots_of(features, labels, -100 * right, (features, labels))) == max(ALPHAS)


def test_without_held_out_images_alpha_is_cross_validated_and_seeded() -> None:
    shots = shots_of(*blobs(8, 6), -10 * np.eye(3, 5))
    alpha = alpha_of(shots)
    assert isinstance(alpha, float)
    assert alpha >= 1.0
    assert alpha == alpha_of(shots)


def test_one_image_per_class_falls_back_to_zero_shot_and_is_finite() -> None:
    zero_shot = np.eye(3, 5)
    classifier = fit_gda(GdaConfig(), shots_of(*blobs(1, 7), zero_shot), seed=1).classifier
    np.testing.assert_allclose(classifier.weight, zero_shot, atol=1e-9)


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha is -1"):
        GdaConfig(alpha=-1.0)


def test_views_of_an_image_never_vouch_for_each_other() -> None:
    # Without noise of their own, views in other folds would give each image's label away.
    rng = np.random.default_rng(8)
    labels = np.repeat(np.arange(3), 4)
    features = rng.standard_normal((12, 40)).astype(np.float32)
    views, tiled = np.tile(features, (8, 1)), np.tile(labels, 8)
    right = 100 * np.linalg.pinv(features.astype(np.float64)) @ np.eye(3)[labels]
    blended = [alpha_of(shots_of(views, tiled, 1e-3 * right.T, n_views=n)) for n in (1, 8)]
    alone = alpha_of(shots_of(features, labels, 1e-3 * right.T))
    assert blended[1] == alone
    assert isinstance(blended[0], float)
    assert isinstance(alone, float)
    assert blended[0] > alone

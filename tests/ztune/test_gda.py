import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.heads.gda import ALPHAS, GdaConfig, choose_alpha, fit_gda, gaussian_classifier


def blobs(n_per_class: int, seed: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return unit features around three fixed directions."""
    rng = np.random.default_rng(seed)
    centres = np.eye(3, 5)
    labels = np.repeat(np.arange(3), n_per_class)
    features = centres[labels] + spread * rng.standard_normal((len(labels), 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels.astype(np.int64)


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
    features, labels = blobs(16, 2)
    test, truth = blobs(200, 3)
    zero_shot = 10 * np.random.default_rng(4).standard_normal((3, 5))
    affine, alpha = fit_gda(GdaConfig(), features, labels, zero_shot, blobs(4, 5), seed=1)
    assert alpha in ALPHAS
    predicted = (test @ affine[:, :-1].T + affine[:, -1]).argmax(1)
    assert (predicted == truth).mean() > 0.8
    nothing, _ = fit_gda(GdaConfig(alpha=0.0), features, labels, zero_shot, None, seed=1)
    np.testing.assert_array_equal(nothing[:, :-1], zero_shot)
    np.testing.assert_array_equal(nothing[:, -1], 0)


def test_alpha_follows_the_held_out_pictures() -> None:
    labels = np.array([0, 1, 0, 1])
    right = np.where(labels[:, None] == np.arange(2), 1.0, 0.0)
    assert choose_alpha(right, -right, labels) == min(ALPHAS)
    assert choose_alpha(-right, right, labels) == max(ALPHAS)


def test_without_held_out_pictures_alpha_is_cross_validated_and_seeded() -> None:
    features, labels = blobs(8, 6)
    misleading = -10 * np.eye(3, 5)
    _, alpha = fit_gda(GdaConfig(), features, labels, misleading, None, seed=1)
    assert alpha >= 1.0
    assert alpha == fit_gda(GdaConfig(), features, labels, misleading, None, seed=1)[1]


def test_one_picture_per_class_falls_back_to_zero_shot_and_is_finite() -> None:
    features, labels = blobs(1, 7)
    zero_shot = np.eye(3, 5)
    affine, _ = fit_gda(GdaConfig(), features, labels, zero_shot, None, seed=1)
    np.testing.assert_allclose(affine[:, :-1], zero_shot, atol=1e-9)


def test_a_negative_alpha_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha is -1"):
        GdaConfig(alpha=-1.0)


def test_views_of_a_picture_never_vouch_for_each_other() -> None:
    # Without noise of their own, views in other folds would give each picture's label away.
    rng = np.random.default_rng(8)
    labels = np.repeat(np.arange(3), 4)
    features = rng.standard_normal((12, 40)).astype(np.float32)
    views, tiled = np.tile(features, (8, 1)), np.tile(labels, 8)
    right = 100 * np.linalg.pinv(features.astype(np.float64)) @ np.eye(3)[labels]
    blended = [
        fit_gda(GdaConfig(), views, tiled, 1e-3 * right.T, None, seed=1, n_views=n)[1]
        for n in (1, 8)
    ]
    alone = fit_gda(GdaConfig(), features, labels, 1e-3 * right.T, None, seed=1)[1]
    assert blended[1] == alone
    assert blended[0] > alone

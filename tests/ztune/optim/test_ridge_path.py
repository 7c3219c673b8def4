"""The ridge of a fit: which one held-out images choose, and what they would have lost."""

import numpy as np
import pytest

from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem
from ztune.optim.ridge_path import (
    RIDGES,
    Solutions,
    _held_out_logits,
    _within,
    _without,
    cross_validate_ridge,
    fold_of_each,
)
from ztune.types import F64, I64

C = 4
TOLERANCE = 2.5


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def problem(labels: I64, seed: int = 0) -> SoftmaxProblem:
    """Return logits in which ten directions are noise and ten tell the classes apart a little."""
    generator = rng(seed)
    n = len(labels)
    directions = generator.standard_normal((20, n, C))
    directions[:10] += 2 * np.eye(C)[np.arange(n) % C]
    return SoftmaxProblem(
        np.zeros((n, C), np.float32), directions.astype(np.float32), np.asarray(labels)
    )


def solution(given: SoftmaxProblem, unit: float, ridge: float | None, tolerance: float) -> F64:
    return cross_validate_ridge(given, unit, ridge, tolerance).whole


def fixed(given: SoftmaxProblem) -> F64:
    """Return the solutions f64[ridges, r] with each ridge alone, the heaviest first."""
    return np.stack([solution(given, 1.0, float(share), TOLERANCE) for share in RIDGES])


def chosen_ridge(given: SoftmaxProblem) -> float:
    """Return the ridge of the least loss on images left out."""
    found = solution(given, 1.0, None, 0.0)
    gaps = np.linalg.norm(fixed(given) - found, axis=1) / np.linalg.norm(found)
    assert gaps.min() < 0.01
    return float(RIDGES[gaps.argmin()])


@pytest.mark.parametrize("seed", range(4))
def test_noise_gets_a_heavy_ridge_and_what_generalises_a_light_one(seed: int) -> None:
    clean, new_clean = halves(problem(np.arange(160) % C, seed))
    noise, new_noise = halves(problem(rng(seed).integers(0, C, 160), seed))
    assert chosen_ridge(clean) <= 0.01
    assert chosen_ridge(noise) >= 1
    none = np.zeros((20, 20))
    # With the tolerance of the house, images that are new lose less than by either end.
    lost = new_noise.loss(solution(noise, 1.0, None, TOLERANCE), none)
    assert lost < new_noise.loss(fixed(noise)[-1], none) - 0.05
    lost = new_clean.loss(solution(clean, 1.0, None, TOLERANCE), none)
    assert lost < new_clean.loss(fixed(clean)[0], none) - 0.1


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_the_held_out_loss_is_of_images_left_out(ridge: float | None) -> None:
    given = problem(np.arange(80) % C)
    found = cross_validate_ridge(given, 1.0, ridge, TOLERANCE)
    folds = fold_of_each(given.labels)
    assert folds is not None
    own = [
        cross_entropy(given.rows(folds == k).logits(a), given.labels[folds == k])
        for k, a in enumerate(found.without)
    ]
    assert found.held_out is not None
    losses = cross_entropy(found.held_out, given.labels)
    assert losses.mean() == pytest.approx(np.concatenate(own).mean())
    single = problem(np.arange(C))
    assert cross_validate_ridge(single, 1.0, ridge, TOLERANCE).held_out is None


def halves(given: SoftmaxProblem) -> tuple[SoftmaxProblem, SoftmaxProblem]:
    first = np.arange(len(given.labels)) < len(given.labels) // 2
    return given.rows(first), given.rows(~first)


def test_a_tolerance_takes_the_mean_of_the_best_and_all_lighter_ones_within_it() -> None:
    # A third of the labels are wrong: neither the heaviest ridge is best nor the lightest.
    wrong = rng(1).random(160) < 0.3
    labels = np.where(wrong, rng(10).integers(0, C, 160), np.arange(160) % C)
    given, _ = halves(problem(labels, 1))
    best = int(np.searchsorted(-RIDGES, -chosen_ridge(given)))
    assert 0 < best < len(RIDGES) - 1
    found = solution(given, 1.0, None, 1e9)
    np.testing.assert_allclose(found, fixed(given)[best:].mean(axis=0), atol=2e-3)
    lengths = [
        np.linalg.norm(solution(given, 1.0, None, tolerance)) for tolerance in (0.0, 1.0, 3.0, 1e9)
    ]
    assert lengths == sorted(lengths)
    assert lengths[3] > 1.5 * lengths[0]


def test_left_out_losses_are_estimated_close_to_those_of_refits() -> None:
    given = problem(np.arange(80) % C)
    folds = fold_of_each(given.labels)
    assert folds is not None
    parts = [given.rows(folds == k) for k in range(4)]
    for share in (1.0, 0.1):
        ridge = share * np.eye(20)
        a = given.minimise(ridge, np.zeros(20), 30)
        terms = [part.terms(a) for part in parts]
        found = Solutions(a, _without(a, terms, ridge))
        estimated = cross_entropy(_held_out_logits(parts, folds, found), given.labels)
        exact = np.empty(80)
        for k in range(4):
            refit = given.rows(folds != k).minimise(ridge, np.zeros(20), 30)
            exact[folds == k] = cross_entropy(parts[k].logits(refit), parts[k].labels)
        own = cross_entropy(given.logits(a), given.labels)
        # Far closer than the losses of images that were fitted.
        assert exact.mean() > own.mean()
        assert abs(estimated - exact).mean() < 0.2 * abs(own - exact).mean()


def test_folds_are_even_over_the_classes() -> None:
    labels = rng(0).permutation(np.repeat(np.arange(5), [8, 8, 9, 3, 1]))
    folds = fold_of_each(labels)
    assert folds is not None
    assert set(folds) == {0, 1, 2, 3}
    for label in range(5):
        counts = np.bincount(folds[labels == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    labels = np.array([3, 1, 0, 2, 0, 1, 2, 3])
    two = fold_of_each(labels)
    assert two is not None
    for fold in range(4):  # a class that loses an image is next to one that keeps both
        assert sorted(np.bincount(labels[two != fold])) == [1, 1, 2, 2]
    assert fold_of_each(np.arange(6)) is None
    assert fold_of_each(np.array([0, 0, 0, 0, 1, 2, 3])) is None


def test_one_image_of_a_class_leaves_nothing_to_validate_on() -> None:
    rows = np.arange(C)
    given = problem(np.arange(80) % C).rows(rows)
    found = solution(given, 1.0, None, TOLERANCE)
    fixed = solution(given, 1.0, 0.1, TOLERANCE)
    np.testing.assert_array_equal(found, fixed)
    assert np.linalg.norm(found) > 0
    # Ridges are in units of what the logits are in.
    other = solution(given, 0.5, 0.2, TOLERANCE)
    np.testing.assert_array_equal(other, fixed)


def test_a_ridge_is_judged_by_its_paired_difference_from_the_best() -> None:
    common = 10 * rng(0).standard_normal(200) ** 2
    small = rng(1).standard_normal(200)
    small = (small - small.mean()) / small.std()
    # The difference is small against the spread of the losses, yet significant.
    worse = common + 0.01 + 0.02 * small
    assert worse.mean() - common.mean() < 0.02 * common.std() / np.sqrt(200)
    assert not _within(worse, common, 2.5)
    # Seven standard errors, each of 0.02 over the root of 200.
    errors = 0.01 / (0.02 / np.sqrt(200))
    assert 7 < errors < 7.1
    assert _within(worse, common, errors + 0.01)
    assert not _within(worse, common, errors - 0.01)
    # Where one is worse the other is better: the differences say less than either's spread.
    mean = 4 / np.sqrt(200)
    assert _within(small + mean, -small, 2.5)
    assert mean > 2.5 * np.sqrt(2 / 200)
    # The best itself, and a better one.
    assert _within(common, common, 0.0)
    assert _within(common - 0.01, common, 0.0)

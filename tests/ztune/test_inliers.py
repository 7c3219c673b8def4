"""The test for none of the classes: what it refuses, and how often it is wrong."""

from typing import Any

import numpy as np
import pytest

from ztune.inliers import (
    TEXT_COUNT,
    Refusals,
    auroc,
    class_prototypes,
    fit_inlier_test,
    out_of_fold_scores,
)
from ztune.types import F32, F64, I64

C, E = 5, 12


def unit(rows: F64) -> F32:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def drawn(seed: int, n_per_class: int, spread: float = 0.4) -> tuple[F32, I64, F32]:
    """Return images f32[n, E] around class centres, their labels, and texts f32[C, E]."""
    centres = np.random.default_rng(7).standard_normal((C, E))
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(C), n_per_class)
    images = centres[labels] + spread * rng.standard_normal((len(labels), E))
    return unit(images), labels, unit(centres + 3)


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("n_per_class", [4, 16])
def test_it_refuses_the_share_of_new_images_that_was_asked_for(
    share: float, n_per_class: int
) -> None:
    new, _, _ = drawn(1000, 400)
    tests = [fit_inlier_test(*drawn(seed, n_per_class), share) for seed in range(40)]
    refused = np.mean([(test(new) < 0).mean() for test in tests])
    # With few images, prototypes without one are further away, so that less is refused.
    assert (0.4 if n_per_class == 4 else 0.7) * share < refused < 1.4 * share


def test_it_refuses_images_of_no_class() -> None:
    images, labels, texts = drawn(1, 16)
    test = fit_inlier_test(images, labels, texts, 0.05)
    foreign = unit(np.random.default_rng(2).standard_normal((300, E)))
    assert (test(foreign) < 0).mean() > 0.95
    assert auroc(test(drawn(3, 50)[0]), test(foreign)) > 0.98


def test_scores_are_of_prototypes_without_the_image() -> None:
    """With at most 32 images every fold is a single one."""
    images, labels, texts = drawn(4, 4)
    expected = []
    for i in range(len(labels)):
        rest = np.arange(len(labels)) != i
        prototypes = class_prototypes(images[rest], labels[rest], texts)
        expected.append((images[i] @ prototypes.T).max())
    np.testing.assert_allclose(out_of_fold_scores(images, labels, texts), expected, rtol=1e-6)


def test_a_prototype_is_the_mean_of_images_and_of_the_moved_text() -> None:
    images, labels, texts = drawn(5, 3)
    means = np.stack([images[labels == c].mean(axis=0) for c in range(C)])
    moved = means.mean(axis=0) + texts - texts.mean(axis=0)
    expected = unit((3 * means + TEXT_COUNT * moved) / (3 + TEXT_COUNT))
    np.testing.assert_allclose(class_prototypes(images, labels, texts), expected, atol=1e-6)


def test_one_image_in_each_class_or_in_one() -> None:
    for counts in ([1] * C, [1, 16, 16, 16, 16]):
        images, labels, texts = drawn(6, 16)
        kept = np.concatenate([np.flatnonzero(labels == c)[:k] for c, k in enumerate(counts)])
        test = fit_inlier_test(images[kept], labels[kept], texts, 0.05)
        new, own, _ = drawn(8, 100)
        refused = [(test(new[own == c]) < 0).mean() for c in range(C)]
        assert np.mean(refused) < 0.3
        np.testing.assert_allclose(np.linalg.norm(test.prototypes, axis=1), 1, atol=1e-6)


def test_images_that_are_all_equal_are_kept() -> None:
    one = unit(np.random.default_rng(1).standard_normal((1, E)))
    labels = np.repeat(np.arange(C), 8)
    test = fit_inlier_test(np.repeat(one, len(labels), axis=0), labels, drawn(1, 1)[2], 0.05)
    assert (test(np.repeat(one, 3, axis=0)) >= 0).all()
    assert (test(-one) < 0).all()


def test_the_order_of_the_images_does_not_matter_within_rounding() -> None:
    images, labels, texts = drawn(9, 6)
    order = np.argsort(labels[::-1], kind="stable")  # by class, each in reverse
    one = fit_inlier_test(images, labels, texts, 0.1)
    other = fit_inlier_test(images[::-1][order], labels[::-1][order], texts, 0.1)
    np.testing.assert_allclose(one.prototypes, other.prototypes, atol=1e-6)
    assert one.threshold == pytest.approx(other.threshold, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_share_of_pairs_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = rng.integers(0, 9, 40).astype(np.float32)
    foreign = rng.integers(-3, 7, 25).astype(np.float32)
    pairs = own[:, None] - foreign
    assert auroc(own, foreign) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_refusals_count_both_kinds_of_error() -> None:
    own = np.array([0.1, -0.1, 0.0, 0.3], np.float32)
    assert Refusals(0.05, own).to_json().keys() == {"reject", "own_refused"}
    found: dict[str, Any] = Refusals(0.05, own, np.array([-1.0, 0.2], np.float32)).to_json()
    assert (found["own_refused"]["share"], found["own_refused"]["n"]) == (0.25, 4)
    assert (found["foreign_accepted"]["share"], found["foreign_accepted"]["n"]) == (0.5, 2)
    assert found["auroc"] == 0.5 + 1 / 8

"""Temperatures: the least of the loss, found whatever the logits are."""

import numpy as np
import pytest

from ztune.calibration import (
    COLDEST,
    HOTTEST,
    class_weights,
    fit_temperature,
    mean_loss,
    smoothed_targets,
)
from ztune.types import F64, I64


def drawn(seed: int, n: int = 200, C: int = 5, sharpness: float = 1.0) -> tuple[F64, I64]:
    """Return logits and labels drawn from the softmax of `sharpness` times the logits."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((n, C))
    p = np.exp(sharpness * logits)
    p /= p.sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(C, p=row) for row in p])
    return logits, labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharpness", [0.05, 0.5, 1.0, 4.0])
def test_it_is_the_least_of_the_loss(seed: int, sharpness: float) -> None:
    logits, labels = drawn(seed, sharpness=sharpness)
    grid = np.exp(np.linspace(np.log(COLDEST), np.log(HOTTEST), 2000))
    least = min(mean_loss(logits, labels, float(t)) for t in grid)
    found = mean_loss(logits, labels, fit_temperature(logits, labels))
    assert found <= least + 1e-9


@pytest.mark.parametrize("sharpness", [0.25, 1.0, 3.0])
def test_it_undoes_a_wrong_scale(sharpness: float) -> None:
    logits, labels = drawn(1, n=4000, sharpness=sharpness)
    assert fit_temperature(logits, labels) == pytest.approx(1 / sharpness, rel=0.1)
    assert fit_temperature(50 * logits, labels) == pytest.approx(
        50 * fit_temperature(logits, labels), rel=1e-3
    )


def test_images_that_are_all_right_leave_doubt() -> None:
    labels = np.arange(40) % 4
    logits = 100 * np.eye(4)[labels]
    scaled = logits / fit_temperature(logits, labels)
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    assert (p / p.sum(axis=1, keepdims=True)).max(axis=1) == pytest.approx(41 / 42, abs=1e-3)


def test_logits_without_any_difference_have_temperature_1() -> None:
    assert fit_temperature(np.full((6, 3), 7.0), np.arange(6) % 3) == 1


def test_every_class_counts_the_same() -> None:
    """Copies of a class's images change nothing but the targets, which n makes a little surer."""
    logits, labels = drawn(4, n=400)
    n_more = 50
    many = np.concatenate([np.arange(400), np.tile(np.flatnonzero(labels == 2), n_more)])
    plain = fit_temperature(logits, labels)
    weighted = class_weights(labels, 5)
    assert weighted.mean() == pytest.approx(1)
    sums = [class_weights(labels[many], 5)[labels[many] == c].sum() for c in range(5)]
    np.testing.assert_allclose(sums, len(many) / 5)
    assert fit_temperature(logits[many], labels[many]) == pytest.approx(plain, rel=0.02)
    assert (class_weights(np.arange(40) % 4, 4) == 1).all()
    assert (class_weights(np.array([0, 0, 3, 3]), 4) == 1).all()


def test_targets_are_probabilities() -> None:
    targets = smoothed_targets(np.array([0, 2, 1]), 3)
    np.testing.assert_allclose(targets.sum(axis=1), 1)
    assert targets[1, 2] == pytest.approx(4 / 5)

"""The convex problem of a Gauss–Newton step, against differences and against its optimum."""

import numpy as np
import pytest

from ztune.objective import cross_entropy
from ztune.optim import convex
from ztune.optim.convex import SoftmaxProblem, softmax
from ztune.types import F64

N, C, K = 40, 5, 4


def problem(seed: int = 0, scale: float = 1.0) -> SoftmaxProblem:
    rng = np.random.default_rng(seed)
    base = scale * rng.standard_normal((N, C))
    directions = scale * rng.standard_normal((K, N, C))
    labels = rng.integers(0, C, N)
    return SoftmaxProblem(base.astype(np.float32), directions.astype(np.float32), labels)


POINT: F64 = np.array([0.3, -0.2, 0.5, 0.1])


def objective(given: SoftmaxProblem, a: F64, ridge: F64) -> float:
    """Return the objective written out again, in float64."""
    logits = given.base.astype(np.float64)
    for a_k, D_k in zip(a, given.directions.astype(np.float64), strict=True):
        logits = logits + a_k * D_k
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -np.log(p[np.arange(N), given.labels])
    return float(losses.mean() + 0.5 * a @ ridge @ a)


def gradient_by_differences(given: SoftmaxProblem, a: F64, ridge: F64) -> F64:
    h = 1e-5
    return np.array(
        [
            (objective(given, a + h * e, ridge) - objective(given, a - h * e, ridge)) / (2 * h)
            for e in np.eye(len(a))
        ]
    )


def test_probabilities_sum_to_one_however_large_the_logits() -> None:
    p = softmax(np.array([[1000, 0, -1000], [0, 0, 0]], np.float32))
    np.testing.assert_allclose(p, [[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], atol=1e-7)
    assert p.dtype == np.float32


def test_logits_are_linear_in_a() -> None:
    given = problem()
    np.testing.assert_array_equal(given.logits(np.zeros(K)), given.base)
    expected = given.base + np.tensordot(POINT, given.directions, 1)
    np.testing.assert_allclose(given.logits(POINT), expected, atol=1e-5)
    ridge = np.diag([1.0, 2.0, 3.0, 4.0])
    assert given.loss(POINT, ridge) == pytest.approx(objective(given, POINT, ridge), abs=1e-6)
    assert given.loss(POINT, ridge) > given.loss(POINT, np.zeros((K, K)))


def test_gradient_and_curvature_are_those_of_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given, none = problem(), np.zeros((K, K))
    terms = given.terms(POINT)
    assert terms.n == N
    assert terms.loss / N == pytest.approx(objective(given, POINT, none), abs=1e-6)
    np.testing.assert_allclose(
        terms.gradient / N, gradient_by_differences(given, POINT, none), atol=1e-6
    )
    h = 1e-4
    columns = [
        gradient_by_differences(given, POINT + h * e, none)
        - gradient_by_differences(given, POINT - h * e, none)
        for e in np.eye(K)
    ]
    np.testing.assert_allclose(terms.curvature / N, np.array(columns) / (2 * h), atol=1e-5)
    # In parts that fit into memory it is the same.
    monkeypatch.setattr(convex, "_VALUES_AT_ONCE", 7 * K * C)
    parts = given.terms(POINT)
    np.testing.assert_allclose(parts.curvature, terms.curvature, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(parts.gradient, terms.gradient)


def test_images_apart_add_up_and_are_taken_away() -> None:
    given = problem()
    chosen = np.arange(N) % 3 == 0
    some, others = given.rows(chosen), given.rows(~chosen)
    assert (len(some.labels), len(others.labels)) == (14, 26)
    np.testing.assert_allclose(some.logits(POINT), given.logits(POINT)[chosen], atol=1e-6)
    whole, one, other = given.terms(POINT), some.terms(POINT), others.terms(POINT)
    for found, expected in ((one + other, whole), (whole - one, other)):
        assert found.n == expected.n
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        np.testing.assert_allclose(found.gradient, expected.gradient, atol=1e-4)
        np.testing.assert_allclose(found.curvature, expected.curvature, atol=1e-4)


@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])
@pytest.mark.parametrize("share", [1e-3, 0.1, 10.0])
def test_the_minimum_is_stationary(scale: float, share: float) -> None:
    given = problem(scale=scale)
    ridge = share * scale**2 * np.diag([1.0, 2.0, 1.0, 0.5])
    a = given.minimise(ridge, np.zeros(K), 50)
    assert np.abs(gradient_by_differences(given, a, ridge)).max() < 3e-3 * scale
    best = objective(given, a, ridge)
    for direction in np.random.default_rng(3).standard_normal((20, K)) / scale:
        assert objective(given, a + 0.1 * direction, ridge) > best - 1e-6


def test_a_ridge_is_what_holds_the_solution_back() -> None:
    given = problem()
    lengths = [
        float(np.linalg.norm(given.minimise(ridge * np.eye(K), np.zeros(K), 50)))
        for ridge in (0.0, 0.1, 1.0, 10.0, 1000.0)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 10 * lengths[3] > 100 * lengths[4] > 0
    # Of one direction alone, the others go where they like.
    held = given.minimise(np.diag([1e6, 0, 0, 0]), np.zeros(K), 50)
    assert abs(held[0]) < 1e-5
    assert np.abs(held[1:]).min() > 1e-3


def test_a_solution_does_not_depend_on_the_start() -> None:
    given, ridge = problem(), 0.05 * np.eye(K)
    near, far = (given.minimise(ridge, start, 60) for start in (np.zeros(K), np.full(K, 4.0)))
    np.testing.assert_allclose(near, far, atol=5e-3)


def test_steps_never_raise_the_objective_where_newtons_would_overshoot() -> None:
    # Labels of almost no probability: the curvature there is far less than on the way.
    base = np.array([[0.0, 30.0], [0.0, 25.0], [8.0, 0.0]], np.float32)
    directions = np.array([[[1.0, 0.0], [0.8, 0.0], [-2.0, 0.0]]], np.float32)
    given = SoftmaxProblem(base, directions, np.zeros(3, np.int64))
    ridge, a = 1e-6 * np.eye(1), np.zeros(1)
    values = [given.loss(a, ridge)]
    assert given.loss(given.terms(a).step(a, ridge), ridge) > values[0]
    for _ in range(40):
        a = given.minimise(ridge, a, 1)
        values.append(given.loss(a, ridge))
    assert (np.diff(values) <= 0).all()
    grid = [given.loss(np.array([at]), ridge) for at in np.linspace(0, 40, 801)]
    assert values[-1] == pytest.approx(min(grid), abs=1e-2)
    assert values[-1] < values[0] - 2


def test_labels_that_are_met_are_left_alone() -> None:
    base = np.eye(3, dtype=np.float32) * 50
    given = SoftmaxProblem(base, np.ones((2, 3, 3), np.float32), np.arange(3))
    a = given.minimise(0.1 * np.eye(2), np.zeros(2), 10)
    np.testing.assert_allclose(a, 0, atol=1e-6)


def test_directions_that_say_the_same_have_a_singular_curvature() -> None:
    given = problem()
    twice = SoftmaxProblem(
        given.base, np.concatenate([given.directions, given.directions]), given.labels
    )
    none = np.zeros((2 * K, 2 * K))
    found = twice.minimise(none, np.zeros(2 * K), 30)
    alone = given.minimise(np.zeros((K, K)), np.zeros(K), 30)
    assert np.isfinite(found).all()
    assert twice.loss(found, none) == pytest.approx(given.loss(alone, none[:K, :K]), abs=1e-4)
    np.testing.assert_allclose(found[:K] + found[K:], alone, atol=0.02)


def test_directions_that_no_image_sees_are_left_where_they_are() -> None:
    given = problem()
    # The same for all classes changes no probability.
    unseen = np.concatenate([given.directions, np.ones((1, N, C), np.float32)])
    wider = SoftmaxProblem(given.base, unseen, given.labels)
    found = wider.minimise(np.zeros((K + 1, K + 1)), np.zeros(K + 1), 30)
    alone = given.minimise(np.zeros((K, K)), np.zeros(K), 30)
    np.testing.assert_allclose(found[:K], alone, atol=0.02)
    still = SoftmaxProblem(given.base, np.zeros((K, N, C), np.float32), given.labels)
    np.testing.assert_array_equal(still.minimise(np.zeros((K, K)), POINT, 5), POINT)


def test_the_loss_is_the_cross_entropy_of_the_house() -> None:
    given = problem()
    expected = cross_entropy(given.logits(POINT), given.labels).mean()
    assert given.loss(POINT, np.zeros((K, K))) == pytest.approx(expected, rel=1e-12)

"""CMA-ES against the `cmaes` package given the same normals, and what its theory promises."""

import json

import numpy as np
import pytest
from cmaes import CMA, SepCMA  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from ztune.errors import ConfigError
from ztune.optim.cma import Cma, CmaConfig, cost_of
from ztune.types import F64, Evaluation


class Normals:
    """What the package draws from, on a numpy Generator."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def randn(self, n: int) -> F64:
        return self._rng.standard_normal(n)


def evaluation(losses: F64) -> Evaluation:
    return Evaluation(losses, np.zeros_like(losses), np.zeros(1, np.int64), 1)


def ellipsoid(points: F64) -> F64:
    """Rotated a little, centred off the origin."""
    n = points.shape[1]
    moved = points - 0.3 + 0.4 * np.roll(points, 1, axis=1)
    return np.asarray((10 ** (2 * np.arange(n) / max(1, n - 1)) * moved**2).sum(axis=1))


@pytest.mark.parametrize("bound", [None, 1.0, 0.05], ids=["free", "bound", "clipped"])
@pytest.mark.parametrize(
    ("covariance", "dim", "population"),
    [
        ("full", 2, None),
        ("full", 5, None),
        ("full", 6, 9),
        ("full", 12, 40),
        ("separable", 2, None),
        ("separable", 7, None),
        ("separable", 40, 15),
        ("separable", 300, None),
    ],
)
def test_samples_and_means_are_those_of_the_package(
    covariance: str, dim: int, population: int | None, bound: float | None
) -> None:
    start = np.linspace(-0.04, 0.03, dim)
    bounds = None if bound is None else np.tile([-bound, bound], (dim, 1))
    package = (CMA if covariance == "full" else SepCMA)(
        mean=start.copy(), sigma=0.4, bounds=bounds, population_size=population
    )
    package._rng = Normals(5)
    config = CmaConfig(population, 0.4, covariance, "mean", bound)
    ours = Cma(config, start, np.random.default_rng(5))
    assert config.queries_per_step(dim) == package.population_size
    # Clipped candidates leave eigenvalues nearly equal, whose vectors rounding then turns.
    error = 1e-8 if covariance == "full" and bound == 0.05 else 1e-10
    for _ in range(32):
        expected = np.array([package.ask() for _ in range(package.population_size)])
        points = ours.ask().points
        if bound is not None:
            assert np.abs(points).max() <= bound
        # Coordinates near nought have no relative precision of their own, so relative to sigma.
        np.testing.assert_allclose(points, expected, rtol=error, atol=0.4 * error)
        losses = ellipsoid(expected)
        package.tell([(x, float(loss)) for x, loss in zip(expected, losses, strict=True)])
        ours.tell(evaluation(losses))
        np.testing.assert_allclose(ours.recommend(), package.mean, rtol=error, atol=0.4 * error)


@pytest.mark.parametrize("seed", [3, 8])
@pytest.mark.parametrize("covariance", ["full", "separable"])
def test_a_long_path_is_kept_out_of_the_covariance_as_in_the_package(
    covariance: str, seed: int
) -> None:
    # Small steps far from the optimum: the path is at the limit of (45) in the first generations.
    start = np.full(8, 5.0)
    package = (CMA if covariance == "full" else SepCMA)(mean=start.copy(), sigma=0.01)
    package._rng = Normals(seed)
    ours = Cma(CmaConfig(None, 0.01, covariance, "mean"), start, np.random.default_rng(seed))
    for _ in range(30):
        expected = np.array([package.ask() for _ in range(package.population_size)])
        np.testing.assert_allclose(ours.ask().points, expected, rtol=1e-10, atol=1e-10)
        losses = ellipsoid(expected)
        package.tell([(x, float(loss)) for x, loss in zip(expected, losses, strict=True)])
        ours.tell(evaluation(losses))


@given(
    losses=st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=6),
    slope=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    power=st.sampled_from([1, 3, 5]),
    covariance=st.sampled_from(["full", "separable"]),
)
@settings(deadline=None)
def test_a_monotone_transform_of_the_losses_changes_no_byte(
    losses: list[list[int]], slope: float, offset: float, power: int, covariance: str
) -> None:
    config = CmaConfig(population=8, covariance=covariance)
    plain, transformed = (Cma(config, np.zeros(3), np.random.default_rng(0)) for _ in range(2))
    for row in losses:
        values = np.array(row, dtype=np.float64)
        plain.tell(evaluation(values))
        transformed.tell(evaluation(slope * values**power + offset))
        assert plain.ask().points.tobytes() == transformed.ask().points.tobytes()
        assert plain.recommend().tobytes() == transformed.recommend().tobytes()


def test_other_orders_of_the_losses_do_change_the_points() -> None:
    one, other = (Cma(CmaConfig(population=8), np.zeros(3), np.random.default_rng(0)) for _ in "ab")
    one.tell(evaluation(np.arange(8.0)))
    other.tell(evaluation(np.arange(8.0)[::-1]))
    assert not np.allclose(one.ask().points, other.ask().points)


@pytest.mark.parametrize("covariance", ["full", "separable"])
def test_the_best_is_the_first_of_the_lowest_losses_of_all_generations(covariance: str) -> None:
    cma = Cma(CmaConfig(4, covariance=covariance), np.full(3, 2.0), np.random.default_rng(1))
    np.testing.assert_array_equal(cma.recommend(), np.full(3, 2.0))
    first = cma.ask().points
    cma.tell(evaluation(np.array([3.0, 1.0, 1.0, 2.0])))
    np.testing.assert_array_equal(cma.recommend(), first[1])
    cma.tell(evaluation(np.array([1.0, 1.5, 2.0, 3.0])))  # a tie with an earlier one
    np.testing.assert_array_equal(cma.recommend(), first[1])
    third = cma.ask().points
    cma.tell(evaluation(np.array([1.0, 1.5, 0.5, 3.0])))
    np.testing.assert_array_equal(cma.recommend(), third[2])


def test_of_many_equal_losses_the_first_is_the_best() -> None:
    for seed in range(20):
        cma = Cma(CmaConfig(40), np.zeros(3), np.random.default_rng(seed))
        points = cma.ask().points
        losses = np.random.default_rng(seed).integers(0, 3, 40).astype(np.float64)
        cma.tell(evaluation(losses))
        first = losses.tolist().index(losses.min())
        np.testing.assert_array_equal(cma.recommend(), points[first])


def test_the_mean_is_the_weighted_mean_of_the_better_half() -> None:
    cma = Cma(CmaConfig(4, keep="mean"), np.zeros(3), np.random.default_rng(1))
    points = cma.ask().points
    cma.tell(evaluation(np.array([3.0, 1.0, 2.0, 4.0])))
    raw = np.log(2.5) - np.log([1.0, 2.0])
    expected = (raw[0] * points[1] + raw[1] * points[2]) / raw.sum()
    np.testing.assert_allclose(cma.recommend(), expected, rtol=1e-12)


def test_the_full_form_learns_a_rotated_valley() -> None:
    def valley(points: F64) -> F64:
        along, across = points.sum(axis=1), points[:, 0] - points[:, 1]
        return np.asarray(along**2 + 1e6 * across**2)

    cma = Cma(CmaConfig(sigma=0.5), np.array([3.0, 1.0]), np.random.default_rng(0))
    for _ in range(120):
        cma.tell(evaluation(valley(cma.ask().points)))
    assert valley(cma.recommend()[None])[0] < 1e-10


@pytest.mark.parametrize("covariance", ["full", "separable"])
@pytest.mark.parametrize("case", ["flat", "slope", "converged"])
def test_nothing_breaks_without_end(covariance: str, case: str) -> None:
    cma = Cma(CmaConfig(covariance=covariance), np.ones(2), np.random.default_rng(0))
    for _ in range(2000):
        points = cma.ask().points
        assert np.isfinite(points).all()
        losses = {
            "flat": np.zeros(len(points)),
            "slope": points[:, 0],
            "converged": (points**2).sum(axis=1),
        }[case]
        cma.tell(evaluation(losses))
    json.dumps(cma.state()[1], allow_nan=False)


def test_few_values_and_a_large_population_keep_the_diagonal_positive() -> None:
    cma = Cma(CmaConfig(400, covariance="separable"), np.ones(2), np.random.default_rng(0))
    for _ in range(50):
        cma.tell(evaluation((cma.ask().points ** 2).sum(axis=1)))
    assert (np.asarray(cma.state()[0]["D"]) > 0).all()
    assert (cma.recommend() ** 2).sum() < 1e-6


def test_four_thousand_values_take_memory_in_proportion_when_separable() -> None:
    cma = Cma(CmaConfig(15, covariance="separable"), np.zeros(4000), np.random.default_rng(0))
    cma.tell(evaluation(np.arange(15.0)))
    assert all(array.size <= 15 * 4000 for array in cma.state()[0].values())


def test_the_cost_tells_the_forms_apart() -> None:
    full, separable = cost_of(4000, "full"), cost_of(4000, "separable")
    assert full.bytes >= 6 * 8 * 4000**2
    assert full.flops >= 10 * 4000**3
    assert separable.bytes < 1e7
    assert separable.flops < 1e7
    assert cost_of(4000, "separable", 100).bytes > separable.bytes


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="population is 3"):
        CmaConfig(population=3)
    with pytest.raises(ConfigError, match="sigma is 0"):
        CmaConfig(sigma=0.0)
    with pytest.raises(ConfigError, match='covariance is "ful"'):
        CmaConfig(covariance="ful")
    with pytest.raises(ConfigError, match='keep is "last"'):
        CmaConfig(keep="last")
    with pytest.raises(ConfigError, match="bound is -1"):
        CmaConfig(bound=-1.0)
    with pytest.raises(ConfigError, match=r"bound is 1\.0, expected at least the start's 2"):
        Cma(CmaConfig(bound=1.0), np.array([0.0, -2.0]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="got 3 losses, expected 4"):
        Cma(CmaConfig(4), np.zeros(2), np.random.default_rng(0)).tell(evaluation(np.zeros(3)))

"""One-sided random differences against their formulas."""

import math

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.optim.rgf import Rgf, RgfConfig
from ztune.types import F64, Evaluation


def evaluation(losses: F64) -> Evaluation:
    return Evaluation(losses, np.zeros_like(losses), np.zeros(1, np.int64), 1)


def make(config: RgfConfig | None = None, dim: int = 6, n_steps: int = 20) -> Rgf:
    return Rgf(config or RgfConfig(), np.full(dim, 0.5), n_steps, np.random.default_rng(3))


def test_points_are_the_pivot_and_probes_on_a_sphere_around_it() -> None:
    rgf = make()
    points = rgf.ask().points
    assert points.shape == (6, 6)
    np.testing.assert_array_equal(points[0], rgf.recommend())
    np.testing.assert_allclose(np.linalg.norm(points[1:] - points[0], axis=1), 0.01, rtol=1e-9)


def test_update_agrees_with_a_transcription_of_the_formulas() -> None:
    dim, n, beta, n_steps = 6, 5, 0.01, 4
    rgf = make(n_steps=n_steps)
    rng = np.random.default_rng(11)
    for t in range(1, 8):
        rate = 0.1
        if t < n_steps:  # t from 1
            rate += (10 - 0.1) * math.pow(1 - t / n_steps, 0.9)
        points = rgf.ask().points
        losses = rng.standard_normal(n + 1)
        w = points[0].copy()
        for j in range(dim):
            slope = 0.0
            for i in range(1, n + 1):
                u = (points[i, j] - points[0, j]) / beta
                slope += dim / n * u * (losses[i] - losses[0]) / beta
            w[j] -= rate * slope
        rgf.tell(evaluation(losses))
        # u is recovered from points, good to 1e-16 / β, and points here grow to thousands.
        np.testing.assert_allclose(rgf.recommend(), w, rtol=1e-9, atol=1e-8)


def test_the_estimate_is_the_slope_on_average() -> None:
    slope = np.array([1.0, -2.0, 0.5, 0.0])
    config = RgfConfig(step_size=1.0, last_step_size=1.0, n_directions=20_000)
    rgf = Rgf(config, np.zeros(4), 1, np.random.default_rng(0))
    rgf.tell(evaluation(rgf.ask().points @ slope))
    np.testing.assert_allclose(-rgf.recommend(), slope, atol=0.1)


def test_the_saved_state_is_no_larger_than_the_point() -> None:
    arrays, _ = make(dim=1000).state()
    assert sum(array.size for array in arrays.values()) == 1000


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_directions is 0"):
        RgfConfig(n_directions=0)
    for name in ("step_size", "last_step_size", "step_power", "perturbation"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            RgfConfig(**{name: 0.0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_steps is 0"):
        make(n_steps=0)

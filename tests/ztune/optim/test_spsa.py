"""SPSA against its formulas, and as any optimizer of the house."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztune.errors import ConfigError, FormatError
from ztune.io.generator import generator_from_json, generator_to_json
from ztune.optim.spsa import Spsa, SpsaConfig, clip_norm
from ztune.types import F64, Evaluation, Json


def evaluation(losses: F64) -> Evaluation:
    return Evaluation(losses, np.zeros_like(losses), np.zeros(1, np.int64), 1)


def make(config: SpsaConfig | None = None, dim: int = 6, seed: int = 3) -> Spsa:
    return Spsa(config or SpsaConfig(), np.ones(dim), np.random.default_rng(seed))


def test_points_are_pairs_around_the_iterate_with_the_published_magnitudes() -> None:
    points = make().ask().points
    assert points.shape == (10, 6)
    moves = points - 1.0
    np.testing.assert_allclose(moves[0::2], -moves[1::2], atol=1e-15)
    c_1 = 0.01
    assert ((np.abs(moves) >= 0.5 * c_1 - 1e-15) & (np.abs(moves) <= c_1 + 1e-15)).all()


@pytest.mark.parametrize("slope", [1e-3, 50.0], ids=["unclipped", "clipped"])
def test_update_agrees_with_a_transcription_of_the_formulas(slope: float) -> None:
    dim, n_pairs = 6, 5
    spsa = make()
    w = np.ones(dim)
    rng = np.random.default_rng(11)
    was_clipped = []
    for k in range(1, 8):
        a_k = 0.01 / (k + 1) ** 0.4
        c_k = 0.01 / k**0.1
        points = spsa.ask().points
        losses = slope * rng.standard_normal(2 * n_pairs)
        g = np.zeros(dim)
        for i in range(n_pairs):
            p = (points[2 * i] - w) / c_k
            for j in range(dim):
                g[j] += (losses[2 * i] - losses[2 * i + 1]) / (2 * c_k * p[j]) / n_pairs
        norm = np.sqrt((g**2).sum())
        was_clipped.append(norm >= np.sqrt(dim))
        if norm >= np.sqrt(dim):
            g = g * np.sqrt(dim) / norm
        w = w - a_k * g
        spsa.tell(evaluation(losses))
        # The transcription recovers p from differences of points: the error of that is the bound.
        np.testing.assert_allclose(spsa.recommend(), w, rtol=0, atol=1e-12)
        w = spsa.recommend()
    assert all(was_clipped) if slope > 1 else not any(was_clipped)


def test_momentum_agrees_with_a_hand_loop_of_spsa_gc() -> None:
    dim, beta = 4, 0.8
    config = SpsaConfig(n_pairs=2, clip=False, momentum=beta)
    spsa = Spsa(config, np.ones(dim), np.random.default_rng(5))
    w, m = [1.0] * dim, [0.0] * dim
    rng = np.random.default_rng(6)
    for k in range(1, 9):
        a_k = 0.01 / (k + 1) ** 0.4
        points = spsa.ask().points
        losses = rng.standard_normal(4)
        for j in range(dim):
            g = 0.0
            for i in range(2):
                moved = (points[2 * i, j] - points[2 * i + 1, j]) / 2  # c_k p
                g += (losses[2 * i] - losses[2 * i + 1]) / (2 * moved) / 2
            m[j] = beta * m[j] + g
            w[j] -= a_k * (g + beta * m[j])
        spsa.tell(evaluation(losses))
        # Moves are recovered from differences of points of size 1.
        np.testing.assert_allclose(spsa.recommend(), w, rtol=0, atol=1e-10)


def test_without_momentum_nothing_is_remembered() -> None:
    plain, also = make(), make(SpsaConfig(momentum=0.0))
    for spsa in (plain, also):
        for _ in range(3):
            spsa.tell(evaluation(quadratic(spsa.ask().points)))
    assert plain.recommend().tobytes() == also.recommend().tobytes()
    assert not np.asarray(also.state()[0]["momentum"]).any()
    remembering = make(SpsaConfig(momentum=0.5))
    for _ in range(3):
        remembering.tell(evaluation(quadratic(remembering.ask().points)))
    assert not np.allclose(remembering.recommend(), plain.recommend(), rtol=1e-6)


@given(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=50))
def test_clipping_never_leaves_more_than_the_root_of_the_dimension(values: list[float]) -> None:
    gradient = np.array(values)
    limit = float(np.sqrt(len(gradient)))
    result = clip_norm(gradient, limit)
    assert np.linalg.norm(result) <= limit * (1 + 1e-12)
    if np.linalg.norm(gradient) < limit:
        np.testing.assert_array_equal(result, gradient)


def test_asking_again_gives_the_same_points_and_no_alias() -> None:
    spsa = make()
    first = spsa.ask().points
    kept = first.copy()
    first += 1.0
    np.testing.assert_array_equal(spsa.ask().points, kept)
    spsa.recommend()[:] = 9.0
    np.testing.assert_array_equal(spsa.ask().points, kept)
    arrays, _ = spsa.state()
    np.asarray(arrays["point"])[:] = 5.0
    np.testing.assert_array_equal(spsa.ask().points, kept)


def quadratic(points: F64) -> F64:
    return np.asarray((np.arange(1, points.shape[1] + 1) * points**2).sum(axis=1))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_it_improves_a_quadratic(noise: float) -> None:
    spsa = make(SpsaConfig(step_size=0.05))
    rng = np.random.default_rng(0)
    before = quadratic(spsa.recommend()[None])[0]
    for _ in range(200):
        losses = quadratic(spsa.ask().points)
        spsa.tell(evaluation(losses + noise * rng.standard_normal(len(losses))))
    assert quadratic(spsa.recommend()[None])[0] < 0.1 * before


@pytest.mark.parametrize("asked", [False, True], ids=["between steps", "after an ask"])
def test_a_restored_optimizer_goes_on_with_the_same_bytes(asked: bool) -> None:
    whole, first = make(), make()
    for _ in range(5):
        whole.tell(evaluation(quadratic(whole.ask().points)))
        first.tell(evaluation(quadratic(first.ask().points)))
    if asked:
        first.ask()
    second = make(seed=99)
    second.restore(first.state())
    for _ in range(5):
        whole.tell(evaluation(quadratic(whole.ask().points)))
        second.tell(evaluation(quadratic(second.ask().points)))
    assert whole.recommend().tobytes() == second.recommend().tobytes()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_pairs is 0"):
        SpsaConfig(n_pairs=0)
    with pytest.raises(ConfigError, match="perturbation is 0"):
        SpsaConfig(perturbation=0.0)
    for name in ("step_offset", "step_decay", "perturbation_decay"):
        for value in (-1.0, float("nan")):
            settings: dict[str, Any] = {name: value}
            with pytest.raises(ConfigError, match=f"{name} is {value}, expected at least 0"):
                SpsaConfig(**settings)
        settings = {name: 0.0}
        SpsaConfig(**settings)
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="momentum is"):
            SpsaConfig(momentum=momentum)


def test_a_generator_survives_json_and_a_damaged_one_is_refused() -> None:
    rng = np.random.default_rng(2)
    rng.integers(3, dtype=np.int32)  # leaves half a word behind
    copy = generator_from_json(generator_to_json(rng))
    np.testing.assert_array_equal(rng.random(5), copy.random(5))
    cases: list[Json] = [{"kind": "MT19937"}, None, {"kind": "PCG64", "state": "x"}]
    for damaged in cases:
        with pytest.raises(FormatError):
            generator_from_json(damaged)

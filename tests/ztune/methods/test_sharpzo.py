"""SharpZO against a loop transcription of the paper, its costs and its pruning."""

import math

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.methods.sharpzo import SharpZo, SharpZoConfig, kept, unit
from ztune.optim.cma import Cma, CmaConfig
from ztune.types import F64, Evaluation


def evaluation(losses: F64, accuracy: float = 0.0) -> Evaluation:
    return Evaluation(losses, np.full_like(losses, accuracy), np.zeros(1, np.int64), 1)


def bowl(points: F64) -> F64:
    weights = np.arange(1, points.shape[1] + 1)
    return np.asarray((weights * (points - 0.7) ** 2).sum(axis=1) + np.sin(points).sum(axis=1))


def test_a_warmup_step_at_the_published_sizes_is_1064_queries_in_calls_of_32() -> None:
    sharp = SharpZo(SharpZoConfig(), np.zeros(512), np.random.default_rng(0))
    sizes, same = [], []
    for _ in range(34):
        proposal = sharp.ask()
        sizes.append(len(proposal.points))
        same.append(proposal.same_batch)
        assert not proposal.validation
        sharp.tell(evaluation(bowl(proposal.points)))
    assert sizes == [32] * 32 + [40, 32]
    assert same == [False] + [True] * 32 + [False]
    assert sum(sizes[:33]) == 1064 == SharpZoConfig().step_queries()
    assert SharpZoConfig(warmup_patience=3).step_queries() == 1065


def test_a_last_call_takes_the_coordinates_left_over() -> None:
    config = SharpZoConfig(intrinsic_dim=8, population=4, probes_per_call=6)
    sharp = SharpZo(config, np.zeros(8), np.random.default_rng(0))
    sizes = []
    for _ in range(4):
        sizes.append(len(sharp.ask().points))
        sharp.tell(evaluation(bowl(sharp.ask().points)))
    assert sizes == [6, 6, 4, 4]
    assert sum(sizes) == config.step_queries()


def test_the_warmup_agrees_with_a_transcription_of_the_paper() -> None:
    dim, population, rho, mu = 5, 6, 0.1, 1e-3
    config = SharpZoConfig(population=population, sigma=0.4, warmup_steps=3, probes_per_call=4)
    start = np.linspace(-0.5, 0.5, dim)
    sharp = SharpZo(config, start, np.random.default_rng(7))
    # The warm-up's CMA-ES is the one of the house, on the generator that it is given.
    seed = int(np.random.default_rng(7).integers(2**63))
    own = CmaConfig(population, 0.4, "full", "mean", 5.0)
    cma = Cma(own, start, np.random.default_rng(seed))
    for _ in range(3):
        m = cma.recommend()
        g = []
        for j in range(dim):
            up, down = m.copy(), m.copy()
            up[j] += mu
            down[j] -= mu
            g.append((bowl(up[None])[0] - bowl(down[None])[0]) / (2 * mu))
        norm = math.sqrt(sum(value * value for value in g))
        for n_points in (4, 4, 2):
            points = sharp.ask().points
            assert len(points) == n_points
            sharp.tell(evaluation(bowl(points)))
        sampled = cma.ask().points
        losses = []
        for i in range(population):
            x = [sampled[i, j] + rho * g[j] / norm for j in range(dim)]
            np.testing.assert_allclose(sharp.ask().points[i], x, rtol=1e-12)
            losses.append(bowl(np.array([x]))[0])
        sharp.tell(evaluation(bowl(sharp.ask().points)))
        cma.tell(evaluation(np.array(losses)))
        np.testing.assert_array_equal(sharp.recommend(), cma.recommend())


def test_sparse_steps_agree_with_a_transcription_of_the_paper() -> None:
    dim, mu, eta = 6, 1e-3, 1e-3
    config = SharpZoConfig(warmup_steps=0, prune_every=3, probes_per_call=4, keep_fraction=0.5)
    w = np.array([0.2, -1.0, 0.5, 1.5, -0.3, 0.8])
    sharp = SharpZo(config, w, np.random.default_rng(2))
    n_prunings = 0
    for step in range(7):
        if step % 3 == 0:
            n_prunings += 1
            asked: list[F64] = []
            for _ in range(3):
                points = sharp.ask().points
                asked.extend(points)
                sharp.tell(evaluation(bowl(points)))
            squares = []
            for j in range(dim):
                up, down = asked[2 * j], asked[2 * j + 1]
                moves = up - w, down - w
                for move, sign in zip(moves, (1, -1), strict=True):
                    expected = np.zeros(dim)
                    expected[j] = sign * mu
                    np.testing.assert_allclose(move, expected, atol=1e-15)
                squares.append(((bowl(up[None])[0] - bowl(down[None])[0]) / (2 * mu)) ** 2)
            mean = sum(squares) / dim
            spread = math.sqrt(sum((s - mean) ** 2 for s in squares) / dim)
            scores = [w[j] ** 2 * (squares[j] - mean) / spread for j in range(dim)]
            alive = sorted(range(dim), key=lambda j: -scores[j])[:3]
        plus, minus = sharp.ask().points
        u = (plus - minus) / (2 * mu)
        assert sorted(np.flatnonzero(u)) == sorted(alive)
        np.testing.assert_allclose(plus - w, w - minus, atol=1e-15)
        difference = bowl(plus[None])[0] - bowl(minus[None])[0]
        w = np.array([w[j] - eta * difference / (2 * mu) * u[j] for j in range(dim)])
        sharp.tell(evaluation(bowl(np.stack([plus, minus]))))
        np.testing.assert_allclose(sharp.recommend(), w, rtol=0, atol=1e-11)
        w = sharp.recommend()
    assert n_prunings == 3


def test_the_second_stage_starts_from_the_mean_of_the_first() -> None:
    config = SharpZoConfig(population=4, warmup_steps=1)
    sharp = SharpZo(config, np.zeros(3), np.random.default_rng(0))
    for _ in range(2):
        sharp.tell(evaluation(bowl(sharp.ask().points)))
    mean = sharp.recommend()
    assert mean.any()
    np.testing.assert_allclose(sharp.ask().points.mean(axis=0), mean, rtol=1e-12)
    sharp.tell(evaluation(bowl(sharp.ask().points)))
    assert len(sharp.ask().points) == 2
    np.testing.assert_allclose(sharp.ask().points.mean(axis=0), mean, rtol=1e-12)


def test_prunings_are_counted_from_the_start_of_the_second_stage() -> None:
    config = SharpZoConfig(population=4, warmup_steps=2, prune_every=3)
    sharp = SharpZo(config, np.zeros(3), np.random.default_rng(0))
    sizes = []
    for _ in range(13):
        sizes.append(len(sharp.ask().points))
        sharp.tell(evaluation(bowl(sharp.ask().points)))
    assert sizes == [6, 4] * 2 + [6, 2, 2, 2] * 2 + [6]


def test_validations_without_a_gain_end_the_warmup() -> None:
    config = SharpZoConfig(population=4, warmup_steps=100, warmup_patience=2)
    sharp = SharpZo(config, np.zeros(3), np.random.default_rng(0))
    sizes = []
    # 0.505 gains less than 0.01; then the second in a row without a gain.
    for accuracy in (0.4, 0.5, 0.505, 0.51, 0.511, 0.519):
        for _ in range(2):
            sizes.append(len(sharp.ask().points))
            sharp.tell(evaluation(bowl(sharp.ask().points)))
        proposal = sharp.ask()
        assert proposal.validation
        np.testing.assert_array_equal(proposal.points, sharp.recommend()[None])
        sharp.tell(evaluation(bowl(proposal.points), accuracy))
    assert sizes == [6, 4] * 6
    sizes = []
    for _ in range(3):
        assert not sharp.ask().validation
        sizes.append(len(sharp.ask().points))
        sharp.tell(evaluation(bowl(sharp.ask().points)))
    assert sizes == [6, 2, 2]


def test_pruning_keeps_the_highest_scores_and_breaks_ties_by_slope() -> None:
    ones = np.ones(4)
    np.testing.assert_array_equal(kept(ones, np.array([1.0, -3.0, 2.0, 0.0]), 0.5), [0, 1, 1, 0])
    # Of two steep ones the larger value wins; of two flat ones it loses.
    values = np.array([1.0, 5.0, 5.0, 1.0])
    steep_and_flat = np.array([4.0, 3.9, 0.0, 0.1])
    np.testing.assert_array_equal(kept(values, steep_and_flat, 0.25), [0, 1, 0, 0])
    np.testing.assert_array_equal(kept(values, steep_and_flat, 0.75), [1, 1, 0, 1])
    slopes = np.array([1.0, -3.0, 2.0, 0.0])
    np.testing.assert_array_equal(kept(np.zeros(4), slopes, 0.5), [0, 1, 1, 0])
    np.testing.assert_array_equal(kept(np.zeros(4), slopes, 0.01), [0, 1, 0, 0])
    np.testing.assert_array_equal(kept(ones, slopes, 1.0), ones)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_pruning_does_not_depend_on_the_scale_of_the_losses(scale: float) -> None:
    slopes = scale * np.array([1.0, -3.0, 2.0, 0.5])
    np.testing.assert_array_equal(kept(np.ones(4), slopes, 0.5), [0, 1, 1, 0])
    np.testing.assert_allclose(np.linalg.norm(unit(slopes)), 1.0, rtol=1e-12)


def test_slopes_without_information_give_no_score() -> None:
    values = np.array([0.3, 0.1, 0.7, 0.2])
    np.testing.assert_array_equal(kept(values, np.zeros(4), 0.5), [1, 1, 0, 0])
    equal = 0.1 * np.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_array_equal(kept(values, equal, 0.5), [1, 1, 0, 0])
    # Equal but for rounding: what is left of a score must not let the large value win.
    nearly = np.array([1.0, 1 - 1.2e-16, 1 - 4e-16, 1 - 4e-16])
    np.testing.assert_array_equal(kept(np.array([0.1, 9.0, 1.0, 1.0]), nearly, 0.25), [1, 0, 0, 0])
    np.testing.assert_array_equal(unit(np.zeros(3)), np.zeros(3))


def test_a_quadratic_of_mostly_inert_coordinates_is_improved_and_they_are_pruned() -> None:
    active = [3, 11, 17, 20]

    def sparse(points: F64) -> F64:
        return np.asarray(((points[:, active] - 0.5) ** 2).sum(axis=1))

    config = SharpZoConfig(
        population=12, warmup_steps=3, keep_fraction=0.2, step_size=0.02, prune_every=100
    )
    sharp = SharpZo(config, np.full(24, 2.0), np.random.default_rng(1))
    before = sparse(sharp.recommend()[None])[0]
    while len(sharp.ask().points) != 2:
        sharp.tell(evaluation(sparse(sharp.ask().points)))
    after_warmup = sharp.recommend()
    plus, minus = sharp.ask().points
    assert set(np.flatnonzero(plus != minus)) & set(active)
    for _ in range(400):
        sharp.tell(evaluation(sparse(sharp.ask().points)))
    assert sparse(sharp.recommend()[None])[0] < 0.05 * before
    moved = np.flatnonzero(sharp.recommend() != after_warmup)
    assert len(moved) <= 16  # 20 % of 24 are 5, chosen four times


def test_impossible_settings_are_refused() -> None:
    for name, value in {
        "sigma": 0.0,
        "bound": 0.0,
        "smoothing": -1e-3,
        "step_size": 0.0,
        "radius": -0.1,
        "warmup_steps": -1,
        "warmup_gain": -0.01,
        "population": 3,
        "warmup_patience": 0,
        "prune_every": 0,
        "keep_fraction": 1.1,
        "probes_per_call": 31,
    }.items():
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            SharpZoConfig(**{name: value})  # type: ignore[arg-type]


def test_the_published_code_agrees_with_a_transcription_on_40_copies() -> None:
    """The code moves 40 copies of the point, whose mean is evaluated: here a loop over them."""
    dim, population, mu, eta, copies = 4, 6, 1e-3, 1e-3, 40
    config = SharpZoConfig(
        population=population, sigma=0.4, warmup_steps=2, prune_every=None, copies=copies,
        differences_at="population", sum_steps=True, probes_per_call=8,
    )  # fmt: skip
    sharp = SharpZo(config, np.zeros(dim), np.random.default_rng(7))
    seed = int(np.random.default_rng(7).integers(2**63))
    own = CmaConfig(population, 0.4, "full", "mean", 5.0)
    cma = Cma(own, np.zeros(dim), np.random.default_rng(seed))
    centre, g = np.zeros(dim), np.zeros(dim)
    for _ in range(2):
        assert len(sharp.ask().points) == 2 * dim
        sharp.tell(evaluation(bowl(sharp.ask().points)))
        for j in range(dim):
            move = np.zeros(dim)
            move[j] = mu
            g[j] = (bowl((centre + move)[None])[0] - bowl((centre - move)[None])[0]) / (2 * mu)
        # Rows of equal differences, scaled to a norm of 0.1 together; then their mean.
        rows = np.tile(g, (copies, 1))
        shift = (0.1 * rows / np.linalg.norm(rows)).mean(axis=0)
        np.testing.assert_allclose(sharp.ask().points, cma.ask().points + shift, rtol=1e-12)
        sharp.tell(evaluation(bowl(sharp.ask().points)))
        cma.tell(evaluation(bowl(cma.ask().points + shift)))
        centre = cma.draw().mean(axis=0)  # of a population that nothing evaluates
        np.testing.assert_array_equal(sharp.recommend(), centre)
    total = g.copy()
    for _ in range(5):
        plus, minus = sharp.ask().points
        z = (plus - minus) / (2 * mu)  # the mean of 40 directions
        total = total + (bowl(plus[None])[0] - bowl(minus[None])[0]) / (2 * mu) * z
        centre = centre - eta * total
        sharp.tell(evaluation(bowl(np.stack([plus, minus]))))
        np.testing.assert_allclose(sharp.recommend(), centre, rtol=0, atol=1e-11)
    lengths = []
    for _ in range(400):
        plus, minus = sharp.ask().points
        lengths.append((((plus - minus) / (2 * mu)) ** 2).mean())
        sharp.tell(evaluation(np.zeros(2)))
    assert np.mean(lengths) == pytest.approx(1 / copies, rel=0.15)


def test_without_a_bound_candidates_go_anywhere() -> None:
    for bound, inside in ((None, False), (0.5, True)):
        config = SharpZoConfig(population=4, sigma=1.0, bound=bound, radius=0.0)
        sharp = SharpZo(config, np.zeros(3), np.random.default_rng(0))
        sharp.tell(evaluation(bowl(sharp.ask().points)))
        assert (np.abs(sharp.ask().points).max() <= 0.5) == inside


def test_without_pruning_there_are_no_differences_after_the_warmup() -> None:
    config = SharpZoConfig(population=4, warmup_steps=1, prune_every=None)
    sharp = SharpZo(config, np.zeros(3), np.random.default_rng(0))
    sizes = []
    for _ in range(8):
        sizes.append(len(sharp.ask().points))
        sharp.tell(evaluation(bowl(sharp.ask().points)))
    assert sizes == [6, 4] + [2] * 6

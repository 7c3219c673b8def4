"""Gauss–Newton in the space of logits: against its formulas, and on maps whose optimum is known."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ztune.errors import ConfigError, FormatError
from ztune.methods.ogn_context import GaussNewton, OgnContextConfig
from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem, softmax
from ztune.types import F32, F64, Evaluation, State

N, C, DIM = 30, 4, 40
LABELS = np.random.default_rng(5).integers(0, C, N)
START = np.random.default_rng(6).normal(0, 0.05, DIM)
Logits = Callable[[F64], F32]


def linear(dim: int = DIM) -> tuple[Logits, F64]:
    """Return a map and its Jacobian f64[dim, N C]."""
    rng = np.random.default_rng(7)
    jacobian = rng.standard_normal((dim, N * C))
    base = rng.standard_normal(N * C)
    return lambda points: (base + points @ jacobian).reshape(-1, N, C).astype(np.float32), jacobian


def curved(points: F64) -> F32:
    rng = np.random.default_rng(8)
    inner = rng.standard_normal((points.shape[1], 50)) / np.sqrt(points.shape[1])
    outer = rng.standard_normal((50, N * C)) / 2
    return (np.tanh(3 * points @ inner + 0.3) @ outer).reshape(-1, N, C).astype(np.float32)


def evaluation(logits: F32) -> Evaluation:
    losses = cross_entropy(logits, LABELS).mean(axis=-1)
    accuracies = (logits.argmax(axis=-1) == LABELS).mean(axis=-1)
    return Evaluation(losses, accuracies, LABELS, 1, logits)


def make(start: F64 = START, seed: int = 3, **settings: Any) -> GaussNewton:
    config = OgnContextConfig(**{"n_directions": 5, "memory": 15} | settings)
    return GaussNewton(config, start, np.random.default_rng(seed))


def play(optimizer: GaussNewton, logits: Logits, n_proposals: int) -> list[bytes]:
    """Return the bytes of each proposal and recommendation."""
    seen = []
    for _ in range(n_proposals):
        points = optimizer.ask().points
        optimizer.tell(evaluation(logits(points)))
        seen.append(points.tobytes() + optimizer.recommend().tobytes())
    return seen


def loss(logits: Logits, point: F64) -> float:
    return float(cross_entropy(logits(point[None]), LABELS).mean())


def stored(state: State) -> State:
    arrays, values = state
    return {name: array.copy() for name, array in arrays.items()}, json.loads(
        json.dumps(dict(values), allow_nan=False)
    )


def test_a_round_is_probes_and_trials_on_the_images_of_the_first() -> None:
    optimizer = make()
    for n_points in (6, 3, 5, 3, 5):
        proposal = optimizer.ask()
        assert proposal.points.shape == (n_points, DIM)
        assert proposal.same_batch == (n_points != 6)
        optimizer.tell(evaluation(curved(proposal.points)))


def test_probes_are_orthonormal_moves_from_the_point_and_orthogonal_to_what_is_kept() -> None:
    optimizer = make(perturbation=0.02)
    points = optimizer.ask().points
    np.testing.assert_array_equal(points[0], START)
    moves = points[1:] - START
    for _ in range(6):
        np.testing.assert_allclose(moves @ moves.T, 0.02**2 * np.eye(5), atol=1e-12)
        directions = optimizer.state()[0]["directions"]
        np.testing.assert_allclose(directions @ directions.T, np.eye(len(directions)), atol=1e-12)
        np.testing.assert_allclose(moves / 0.02, directions[-5:], atol=1e-9)
        play(optimizer, curved, 2)
        moves = optimizer.ask().points - optimizer.recommend()
    assert len(directions) == 15


def test_linear_logits_are_solved_in_one_round() -> None:
    logits, jacobian = linear(8)
    problem = SoftmaxProblem(
        logits(np.zeros((1, 8)))[0], jacobian.reshape(8, N, C).astype(np.float32), LABELS
    )
    best = problem.loss(problem.minimise(np.zeros((8, 8)), np.zeros(8), 50), np.zeros((8, 8)))
    start = np.full(8, 0.2)
    assert loss(logits, start) > best + 0.3
    optimizer = make(start, n_directions=8, damping=1e-6)
    play(optimizer, logits, 2)
    assert loss(logits, optimizer.recommend()) == pytest.approx(best, abs=1e-4)


def test_what_is_kept_of_linear_logits_stays_exact() -> None:
    logits, jacobian = linear()
    optimizer = make()
    play(optimizer, logits, 11)
    arrays, _ = optimizer.state()
    assert arrays["jacobian"].shape == (15, N * C)
    np.testing.assert_allclose(arrays["jacobian"], arrays["directions"] @ jacobian, atol=1e-2)


@pytest.mark.parametrize("kalman", [True, False])
def test_the_loss_of_a_curved_map_falls_in_every_round_or_stays(kalman: bool) -> None:
    optimizer = make(kalman=kalman)
    losses = [loss(curved, START)]
    for _ in range(15):
        play(optimizer, curved, 2)
        losses.append(loss(curved, optimizer.recommend()))
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < 0.6 * losses[0]


def test_what_was_learnt_in_earlier_rounds_helps() -> None:
    ends = []
    for kalman in (True, False):
        optimizers = [make(seed=seed, kalman=kalman) for seed in range(5)]
        for optimizer in optimizers:
            play(optimizer, curved, 16)
        ends.append(np.mean([loss(curved, optimizer.recommend()) for optimizer in optimizers]))
    assert ends[0] < ends[1] - 0.05


def test_the_best_trial_is_accepted_if_it_gains() -> None:
    optimizer = make()
    for i in range(12):
        before, points = optimizer.recommend(), optimizer.ask().points
        answer = evaluation(curved(points))
        optimizer.tell(answer)
        if i % 2 == 0:
            expected = before
        elif answer.losses.min() < loss(curved, before):
            expected = points[answer.losses.argmin()]
        np.testing.assert_array_equal(optimizer.recommend(), expected)


def test_where_nothing_gains_the_point_stays_and_the_damping_grows_to_its_limit() -> None:
    optimizer = make(damping=0.5)
    dampings = []
    for _ in range(6):
        play(optimizer, curved, 1)
        logits = curved(optimizer.ask().points)
        logits[:, np.arange(N), LABELS] -= 50
        optimizer.tell(evaluation(logits))
        np.testing.assert_array_equal(optimizer.recommend(), START)
        dampings.append(optimizer.state()[1]["damping"])
    assert dampings == [8, 128, 2048, 1e4, 1e4, 1e4]


def test_updates_agree_with_a_transcription_of_the_formulas() -> None:
    optimizer = make()
    damping, tau2 = 1e-3, None
    accepted = set()
    for t in range(10):
        arrays, values = optimizer.state()
        B, P, c = arrays["directions"], arrays["covariance"], arrays["point"]
        H = len(B)
        Z = curved(c[None]).astype(np.float64).reshape(-1)
        points = optimizer.ask().points[-5:]
        optimizer.tell(evaluation(curved(optimizer.ask().points)))
        measured = (curved(points).reshape(5, -1) - Z) / 0.01
        kept = arrays.get("jacobian", np.zeros((0, N * C)))
        G = np.concatenate([kept, measured])
        square = (measured**2).mean()
        tau2 = square if tau2 is None else 0.7 * tau2 + 0.3 * square
        q = float(str(values["drift"])) or 0.3 * tau2
        arrays, values = optimizer.state()
        np.testing.assert_allclose(arrays["jacobian"], G, atol=1e-3)
        assert values["scale"] == pytest.approx(tau2, rel=1e-4)
        assert values["drift"] == pytest.approx(q, rel=1e-4)
        assert np.abs(P[-5:]).max() == 0
        G = arrays["jacobian"].astype(np.float64)

        trials = optimizer.ask().points
        logits = curved(trials)
        if t == 4:  # a round without gain
            logits[:, np.arange(N), LABELS] -= 2
        p = softmax(Z.reshape(N, C).astype(np.float32))
        h = (p * (1 - p)).sum(axis=1).mean()
        problem = SoftmaxProblem(
            Z.reshape(N, C).astype(np.float32), arrays["jacobian"].reshape(H, N, C), LABELS
        )
        for point, factor in zip(trials, (0.25, 1, 4), strict=True):
            ridge = factor * damping * tau2 * np.eye(H) + h * P
            a = (point - c) @ B.T
            np.testing.assert_allclose(c + a @ B, point, atol=1e-12)
            solved = problem.minimise(ridge, np.zeros(H), 50)
            assert problem.loss(a, ridge) == pytest.approx(problem.loss(solved, ridge), abs=2e-3)

        answer = evaluation(logits)
        best = int(answer.losses.argmin())
        gained = answer.losses[best] < loss(curved, c)
        accepted.add(gained)
        a = (trials[best] - c) @ B.T
        s = float(a @ a)
        e = logits[best].reshape(-1) - Z - a @ G
        q *= np.clip((e**2).mean() / (a @ P @ a + q * s**2 / 4), 0.25, 4) ** 0.5
        drifted = P @ a + q * s / 4 * a
        gain = drifted / (a @ drifted + q * s**2 / 4 + 1e-12)
        G = G + np.outer(gain, e)
        P = P - np.outer(gain, drifted)
        P = P - min(0.0, np.linalg.eigvalsh((P + P.T) / 2)[0]) * np.eye(H)
        if gained:
            P = P + q * s * np.eye(H)
            damping = np.clip(damping * (0.25, 1, 4)[best], 1e-8, 1e4)
        else:
            damping = min(16 * damping, 1e4)
        optimizer.tell(answer)

        arrays, values = optimizer.state()
        rows = np.sort(np.argsort(np.diag(P), kind="stable")[:10])
        np.testing.assert_array_equal(arrays["directions"][:-5], B[rows])
        np.testing.assert_allclose(arrays["jacobian"], G[rows], atol=1e-3)
        np.testing.assert_allclose(
            arrays["covariance"][:-5, :-5], P[np.ix_(rows, rows)], rtol=1e-3, atol=1e-5 * tau2
        )
        assert values["damping"] == pytest.approx(damping)
        assert values["drift"] == pytest.approx(q, rel=1e-3)
    assert accepted == {True, False}


@pytest.mark.parametrize("asked", [False, True], ids=["told", "asked"])
def test_a_run_goes_on_with_the_same_bytes_after_any_proposal(asked: bool) -> None:
    whole, first = make(), make()
    expected = play(whole, curved, 16)
    for done in range(16):
        if asked:
            first.ask()
        second = make(np.zeros(DIM), seed=99)
        second.restore(stored(first.state()))
        assert second.recommend().tobytes() == first.recommend().tobytes()
        assert play(second, curved, min(6, 16 - done)) == expected[done : done + 6]
        assert play(first, curved, 1) == expected[done : done + 1]


@pytest.mark.parametrize("name", ["damping", "scale", "drift"])
def test_saved_numbers_whose_products_overflow_are_refused(name: str) -> None:
    optimizer = make()
    play(optimizer, curved, 4)
    arrays, values = optimizer.state()
    with pytest.raises(FormatError, match=name):
        make().restore((arrays, {**values, name: 1e308}))


def test_asking_twice_and_looking_change_nothing() -> None:
    plain, curious = make(), make()
    for _ in range(8):
        assert curious.ask().points.tobytes() == curious.ask().points.tobytes()
        for array in curious.state()[0].values():
            array[...] = np.nan
        curious.ask().points[:] = np.nan
        curious.recommend()[:] = np.nan
        curious.probes(3, np.random.default_rng(1))[:] = np.nan
        assert curious.finished() is None
        assert play(curious, curved, 1) == play(plain, curved, 1)


def test_answers_are_no_alias() -> None:
    plain, touched = make(), make()
    for _ in range(8):
        answer = evaluation(curved(touched.ask().points))
        touched.tell(answer)
        assert answer.logits is not None
        answer.logits[:] = np.nan
        answer.losses[:] = np.nan
        play(plain, curved, 1)
        assert touched.ask().points.tobytes() == plain.ask().points.tobytes()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"memory": 12}, 12),
        ({"memory": 5}, 5),
        ({"memory_mb": 4e-6 * N * C * 9.5}, 9),
        ({"memory_mb": 1e-6}, 5),
        ({"memory": 500}, DIM),
        ({"kalman": False}, 5),
    ],
)
def test_no_more_directions_are_kept_than_there_is_room_for(
    settings: dict[str, Any], expected: int
) -> None:
    optimizer = make(**settings)
    most = 0
    for _ in range(24):
        play(optimizer, curved, 1)
        arrays, _ = optimizer.state()
        assert arrays["jacobian"].shape[0] <= len(arrays["directions"])
        most = max(most, len(arrays["directions"]))
    assert most == expected


def test_fewer_values_than_directions_are_probed_along_each() -> None:
    logits, _ = linear(3)
    optimizer = make(np.full(3, 0.2))
    before = loss(logits, optimizer.recommend())
    assert optimizer.ask().points.shape == (4, 3)
    play(optimizer, logits, 8)
    assert optimizer.ask().points.shape == (3, 3)
    assert loss(logits, optimizer.recommend()) < before


def test_logits_that_nothing_moves_leave_the_point() -> None:
    optimizer = make()
    play(optimizer, lambda points: np.ones((len(points), N, C), np.float32), 20)
    np.testing.assert_array_equal(optimizer.recommend(), START)
    assert np.isfinite(optimizer.ask().points).all()


def test_probes_are_pairs_with_the_point_drawn_from_the_generator_given() -> None:
    optimizer = make()
    for _ in range(7):
        rounds = optimizer.probes(8, np.random.default_rng(2))
        assert rounds.shape == (2, 10, DIM)
        np.testing.assert_array_equal(rounds[0, 1::2], np.tile(optimizer.recommend(), (5, 1)))
        moves = rounds[0, 0::2] - rounds[0, 1::2]
        np.testing.assert_allclose(moves @ moves.T, 0.01**2 * np.eye(5), atol=1e-12)
        kept = optimizer.state()[0]["directions"][:-5]
        np.testing.assert_allclose(moves @ kept.T, 0, atol=1e-12)
        np.testing.assert_array_equal(rounds, optimizer.probes(8, np.random.default_rng(2)))
        play(optimizer, curved, 1)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="n_directions is 0"):
        OgnContextConfig(n_directions=0)
    for name in ("perturbation", "damping", "memory_mb"):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            OgnContextConfig(**{name: 0.0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"memory is 9, expected at least n_directions \(10\)"):
        OgnContextConfig(memory=9)


def test_losses_without_logits_are_refused() -> None:
    optimizer = make()
    with pytest.raises(ConfigError, match="needs the logits of every image"):
        optimizer.tell(Evaluation(np.ones(6), np.ones(6), LABELS, 1))

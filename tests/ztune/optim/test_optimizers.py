"""What every optimizer of the house keeps to, whatever its method."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from ztune.methods.ogn_context import GaussNewton, OgnContextConfig
from ztune.methods.sharpzo import SharpZo, SharpZoConfig
from ztune.optim.cma import Cma, CmaConfig
from ztune.optim.rgf import Rgf, RgfConfig
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.optim.validation import EarlyStop, Validated
from ztune.types import F32, F64, Evaluation, Optimizer, Proposal, State

DIM = 6
Factory = Callable[[int], Optimizer]
START = np.linspace(1.0, 2.0, DIM)
LABELS = np.tile([0, 1], DIM)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def spsa(seed: int, **settings: float) -> Optimizer:
    return Spsa(SpsaConfig(step_size=0.05, **settings), START, rng(seed))  # type: ignore[arg-type]


def cma(seed: int, **settings: object) -> Optimizer:
    config = CmaConfig(sigma=0.3, **settings)  # type: ignore[arg-type]
    return Cma(config, START, rng(seed))


def sharpzo(seed: int, warmup_steps: int, patience: int | None = None) -> Optimizer:
    config = SharpZoConfig(
        population=8,
        radius=0.01,
        warmup_steps=warmup_steps,
        warmup_patience=patience,
        step_size=0.02,
        smoothing=0.005,  # its differences must stand out of the noise below
        prune_every=7,
        probes_per_call=4,
    )
    return SharpZo(config, START, rng(seed))


def gauss_newton(seed: int, **settings: object) -> Optimizer:
    config = OgnContextConfig(**{"n_directions": 2} | settings)  # type: ignore[arg-type]
    return GaussNewton(config, START, rng(seed))


FACTORIES: dict[str, Factory] = {
    "spsa": spsa,
    "spsa-gc": lambda seed: spsa(seed, momentum=0.8, clip=False),
    "rgf": lambda seed: Rgf(RgfConfig(0.02, 0.001), START, 200, rng(seed)),
    "cma full": cma,
    "cma full bound": lambda seed: cma(seed, bound=2.1),
    "cma separable": lambda seed: cma(seed, covariance="separable", keep="mean"),
    "sharpzo warm-up": lambda seed: sharpzo(seed, 10_000),
    "sharpzo validating": lambda seed: sharpzo(seed, 10_000, patience=3),
    "sharpzo sparse": lambda seed: sharpzo(seed, 0),
    "sharpzo both": lambda seed: sharpzo(seed, 2),
    "gauss-newton": gauss_newton,
    "gauss-newton plain": lambda seed: gauss_newton(seed, kalman=False, n_directions=4),
    "gauss-newton validated": lambda seed: Validated(gauss_newton(seed), 6),
    "validated": lambda seed: Validated(spsa(seed), 15),
    "early stop": lambda seed: EarlyStop(Validated(sharpzo(seed, 2), 20), 1000),
}


@pytest.fixture(params=FACTORIES, ids=lambda name: name.replace(" ", "-"))
def make(request: pytest.FixtureRequest) -> Factory:
    return FACTORIES[request.param]


def quadratic(points: F64) -> F64:
    return np.asarray((np.arange(1, points.shape[1] + 1) * points**2).sum(axis=1))


def logits_of(points: F64) -> F32:
    """Return logits whose cross-entropy is least where the quadratic is.

    Each value of the point moves one of two classes, for two images with either label.
    """
    moved = np.repeat(np.sqrt(np.arange(1, points.shape[1] + 1)) * points, 2, axis=1)
    return np.stack([np.zeros_like(moved), moved], axis=-1).astype(np.float32)


def evaluation(proposal: Proposal, losses: F64) -> Evaluation:
    # An accuracy that falls with the loss, as coarse as of few images.
    accuracies = np.round(1 / (1 + quadratic(proposal.points)), 2)
    return Evaluation(losses, accuracies, LABELS.copy(), 1, logits_of(proposal.points))


def play(optimizer: Optimizer, n: int) -> list[bytes]:
    """Answer n rounds; return the bytes of what was asked, and how."""
    asked = []
    for _ in range(n):
        proposal = optimizer.ask()
        flags = bytes([proposal.same_batch, proposal.validation])
        asked.append(flags + proposal.points.tobytes())
        optimizer.tell(evaluation(proposal, quadratic(proposal.points)))
    return asked


def stored(state: State) -> State:
    """Return a state as it comes back from disk: arrays as bytes, values as JSON."""
    arrays, values = state
    for array in arrays.values():
        assert isinstance(array, np.ndarray)
    bytes_of = {name: (a.tobytes(), a.dtype.str, a.shape) for name, a in arrays.items()}
    read = {
        name: np.frombuffer(raw, dtype).reshape(shape)
        for name, (raw, dtype, shape) in bytes_of.items()
    }
    return read, json.loads(json.dumps(dict(values), sort_keys=True, allow_nan=False))


def test_points_and_recommendation_have_their_shapes(make: Factory) -> None:
    optimizer = make(1)
    assert optimizer.finished() is None
    for _ in range(30):
        proposal = optimizer.ask()
        points = proposal.points
        assert points.dtype == np.float64
        assert points.ndim == 2
        assert points.shape[1] == DIM
        assert np.isfinite(points).all()
        if proposal.validation:
            assert len(points) == 1
            assert not proposal.same_batch
        assert optimizer.recommend().shape == (DIM,)
        assert optimizer.recommend().dtype == np.float64
        optimizer.tell(evaluation(proposal, quadratic(points)))
    np.testing.assert_array_equal(START, np.linspace(1.0, 2.0, DIM))


def test_the_first_proposal_asks_for_new_images(make: Factory) -> None:
    assert not make(1).ask().same_batch


def test_before_any_answer_the_start_is_recommended(make: Factory) -> None:
    np.testing.assert_array_equal(make(1).recommend(), START)


def test_asking_again_and_recommending_change_nothing(make: Factory) -> None:
    plain, curious = make(1), make(1)
    for _ in range(25):
        for _ in range(2):
            curious.ask()
            curious.recommend()
            curious.state()
            curious.finished()
            curious.probes(3, rng(9))
        assert curious.ask() is not curious.ask()
        assert play(plain, 1) == play(curious, 1)


def test_nothing_handed_out_or_in_is_an_alias(make: Factory) -> None:
    start = START.copy()
    plain, touched = make(1), make(1)
    for _ in range(25):
        proposal = touched.ask()
        losses = quadratic(proposal.points)
        answer = evaluation(proposal, losses)
        proposal.points[:] = np.nan
        touched.recommend()[:] = np.nan
        touched.probes(2, rng(3))[:] = np.nan
        arrays, values = touched.state()
        for array in arrays.values():
            array[...] = np.nan
        dict(values).clear()
        touched.tell(answer)
        losses[:] = np.nan
        answer.accuracies[:] = np.nan
        assert answer.logits is not None
        answer.logits[:] = np.nan
        answer.labels[:] = 99
        play(plain, 1)
        assert plain.ask().points.tobytes() == touched.ask().points.tobytes()
        assert plain.recommend().tobytes() == touched.recommend().tobytes()
    np.testing.assert_array_equal(START, start)


def test_a_restored_state_is_no_alias(make: Factory) -> None:
    first, plain = make(1), make(1)
    play(first, 9)
    play(plain, 9)
    arrays, values = first.state()
    second = make(2)
    second.restore((arrays, values))
    for array in arrays.values():
        array[...] = np.nan
    assert play(second, 10) == play(plain, 10)


def test_the_start_is_copied() -> None:
    for build in (
        lambda start: Spsa(SpsaConfig(), start, rng(0)),
        lambda start: Rgf(RgfConfig(), start, 5, rng(0)),
        lambda start: Cma(CmaConfig(), start, rng(0)),
        lambda start: SharpZo(SharpZoConfig(), start, rng(0)),
        lambda start: GaussNewton(OgnContextConfig(), start, rng(0)),
    ):
        start = np.ones(3)
        optimizer: Optimizer = build(start)
        start[:] = 7.0
        np.testing.assert_array_equal(optimizer.recommend(), np.ones(3))
        assert np.abs(optimizer.ask().points).max() < 6


def test_equal_seeds_give_equal_bytes_and_others_do_not(make: Factory) -> None:
    np.random.seed(0)  # noqa: NPY002 — the global state must play no part
    first = play(make(1), 40)
    np.random.seed(1)  # noqa: NPY002
    assert first == play(make(1), 40)
    assert first != play(make(2), 40)


def test_an_answer_may_come_before_the_question(make: Factory) -> None:
    asked, unasked = make(1), make(1)
    answer = evaluation(asked.ask(), quadratic(asked.ask().points))
    asked.tell(answer)
    unasked.tell(answer)
    assert play(asked, 5) == play(unasked, 5)


@pytest.mark.parametrize("asked", [False, True], ids=["told", "asked"])
def test_a_run_goes_on_with_the_same_bytes_after_any_round(make: Factory, asked: bool) -> None:
    n = 45
    whole = make(1)
    expected = play(whole, n)
    first = make(1)
    for done in range(n):
        if asked:
            first.ask()
        second = make(99)
        second.restore(stored(first.state()))
        assert second.recommend().tobytes() == first.recommend().tobytes()
        assert second.finished() == first.finished()
        assert play(second, min(12, n - done)) == expected[done : done + 12]
        play(first, 1)
    assert first.recommend().tobytes() == whole.recommend().tobytes()


def test_saving_over_and_over_loses_nothing(make: Factory) -> None:
    whole, handed_on = make(1), make(1)
    for _ in range(45):
        successor = make(50)
        successor.restore(stored(handed_on.state()))
        handed_on = successor
        assert play(handed_on, 1) == play(whole, 1)


@pytest.mark.parametrize("noise", [0.0, 0.01], ids=["exact", "noisy"])
def test_it_improves_a_quadratic(make: Factory, noise: float) -> None:
    optimizer, noises = make(1), rng(5)
    before = quadratic(optimizer.recommend()[None])[0]
    queries = 0
    while queries < 4000:
        proposal = optimizer.ask()
        losses = quadratic(proposal.points)
        queries += len(losses)
        # Of every candidate's own: what a round has in common cancels in each method.
        losses = losses + noise * noises.standard_normal(len(losses))
        optimizer.tell(evaluation(proposal, losses))
    assert quadratic(optimizer.recommend()[None])[0] < 0.1 * before


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_losses_of_any_magnitude_leave_finite_points(make: Factory, scale: float) -> None:
    optimizer = make(1)
    for _ in range(40):
        proposal = optimizer.ask()
        # Losses that stay of this size, however far a step has gone.
        losses = scale * (1 + np.sin(np.arange(len(proposal.points)) + 1.0))
        optimizer.tell(evaluation_of_losses(losses))
    assert np.isfinite(optimizer.recommend()).all()
    assert np.isfinite(optimizer.ask().points).all()


def evaluation_of_losses(losses: F64) -> Evaluation:
    logits = np.sin(np.arange(len(losses) * len(LABELS) * 2.0)) * (losses != losses[0]).any()
    shaped = logits.reshape(len(losses), len(LABELS), 2).astype(np.float32)
    return Evaluation(losses, np.zeros_like(losses), LABELS.copy(), 1, shaped)


def test_equal_losses_leave_finite_points(make: Factory) -> None:
    optimizer = make(1)
    for _ in range(40):
        optimizer.tell(evaluation_of_losses(np.ones(len(optimizer.ask().points))))
    assert np.isfinite(optimizer.recommend()).all()


def test_probes_are_pairs_drawn_from_the_generator_given(make: Factory) -> None:
    optimizer = make(1)
    before = json.dumps(dict(optimizer.state()[1]), sort_keys=True)
    rounds = optimizer.probes(8, rng(2))
    assert rounds.ndim == 3
    assert rounds.shape[2] == DIM
    assert rounds.shape[1] % 2 == 0
    assert rounds.shape[0] * rounds.shape[1] >= 16
    pairs = rounds.reshape(-1, 2, DIM)
    assert (pairs[:, 0] != pairs[:, 1]).any(axis=1).all()
    np.testing.assert_array_equal(rounds, optimizer.probes(8, rng(2)))
    assert json.dumps(dict(optimizer.state()[1]), sort_keys=True) == before
    if optimizer.ask().points.shape[0] > 1:
        assert (optimizer.probes(1, rng(3)) != rounds[:1]).any()


def test_probes_are_those_that_each_method_lives_off() -> None:
    start = np.ones(9)
    one_sided = Rgf(RgfConfig(perturbation=0.02), start, 5, rng(0)).probes(7, rng(1))
    assert one_sided.shape == (2, 10, 9)
    np.testing.assert_array_equal(one_sided[:, 1::2], np.ones((2, 5, 9)))
    lengths = np.linalg.norm(one_sided[:, 0::2] - 1, axis=2)
    np.testing.assert_allclose(lengths, 0.02, rtol=1e-9)

    samples = Cma(CmaConfig(7, sigma=0.5), start, rng(0)).probes(4, rng(1))
    assert samples.shape == (2, 6, 9)
    np.testing.assert_allclose(samples[:, 0::2] + samples[:, 1::2], 2.0, rtol=1e-12)
    normals = rng(1).standard_normal((3, 9))
    np.testing.assert_allclose(samples[0, 0::2], 1 + 0.5 * normals, rtol=1e-12)

    config = SharpZoConfig(smoothing=0.01, probes_per_call=4)
    rounds = SharpZo(config, start, rng(0)).probes(5, rng(1))
    assert rounds.shape == (3, 4, 9)
    moves = rounds - 1
    assert (np.count_nonzero(moves, axis=2) == 1).all()
    np.testing.assert_allclose(moves[:, 0::2].sum(axis=2), 0.01, rtol=1e-9)
    np.testing.assert_allclose(moves[:, 1::2], -moves[:, 0::2], atol=1e-15)

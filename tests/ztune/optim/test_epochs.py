"""Candidates on every batch of an epoch, against a loop over candidates and batches."""

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.optim.cma import Cma, CmaConfig
from ztune.optim.epochs import Epochs
from ztune.types import F64, Evaluation

DIM, SIZE = 3, 4


def inner() -> Cma:
    config = CmaConfig(population=SIZE, keep="mean")
    return Cma(config, np.zeros(DIM), np.random.default_rng(5))


def loss(point: F64, batch: int) -> float:
    """Return a loss whose best point differs by batch."""
    return float(((point - 0.3 * batch) ** 2).sum() + 0.5 * np.sin(7 * batch + point[0]))


def tell(optimizer: Epochs, batch: int) -> int:
    points = optimizer.ask().points
    losses = np.array([loss(point, batch) for point in points])
    optimizer.tell(Evaluation(losses, np.zeros(len(points)), np.zeros(1, np.int64), batch + 1))
    return len(points)


def by_candidate(n_batches: int, most: int) -> tuple[list[F64], dict[str, F64], list[int]]:
    """Return all candidates, the recommendation of each `keep`, and the generations' sizes."""
    cma = inner()
    seen: list[F64] = []
    sizes: list[int] = []
    best: tuple[float, F64] | None = None
    running: tuple[float, F64] | None = None
    while len(seen) < most:
        points = cma.ask().points
        fitness = []
        for point in points[: most - len(seen)]:
            total = 0.0
            for batch in range(n_batches):
                total += loss(point, batch)
                if running is None or total / (batch + 1) < running[0]:
                    running = total / (batch + 1), point
            fitness.append(total / n_batches)
            if best is None or fitness[-1] < best[0]:
                best = fitness[-1], point
        sizes.append(len(fitness))
        seen += [*points[: len(fitness)]]
        if len(fitness) == len(points):
            zeros = np.zeros(len(points))
            cma.tell(Evaluation(np.array(fitness), zeros, np.zeros(1, np.int64), 1))
    assert best is not None
    assert running is not None
    kept = {"best": best[1], "running": running[1], "last": seen[-1], "mean": cma.recommend()}
    return seen, kept, sizes


@pytest.mark.parametrize(("n_batches", "most"), [(1, 8), (3, 8), (3, 10), (2, 3), (4, 1)])
def test_it_equals_a_loop_over_candidates_and_batches(n_batches: int, most: int) -> None:
    seen, kept, sizes = by_candidate(n_batches, most)
    assert (n_batches > 1 and most > 4) <= (len({point.tobytes() for point in kept.values()}) > 2)
    for keep, expected in kept.items():
        optimizer = Epochs(inner(), n_batches, most, keep)
        asked: list[F64] = []
        n_queries = []
        while optimizer.finished() is None:
            asked += [*optimizer.ask().points]
            for batch in range(n_batches):
                proposal = optimizer.ask()
                assert (proposal.mid_step, proposal.same_batch) == (batch > 0, False)
                before = optimizer.recommend()
                n_queries.append(tell(optimizer, batch))
                if batch < n_batches - 1:  # the step has not ended
                    np.testing.assert_array_equal(optimizer.recommend(), before)
        np.testing.assert_array_equal(asked, seen)
        assert n_queries == [size for size in sizes for _ in range(n_batches)]
        assert sum(n_queries) == most * n_batches
        np.testing.assert_array_equal(optimizer.recommend(), expected)
        assert optimizer.finished() == "candidates"


@pytest.mark.parametrize("keep", ["best", "running", "last", "mean"])
def test_a_saved_run_continues_alike_from_every_batch(keep: str) -> None:
    whole = Epochs(inner(), 3, 10, keep)
    n_told = 0
    while whole.finished() is None:
        again = Epochs(inner(), 3, 10, keep)
        again.restore(whole.state())
        np.testing.assert_array_equal(again.ask().points, whole.ask().points)
        assert again.ask().mid_step == whole.ask().mid_step
        for one in (again, whole):
            tell(one, n_told % 3)
        for mine, others in zip(again.state()[0].items(), whole.state()[0].items(), strict=True):
            assert mine[0] == others[0]
            np.testing.assert_array_equal(mine[1], others[1])
        n_told += 1
    assert n_told == 9
    again = Epochs(inner(), 3, 10, keep)
    again.restore(whole.state())
    assert again.finished() == "candidates"
    np.testing.assert_array_equal(again.recommend(), whole.recommend())


def test_impossible_settings_are_refused() -> None:
    for n_batches, most in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="expected at least 1"):
            Epochs(inner(), n_batches, most)
    with pytest.raises(ConfigError, match='keep is "first", expected one of best, mean, running'):
        Epochs(inner(), 1, 1, "first")

"""Validation passes and early stopping around an optimizer."""

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.methods.sharpzo import SharpZo, SharpZoConfig
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.optim.validation import EarlyStop, Validated
from ztune.types import F64, Evaluation, Optimizer


def evaluation(losses: F64, accuracy: float = 0.0) -> Evaluation:
    return Evaluation(losses, np.full_like(losses, accuracy), np.zeros(1, np.int64), 1)


def spsa() -> Spsa:
    return Spsa(SpsaConfig(n_pairs=2), np.ones(3), np.random.default_rng(0))


def answer(optimizer: Optimizer, accuracy: float = 0.0, loss: float = 1.0) -> bool:
    """Answer one round; return whether it was a validation."""
    proposal = optimizer.ask()
    losses = (proposal.points**2).sum(axis=1)
    if proposal.validation:
        losses = np.full(len(losses), loss)
    optimizer.tell(evaluation(losses, accuracy))
    return proposal.validation


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, "pvpvpvpvp"), (4, "pvpvpvpvp"), (5, "ppvppvppv"), (12, "pppvpppvp")],
)
def test_a_pass_comes_once_enough_queries_were_told(every: int, expected: str) -> None:
    optimizer = Validated(spsa(), every)
    rounds = "".join("v" if answer(optimizer) else "p" for _ in range(9))
    assert rounds == expected


def test_the_inner_optimizer_sees_none_of_it() -> None:
    alone, inner = spsa(), spsa()
    for _ in range(10):
        answer(alone)
    outer, n_rounds = Validated(inner, 4), 0
    while n_rounds < 10:
        n_rounds += not answer(outer, accuracy=0.5)
    assert alone.ask().points.tobytes() == inner.ask().points.tobytes()


def test_the_best_is_of_highest_accuracy_then_lowest_loss_then_earliest() -> None:
    inner = spsa()
    optimizer = Validated(inner, 4)
    start = optimizer.recommend()
    np.testing.assert_array_equal(start, np.ones(3))
    expected = start
    for accuracy, loss, better in [
        (0.5, 2.0, True),
        (0.4, 0.1, False),
        (0.5, 2.0, False),
        (0.5, 1.5, True),
        (0.5, 1.6, False),
        (0.6, 9.0, True),
    ]:
        answer(optimizer)
        assert optimizer.ask().validation
        np.testing.assert_array_equal(optimizer.ask().points, inner.recommend()[None])
        if better:
            expected = inner.recommend()
        answer(optimizer, accuracy, loss)
        np.testing.assert_array_equal(optimizer.recommend(), expected)


def test_the_last_is_the_inner_optimizers() -> None:
    inner = spsa()
    optimizer = Validated(inner, 4, keep="last")
    for accuracy in (0.9, 0.1, 0.1):
        answer(optimizer)
        answer(optimizer, accuracy)
        np.testing.assert_array_equal(optimizer.recommend(), inner.recommend())


def test_a_pass_waits_for_the_end_of_a_step_and_lets_the_inner_ones_through() -> None:
    def rounds(optimizer: Optimizer, n: int) -> str:
        kinds = []
        for _ in range(n):
            proposal = optimizer.ask()
            kinds.append("v" if proposal.validation else "s" if proposal.same_batch else "p")
            answer(optimizer, 0.5)
        return "".join(kinds)

    config = SharpZoConfig(population=4, warmup_steps=9, probes_per_call=2)
    plain = SharpZo(config, np.zeros(3), np.random.default_rng(0))
    assert rounds(Validated(plain, 3), 10) == "psssvpsssv"
    own = SharpZoConfig(population=4, warmup_steps=9, probes_per_call=2, warmup_patience=5)
    validating = SharpZo(own, np.zeros(3), np.random.default_rng(0))
    # Its own pass counts, so that the same point is not charged twice.
    outer = Validated(validating, 3)
    assert rounds(outer, 10) == "psssvpsssv"
    assert rounds(Validated(SharpZo(own, np.zeros(3), np.random.default_rng(0)), 99), 5) == "psssv"
    inner = SharpZo(own, np.zeros(3), np.random.default_rng(0))
    outer = Validated(inner, 99)
    rounds(outer, 5)
    first = inner.recommend()
    rounds(outer, 5)
    np.testing.assert_array_equal(outer.recommend(), first)  # the second was no better


def test_it_stops_after_so_many_passes_without_a_gain() -> None:
    optimizer = EarlyStop(Validated(spsa(), 4), patience=2)
    for accuracy in (0.5, 0.5, 0.6, 0.6):
        answer(optimizer)
        assert optimizer.finished() is None
        assert answer(optimizer, accuracy)
        assert optimizer.finished() is None
    answer(optimizer)
    answer(optimizer, 0.55)
    assert optimizer.finished() == "early stop: no gain in 2 validations"
    again = EarlyStop(Validated(spsa(), 4), patience=2)
    again.restore(optimizer.state())
    assert again.finished() == "early stop: no gain in 2 validations"


def test_a_gain_below_the_least_counts_as_none_and_rounding_does_not_decide() -> None:
    optimizer = EarlyStop(Validated(spsa(), 4), patience=1, least_gain=0.01)
    for accuracy in (0.56, 0.57, 0.58):  # 0.57 − 0.56 is a little less than 0.01 in binary
        answer(optimizer)
        answer(optimizer, accuracy)
        assert optimizer.finished() is None
    answer(optimizer)
    answer(optimizer, 0.589)
    assert optimizer.finished() == "early stop: no gain in 1 validation"


def test_tuning_accuracies_do_not_count() -> None:
    optimizer = EarlyStop(Validated(spsa(), 400), patience=1)
    for accuracy in (0.9, 0.1, 0.1, 0.1):
        assert not answer(optimizer, accuracy)
    assert optimizer.finished() is None


def test_the_inner_reason_passes_through() -> None:
    inner = EarlyStop(Validated(spsa(), 4), patience=1)
    outer = EarlyStop(Validated(inner, 400), patience=5)
    for accuracy in (0.5, 0.5):
        assert outer.finished() is None
        answer(outer)
        answer(outer, accuracy)
    assert outer.finished() == "early stop: no gain in 1 validation"


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="every is 0"):
        Validated(spsa(), 0)
    with pytest.raises(ConfigError, match='keep is "first"'):
        Validated(spsa(), 1, keep="first")
    with pytest.raises(ConfigError, match="patience is 0"):
        EarlyStop(spsa(), 0)
    with pytest.raises(ConfigError, match=r"least_gain is -0\.1"):
        EarlyStop(spsa(), 1, -0.1)

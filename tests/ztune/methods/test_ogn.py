"""A mixture of prompts: what it asks for, and the weights that it finds."""

import json
from typing import Any

import numpy as np
import pytest

from ztune.errors import ConfigError
from ztune.methods import ogn
from ztune.methods.ogn import PROMPTS, STALLED, OgnConfig, PromptMixture
from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64, Evaluation, State

N, C = 60, 4
LABELS: I64 = np.arange(N) % C
N_HIDDEN, N_WORDS = 8, 300
VOCABULARY: I64 = np.delete(np.arange(N_WORDS), [5, 77, 299])
WORDS: I64 = np.array([7, 7, 9])
SCARCE = 11 * 4 * N * C / 1e6
"""Megabytes of eleven rows of logits: a round of five, and twice a rank of three."""


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def hidden_logits() -> F64:
    """Return f64[N_HIDDEN, N, C]: the labels, and patterns far stronger that say nothing."""
    patterns = 3 * rng(1).standard_normal((N_HIDDEN, N, C))
    patterns[0] = np.eye(C)[LABELS]
    return patterns


def answered(points: F64) -> F32:
    """Answer as a model in which every word adds some of each pattern, and some of its own."""
    words = rng(2).standard_normal((N_WORDS, N_HIDDEN))
    amounts = words[points.astype(np.int64)].sum(axis=1)
    own = 0.01 * points.sum(axis=1)[:, None, None] * rng(3).standard_normal((N, C)) / N_WORDS
    return (np.tensordot(amounts, hidden_logits(), 1) + own).astype(np.float32)


def evaluation(logits: F32) -> Evaluation:
    losses = cross_entropy(logits, LABELS).mean(axis=-1)
    accuracies = (logits.argmax(axis=-1) == LABELS).mean(axis=-1)
    return Evaluation(losses, accuracies, LABELS.copy(), 1, logits)


def make(
    seed: int = 1, words: I64 | None = WORDS, budget: int = 10**6, **settings: Any
) -> PromptMixture:
    config = OgnConfig(**{"n_prompts": 5, "rank": 12} | settings)
    return PromptMixture(config, words, 3, VOCABULARY, budget, rng(seed))


def play(optimizer: PromptMixture, n_rounds: int) -> list[bytes]:
    """Return the bytes of each proposal and of the weights then."""
    seen = []
    for _ in range(n_rounds):
        points = optimizer.ask().points
        optimizer.tell(evaluation(answered(points)))
        seen.append(points.tobytes() + optimizer.mixture().weights.tobytes())
    return seen


def stored(state: State) -> State:
    """Return a state as it comes back from disk: arrays as bytes, values as JSON."""
    arrays, values = state
    read = {
        name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in arrays.items()
    }
    return read, json.loads(json.dumps(dict(values), allow_nan=False))


@pytest.mark.parametrize("words", [WORDS, None], ids=["words", "random"])
@pytest.mark.parametrize("settings", [{}, {"ridge": 0.01}, {"rank": 3}])
def test_weights_give_the_logits_that_the_fit_saw(
    words: I64 | None, settings: dict[str, Any]
) -> None:
    optimizer = make(words=words, **settings)
    play(optimizer, 8)
    found = optimizer.mixture()
    logits = np.tensordot(found.weights, answered(found.points), 1).astype(np.float32)
    fitted = optimizer.fitted()
    assert fitted is not None
    assert fitted[0] == pytest.approx(cross_entropy(logits, LABELS).mean(), abs=1e-3)
    assert fitted[1] == pytest.approx((logits.argmax(axis=-1) == LABELS).mean(), abs=1e-9)


@pytest.mark.parametrize("words", [WORDS, None], ids=["words", "random"])
@pytest.mark.parametrize("settings", [{}, {"ridge": 1e-6}, {"ridge": 1e9}, {"rank": 3}])
def test_weights_move_and_keep_their_sum(words: I64 | None, settings: dict[str, Any]) -> None:
    optimizer, moved = make(words=words, **settings), 0.0
    for n_rounds in range(1, 13):
        play(optimizer, 1)
        weights = optimizer.mixture().weights
        assert len(weights) == 5 * n_rounds
        assert weights.sum() == pytest.approx(1, abs=1e-9)
        moved = max(moved, float(np.ptp(weights[1:])))
    assert (moved > 0.1) == (settings != {"ridge": 1e9})


def test_a_combination_classifies_where_no_prompt_does() -> None:
    optimizer = make()
    alone = []
    for _ in range(8):
        points = optimizer.ask().points
        told = evaluation(answered(points))
        alone += list(zip(told.losses, told.accuracies, strict=True))
        optimizer.tell(told)
    fitted = optimizer.fitted()
    assert fitted is not None
    assert min(loss for loss, _ in alone) > 1
    assert max(accuracy for _, accuracy in alone) < 0.7
    assert fitted[0] < 0.1
    assert fitted[1] == 1
    found = optimizer.mixture()
    assert found.weights.min() < 0 < found.weights.max()
    np.testing.assert_array_equal(optimizer.recommend(), found.points[found.weights.argmax()])


def test_heavy_ridges_leave_the_weights_at_their_start() -> None:
    for words, first in ((WORDS, 0.5 + 0.5 / 20), (None, 1 / 20)):
        optimizer = make(words=words, ridge=1e9)
        play(optimizer, 4)
        weights = optimizer.mixture().weights
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert weights[0] == pytest.approx(first, abs=1e-6)
        np.testing.assert_allclose(weights[1:], (1 - first) / 19, atol=1e-6)
    # A light one moves them.
    optimizer = make(ridge=1e-3)
    play(optimizer, 4)
    assert np.abs(optimizer.mixture().weights - weights).max() > 0.1


def test_before_an_answer_the_first_prompt_stands_alone() -> None:
    optimizer = make()
    found = optimizer.mixture()
    np.testing.assert_array_equal(found.points, WORDS[None])
    np.testing.assert_array_equal(found.weights, [1])
    np.testing.assert_array_equal(optimizer.recommend(), WORDS)
    assert optimizer.fitted() is None
    assert optimizer.finished() is None
    assert not optimizer.ask().same_batch
    other = make(words=None)
    np.testing.assert_array_equal(other.mixture().points[0], other.ask().points[0])


def test_words_are_drawn_by_zipfs_law_from_the_vocabulary() -> None:
    vocabulary = np.delete(np.arange(2000), [20, 21, 1999])
    config = OgnConfig(n_prompts=4000)
    drawn = PromptMixture(config, None, 5, vocabulary, 4000, rng(0)).ask().points
    assert drawn.shape == (4000, 5)
    ids = drawn.astype(np.int64)
    np.testing.assert_array_equal(ids, drawn)
    assert set(np.unique(ids)) <= set(vocabulary)
    ranks = np.searchsorted(vocabulary, ids.ravel())
    # Single characters, one in a hundred of the vocabulary, are left out.
    assert ranks.min() == 19
    assert ranks.max() == len(vocabulary) - 1
    # The next 180 get the same number as all the others.
    assert (ranks < 199).mean() == pytest.approx(0.5, abs=0.01)
    assert np.unique(drawn, axis=0).shape[0] > 3990


def test_only_the_first_round_has_the_words() -> None:
    optimizer = make()
    np.testing.assert_array_equal(optimizer.ask().points[0], WORDS)
    play(optimizer, 1)
    proposal = optimizer.ask()
    assert proposal.same_batch
    assert not (proposal.points == WORDS).all(axis=1).any()
    assert proposal.points.shape == (5, 3)


def rounds_told(budget: int, n_rounds: int) -> list[int]:
    """Return after which of so many rounds the optimizer says what was fitted."""
    optimizer, told = make(budget=budget), []
    for number in range(1, n_rounds + 1):
        play(optimizer, 1)
        if optimizer.fitted() is not None:
            told.append(number)
    return told


def test_what_was_fitted_is_told_after_rounds_that_double_and_the_last() -> None:
    assert rounds_told(10**6, 17) == [1, 2, 4, 8, 16]
    assert rounds_told(5 * 11, 11) == [1, 2, 4, 8, 11]
    # What is left of a budget buys no round.
    assert rounds_told(5 * 11 + 4, 11) == [1, 2, 4, 8, 11]
    assert rounds_told(5 * 8, 8) == [1, 2, 4, 8]


def test_a_fit_that_takes_long_waits_for_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten prompts of the second round are a span of ten, and after the third its rank is full.
    for most, told in ((10**2 * N * C, [1, 2, 7]), (10**2 * N * C - 1, [1, 7]), (1, [7])):
        monkeypatch.setattr(ogn, "_LONG_FIT", most)
        assert rounds_told(5 * 7, 7) == told


def test_the_rank_gives_way_to_memory() -> None:
    # 4 bytes of every logit, and rows: twice the rank, and a round's.
    config = OgnConfig(n_prompts=10, rank=160, memory_mb=1)
    assert config.rank_of(1000) == (250 - 10) // 2
    assert config.rank_of(757) == 160
    assert config.rank_of(758) == 159
    assert config.rank_of(1) == config.rank_of(0) == 160
    assert config.rank_of(25_000) == config.rank_of(10**12) == 1
    assert OgnConfig(rank=7, memory_mb=1e6).rank_of(1000) == 7
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"memory_mb is .*, expected more than 0"):
            OgnConfig(memory_mb=wrong)


def test_logits_stay_within_their_memory() -> None:
    optimizer = make(memory_mb=SCARCE)
    for _ in range(8):
        play(optimizer, 1)
        assert len(optimizer.state()[0]["rows"]) <= 2 * 3
    # The same as with that rank.
    named = make(rank=3)
    play(named, 8)
    assert optimizer.mixture().weights.tobytes() == named.mixture().weights.tobytes()


def test_losses_alone_are_refused() -> None:
    optimizer = make()
    with pytest.raises(ConfigError, match="needs the logits of every image, got losses"):
        optimizer.tell(Evaluation(np.ones(5), np.ones(5), LABELS, 1))
    assert optimizer.fitted() is None


def test_it_ends_after_the_most_prompts() -> None:
    optimizer = make(most_prompts=12)
    for n_rounds in range(3):
        assert optimizer.finished() is None, n_rounds
        play(optimizer, 1)
    assert optimizer.finished() == "prompts"
    endless = make(most_prompts=None)
    play(endless, 5)
    assert endless.finished() is None


def losses_at_marks(optimizer: PromptMixture) -> list[float]:
    return [float(loss) for loss in optimizer.state()[0]["held_out_losses"]]


@pytest.mark.parametrize("n_prompts", [5, 10, 60])
def test_it_ends_when_the_held_out_loss_stalls(n_prompts: int) -> None:
    optimizer = make(n_prompts=n_prompts, least_gain=0.02, most_prompts=None)
    while optimizer.finished() is None:
        play(optimizer, 1)
    assert optimizer.finished() == STALLED
    assert optimizer.fitted() is not None
    losses = losses_at_marks(optimizer)
    assert len(losses) == len(optimizer.mixture().points) // max(50, n_prompts)
    gains = [min(losses[: n - 2]) - min(losses[n - 2 : n]) for n in range(3, len(losses) + 1)]
    assert gains[-1] < 0.02 <= min([*gains[:-1], 1.0])
    # An endless run has the same losses, and goes on.
    endless = make(n_prompts=n_prompts, least_gain=None)
    play(endless, 2 + len(optimizer.mixture().points) // n_prompts)
    assert (endless.finished(), losses_at_marks(endless)) == (None, [])


def test_a_stalled_run_stays_ended_when_it_is_restored() -> None:
    optimizer = make(least_gain=100.0)
    play(optimizer, 29)
    assert optimizer.finished() is None
    resumed = make(9, least_gain=100.0)
    resumed.restore(stored(optimizer.state()))
    assert play(resumed, 1) == play(optimizer, 1)
    assert resumed.finished() == optimizer.finished() == STALLED
    again = make(9, least_gain=100.0)
    again.restore(stored(resumed.state()))
    assert again.finished() == STALLED


def test_nothing_stalls_where_nothing_can_be_held_out() -> None:
    optimizer = make(least_gain=100.0, most_prompts=170)
    while optimizer.finished() is None:
        logits = answered(optimizer.ask().points)[:, :C]  # an image of each class
        labels: I64 = np.arange(C)
        losses = cross_entropy(logits, labels).mean(axis=-1)
        optimizer.tell(Evaluation(losses, losses, labels, 1, logits))
    assert optimizer.finished() == PROMPTS
    assert losses_at_marks(optimizer) == []


def test_logits_that_tell_no_class_from_another_leave_the_start() -> None:
    optimizer = make()
    for value in (3.0, -2.0):
        optimizer.tell(evaluation(np.full((5, N, C), value, np.float32)))
    np.testing.assert_allclose(optimizer.mixture().weights, [0.55, *[0.05] * 9])
    assert optimizer.fitted() == pytest.approx((np.log(C), 1 / C))


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    first = play(make(), 9)
    assert play(make(), 9) == first
    assert play(make(2), 9) != first


def test_asking_again_and_looking_change_nothing() -> None:
    plain, curious = make(), make()
    for _ in range(9):
        for _ in range(2):
            curious.ask().points[:] = np.nan
            curious.recommend()[:] = np.nan
            seen = curious.mixture()
            seen.points[:] = np.nan
            seen.weights[:] = np.nan
            curious.fitted()
            curious.state()
        assert play(plain, 1) == play(curious, 1)


def test_what_is_told_and_restored_is_no_alias() -> None:
    plain, touched = make(), make()
    for _ in range(4):
        answer = evaluation(answered(touched.ask().points))
        touched.tell(answer)
        assert answer.logits is not None
        answer.logits[:] = np.nan
        answer.labels[:] = 99
        play(plain, 1)
    state = {name: array.copy() for name, array in touched.state()[0].items()}
    successor = make(7)
    successor.restore((state, touched.state()[1]))
    for array in state.values():
        array[...] = 0
    assert play(successor, 2) == play(touched, 2) == play(plain, 2)


def test_a_state_stays_what_it_was() -> None:
    optimizer = make()
    play(optimizer, 6)
    arrays, values = optimizer.state()
    before, text = {name: a.tobytes() for name, a in arrays.items()}, json.dumps(dict(values))
    play(optimizer, 3)
    assert {name: a.tobytes() for name, a in arrays.items()} == before
    assert json.dumps(dict(values)) == text


@pytest.mark.parametrize("settings", [{}, {"memory_mb": SCARCE}], ids=["rank", "memory"])
def test_a_run_goes_on_with_the_same_bytes_after_any_round(settings: dict[str, Any]) -> None:
    n = 10  # the span is cut after the fifth and the eighth
    expected = play(make(**settings), n)
    first = make(**settings)
    for done in range(n):
        second = make(99, **settings)
        second.restore(stored(first.state()))
        ours, theirs = first.mixture(), second.mixture()
        assert ours.weights.tobytes() == theirs.weights.tobytes()
        assert ours.points.tobytes() == theirs.points.tobytes()
        assert second.fitted() == first.fitted()
        assert second.ask().same_batch == first.ask().same_batch
        assert play(second, n - done) == expected[done:]
        play(first, 1)

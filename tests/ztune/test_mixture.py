"""A mixture of prompts: what it keeps of the logits, and weights whose optimum is known."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ztune.errors import ConfigError
from ztune.objective import cross_entropy
from ztune.optim import mixture
from ztune.optim.convex import SoftmaxProblem
from ztune.optim.mixture import LogitSpan, MixtureConfig, PromptMixture, cross_validated
from ztune.types import F32, F64, I64, Evaluation, State

N, C = 60, 4
LABELS: I64 = np.arange(N) % C
N_HIDDEN, N_WORDS = 8, 300
VOCABULARY: I64 = np.delete(np.arange(N_WORDS), [5, 77, 299])
WORDS: I64 = np.array([7, 7, 9])


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def centred(logits: NDArray[np.floating]) -> F64:
    wide = logits.astype(np.float64)
    return np.asarray(wide - wide.mean(axis=-1, keepdims=True))


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


def make(seed: int = 1, words: I64 | None = WORDS, **settings: Any) -> PromptMixture:
    config = MixtureConfig(**{"n_prompts": 5, "rank": 12} | settings)
    return PromptMixture(config, words, 3, VOCABULARY, rng(seed))


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


@pytest.mark.parametrize("parts", [[30], [1] * 30, [4, 9, 2, 15]])
def test_logits_that_come_in_parts_span_what_they_span_at_once(parts: list[int]) -> None:
    # Thirty prompts in six dimensions, and an offset for all classes of a picture.
    wide = np.tensordot(rng(0).standard_normal((30, 6)), rng(1).standard_normal((6, N, C)), 1)
    Z: F32 = (wide + rng(2).standard_normal((30, N, 1))).astype(np.float32)
    span, first = LogitSpan.empty(7), 0
    for n in parts:
        span.add(Z[first : first + n])
        first += n
        assert len(span.rows) <= 2 * 7
        assert span.mixing.shape == (first, len(span.rows))
    exact = centred(Z)
    np.testing.assert_allclose(span.total, exact.sum(axis=0), atol=1e-3)
    assert span.mean_square == pytest.approx((exact**2).mean(), rel=1e-5)
    for rows, mixing in ((span.rows, span.mixing), span.reduced()):
        R = mixing.shape[1]
        np.testing.assert_allclose(mixing.T @ mixing, np.eye(R), atol=1e-5)
        np.testing.assert_allclose(rows, np.tensordot(mixing.T, exact, 1), atol=1e-3)
    # Every prompt is a combination of the basis, and there is nothing else in it.
    basis, mixing = span.reduced()
    assert len(basis) == 6
    back = np.tensordot(mixing, basis, 1)
    np.testing.assert_allclose(back, exact, atol=2e-3)


def test_a_span_keeps_what_has_the_most_energy() -> None:
    strengths = np.array([100.0, 50, 20, 10, 5, 1])
    patterns = np.linalg.qr(rng(0).standard_normal((N * C, 6)))[0].T.reshape(6, N, C)
    patterns -= patterns.mean(axis=-1, keepdims=True)
    amounts = rng(1).standard_normal((80, 6)) * strengths
    Z = np.tensordot(amounts, patterns, 1).astype(np.float32)
    span = LogitSpan.empty(3)
    for first in range(0, 80, 4):
        span.add(Z[first : first + 4])
        assert len(span.rows) <= 6
    basis, mixing = span.reduced()
    assert len(basis) == 3
    np.testing.assert_allclose(basis, np.tensordot(mixing.T, Z, 1), atol=1e-2)
    share = (basis.astype(np.float64) ** 2).sum() / (Z.astype(np.float64) ** 2).sum()
    best = np.linalg.svd(Z.reshape(80, -1), compute_uv=False) ** 2
    assert share > 0.95 * best[:3].sum() / best.sum() > 0.9


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
    config = MixtureConfig(n_prompts=4000)
    drawn = PromptMixture(config, None, 5, vocabulary, rng(0)).ask().points
    assert drawn.shape == (4000, 5)
    ids = drawn.astype(np.int64)
    np.testing.assert_array_equal(ids, drawn)
    assert set(np.unique(ids)) <= set(vocabulary)
    ranks = np.searchsorted(vocabulary, ids.ravel())
    # Single characters, one in a hundred of the vocabulary, are left out.
    assert ranks.min() == 19
    assert ranks.max() == len(vocabulary) - 1
    # As many of the next 180 as of all the rest.
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


def problem(labels: I64, seed: int = 0) -> SoftmaxProblem:
    """Return logits in which ten directions are noise and ten tell the classes apart a little."""
    generator = rng(seed)
    n = len(labels)
    directions = generator.standard_normal((20, n, C))
    directions[:10] += 2 * np.eye(C)[np.arange(n) % C]
    return SoftmaxProblem(
        np.zeros((n, C), np.float32), directions.astype(np.float32), np.asarray(labels)
    )


def fixed(given: SoftmaxProblem) -> F64:
    """Return the solutions f64[ridges, r] with each ridge alone, the heaviest first."""
    configs = [MixtureConfig(ridge=float(share)) for share in mixture._RIDGES]
    return np.stack([cross_validated(given, 1.0, config) for config in configs])


def chosen_ridge(given: SoftmaxProblem) -> float:
    """Return the ridge of the least loss on pictures left out."""
    found = cross_validated(given, 1.0, MixtureConfig(tolerance=0.0))
    gaps = np.linalg.norm(fixed(given) - found, axis=1) / np.linalg.norm(found)
    assert gaps.min() < 0.01
    return float(mixture._RIDGES[gaps.argmin()])


@pytest.mark.parametrize("seed", range(4))
def test_noise_gets_a_heavy_ridge_and_what_generalises_a_light_one(seed: int) -> None:
    clean, new_clean = halves(problem(np.arange(160) % C, seed))
    noise, new_noise = halves(problem(rng(seed).integers(0, C, 160), seed))
    assert chosen_ridge(clean) <= 0.01
    assert chosen_ridge(noise) >= 1
    none = np.zeros((20, 20))
    # With the tolerance of the house, pictures that are new lose less than by either end.
    lost = new_noise.loss(cross_validated(noise, 1.0, MixtureConfig()), none)
    assert lost < new_noise.loss(fixed(noise)[-1], none) - 0.05
    lost = new_clean.loss(cross_validated(clean, 1.0, MixtureConfig()), none)
    assert lost < new_clean.loss(fixed(clean)[0], none) - 0.1


def halves(given: SoftmaxProblem) -> tuple[SoftmaxProblem, SoftmaxProblem]:
    first = np.arange(len(given.labels)) < len(given.labels) // 2
    return given.rows(first), given.rows(~first)


def test_a_tolerance_takes_the_mean_of_the_best_and_all_lighter_ones_within_it() -> None:
    # A third of the labels are wrong: neither the heaviest ridge is best nor the lightest.
    wrong = rng(1).random(160) < 0.3
    labels = np.where(wrong, rng(10).integers(0, C, 160), np.arange(160) % C)
    given, _ = halves(problem(labels, 1))
    best = int(np.searchsorted(-mixture._RIDGES, -chosen_ridge(given)))
    assert 0 < best < len(mixture._RIDGES) - 1
    found = cross_validated(given, 1.0, MixtureConfig(tolerance=1e9))
    np.testing.assert_allclose(found, fixed(given)[best:].mean(axis=0), atol=2e-3)
    lengths = [
        np.linalg.norm(cross_validated(given, 1.0, MixtureConfig(tolerance=tolerance)))
        for tolerance in (0.0, 1.0, 3.0, 1e9)
    ]
    assert lengths == sorted(lengths)
    assert lengths[3] > 1.5 * lengths[0]


def test_left_out_losses_are_estimated_close_to_those_of_refits() -> None:
    given = problem(np.arange(80) % C)
    folds = mixture.fold_of_each(given.labels)
    assert folds is not None
    parts = [given.rows(folds == k) for k in range(4)]
    for share in (1.0, 0.1):
        ridge = share * np.eye(20)
        a = given.minimise(ridge, np.zeros(20), 30)
        terms = [part.terms(a) for part in parts]
        estimated = mixture._held_out_losses(parts, terms, folds, a, ridge)
        exact = np.empty(80)
        for k in range(4):
            refit = given.rows(folds != k).minimise(ridge, np.zeros(20), 30)
            exact[folds == k] = cross_entropy(parts[k].logits(refit), parts[k].labels)
        own = cross_entropy(given.logits(a), given.labels)
        # Far closer than the losses of pictures that were fitted.
        assert exact.mean() > own.mean()
        assert abs(estimated - exact).mean() < 0.2 * abs(own - exact).mean()


def test_folds_are_even_over_the_classes() -> None:
    labels = rng(0).permutation(np.repeat(np.arange(5), [8, 8, 9, 3, 1]))
    folds = mixture.fold_of_each(labels)
    assert folds is not None
    assert set(folds) == {0, 1, 2, 3}
    for label in range(5):
        counts = np.bincount(folds[labels == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    two = mixture.fold_of_each(np.array([3, 1, 0, 2, 0, 1, 2, 3]))
    assert two is not None
    assert set(two) == {0, 1}
    assert mixture.fold_of_each(np.arange(6)) is None
    assert mixture.fold_of_each(np.array([0, 0, 0, 0, 1, 2, 3])) is None


def test_one_picture_of_a_class_leaves_nothing_to_validate_on() -> None:
    rows = np.arange(C)
    given = problem(np.arange(80) % C).rows(rows)
    found = cross_validated(given, 1.0, MixtureConfig())
    fixed = cross_validated(given, 1.0, MixtureConfig(ridge=0.1))
    np.testing.assert_array_equal(found, fixed)
    assert np.linalg.norm(found) > 0
    # Ridges are in units of what the logits are in.
    other = cross_validated(given, 0.5, MixtureConfig(ridge=0.2))
    np.testing.assert_array_equal(other, fixed)


def test_what_was_fitted_is_told_after_rounds_that_double() -> None:
    optimizer, told = make(), []
    for n_rounds in range(1, 18):
        play(optimizer, 1)
        if optimizer.fitted() is not None:
            told.append(n_rounds)
    assert told == [1, 2, 4, 8, 16]


def test_losses_alone_are_refused() -> None:
    optimizer = make()
    with pytest.raises(ConfigError, match="needs the logits of every picture, and got losses"):
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


def test_a_run_goes_on_with_the_same_bytes_after_any_round() -> None:
    n = 10  # the span is cut after the fifth and the eighth
    expected = play(make(), n)
    first = make()
    for done in range(n):
        second = make(99)
        second.restore(stored(first.state()))
        ours, theirs = first.mixture(), second.mixture()
        assert ours.weights.tobytes() == theirs.weights.tobytes()
        assert ours.points.tobytes() == theirs.points.tobytes()
        assert second.fitted() == first.fitted()
        assert second.ask().same_batch == first.ask().same_batch
        assert play(second, n - done) == expected[done:]
        play(first, 1)

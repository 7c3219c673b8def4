import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztune.budget import Budget
from ztune.errors import BudgetError, NotFiniteError, ZtuneError
from ztune.objective import BatchSampler, FewShotObjective, NumpyScores, cross_entropy, focal_loss
from ztune.types import F32, I64, Batch, Prompts, Scores


class Linear:
    """A prompt encoder for tests: every class has a fixed mix of the context's values."""

    def __init__(self, n_classes: int = 3, e: int = 4, size: int = 10):
        self.mix = np.random.default_rng(0).standard_normal((size, n_classes, e))

    def encode(self, contexts: F32) -> F32:
        out = np.einsum("pk,kce->pce", contexts.reshape(len(contexts), -1), self.mix)
        return (out / np.linalg.norm(out, axis=-1, keepdims=True)).astype(np.float32)


def setup(n: int = 12) -> tuple[FewShotObjective, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((2, n, 4))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)
    labels = np.arange(n, dtype=np.int64) % 3
    scores = NumpyScores(Linear(), features, 20.0, -3.0)
    return FewShotObjective(scores, labels), features, labels


def test_losses_are_mean_softmax_cross_entropy_in_float64() -> None:
    objective, features, labels = setup()
    contexts = np.random.default_rng(2).standard_normal((5, 2, 5)).astype(np.float32)
    batch = Batch(np.array([0, 3, 7]), np.array([0, 1, 1]), 1)
    got = objective(Prompts(contexts), batch)
    texts = Linear().encode(contexts)
    for p in range(5):
        total = 0.0
        for i, v in zip(batch.images, batch.views, strict=True):
            logits = 20.0 * texts[p].astype(float) @ features[v, i].astype(float) - 3.0
            total -= np.log(np.exp(logits[labels[i]]) / np.exp(logits).sum())
        assert got.losses[p] == pytest.approx(total / 3, abs=1e-5)
    assert got.losses.dtype == np.float64
    assert got.logits is not None
    assert got.logits.shape == (5, 3, 3)
    np.testing.assert_array_equal(got.labels, labels[batch.images])


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32)
    np.testing.assert_allclose(cross_entropy(logits, np.array([0, 1])), [0.0, 2e4])


def test_a_loss_that_is_not_finite_names_the_candidate() -> None:
    objective, _, _ = setup()
    contexts = np.ones((4, 2, 5), dtype=np.float32)
    contexts[2] = np.nan
    with pytest.raises(ZtuneError, match=r"batch 1, candidate 3 of 4: the loss is nan"):
        objective(Prompts(contexts), Batch(np.arange(3), np.zeros(3, np.int64), 1))


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_batches_reshuffle_each_epoch_and_drop_the_remainder(
    n: int, size: int, n_views: int, stop: int
) -> None:
    sampler = BatchSampler(n, size, n_views, np.random.default_rng(0))
    copy = BatchSampler(n, size, n_views, np.random.default_rng(9))
    per_epoch = max(1, n // size)
    seen: list[int] = []
    for step in range(2 * per_epoch):
        if step == stop:
            copy.restore(sampler.state())
        batch = sampler.next()
        if step >= stop:
            again = copy.next()
            np.testing.assert_array_equal(again.images, batch.images)
            np.testing.assert_array_equal(again.views, batch.views)
        assert len(batch.images) == min(n, size)
        assert batch.number == step + 1
        assert batch.views.max() < n_views
        seen = seen if step % per_epoch else []
        seen += batch.images.tolist()
        assert len(set(seen)) == len(seen)
        assert sampler.current() is batch


@given(st.integers(0, 100), st.lists(st.integers(1, 30), max_size=20))
def test_the_budget_is_never_exceeded(limit: int, steps: list[int]) -> None:
    budget = Budget(limit)
    for n in steps:
        if budget.fits(n):
            budget.reserve(n)
            budget.commit(7)
        else:
            with pytest.raises(BudgetError, match="does not fit"):
                budget.reserve(n)
        assert budget.queries <= limit
        assert budget.text_forwards == 7 * budget.queries


def test_the_focal_loss_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((2, 5, 4))).astype(np.float32)
    labels = np.array([0, 3, 1, 1, 2])
    for gamma in (0.5, 2.0, 5.0):
        found = focal_loss(gamma)(logits, labels)
        assert found.shape == (2, 5)
        for p in range(2):
            for i, label in enumerate(labels):
                powers = [math.exp(value) for value in logits[p, i].tolist()]
                share = powers[label] / sum(powers)
                assert found[p, i] == pytest.approx(-((1 - share) ** gamma) * math.log(share))


def test_a_focal_loss_without_focus_is_cross_entropy() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    labels = np.arange(5) % 4
    np.testing.assert_array_equal(
        focal_loss(0.0)(logits, labels), cross_entropy(logits, labels), strict=True
    )


def test_the_focal_loss_of_certain_answers_is_finite() -> None:
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32)
    np.testing.assert_allclose(focal_loss(2.0)(logits, np.array([0, 1])), [0.0, 2e4])


def test_scores_take_the_loss_that_they_are_given() -> None:
    _, features, labels = setup()
    batch = Batch(np.arange(12), np.zeros(12, np.int64), 1)
    prompts = Prompts(np.random.default_rng(2).standard_normal((3, 2, 5)).astype(np.float32))
    scores = NumpyScores(Linear(), features, 20.0, -3.0, focal_loss(2.0))(prompts, batch, labels)
    assert scores.logits is not None
    expected = focal_loss(2.0)(scores.logits, labels).mean(axis=-1)
    np.testing.assert_allclose(scores.losses, expected)
    plain = cross_entropy(scores.logits, labels).mean(axis=-1)
    assert (scores.losses < plain).all()


def test_many_logits_are_scored_some_candidates_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _, _ = setup()
    contexts = np.random.default_rng(2).standard_normal((5, 2, 5)).astype(np.float32)
    batch = Batch(np.array([0, 3, 7]), np.array([0, 1, 1]), 1)
    whole = objective(Prompts(contexts), batch)
    monkeypatch.setattr("ztune.objective.LOGITS_AT_ONCE", 2 * 3 * 3)  # two candidates
    parts = objective(Prompts(contexts), batch)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-6)
    np.testing.assert_array_equal(parts.accuracies, whole.accuracies)
    assert parts.logits is None


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_logits_that_are_not_finite_name_the_candidate(value: float) -> None:
    labels = np.array([0, 1, 0])

    def scores(prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        logits = np.zeros((4, 3, 3), np.float32)
        logits[2, 1, 2] = value  # of another class: a loss of −∞ stays finite
        return Scores(np.ones(4), np.ones(4), logits)

    batch = Batch(np.arange(3), np.zeros(3, np.int64), 5)
    with pytest.raises(NotFiniteError, match=r"candidate 3 of 4: .* run ztune doctor") as caught:
        FewShotObjective(scores, labels)(Prompts(np.zeros((4, 2, 5), np.float32)), batch)
    assert caught.value.candidate == 2

"""The signal of loss differences, against direct computations."""

import numpy as np
import pytest

from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.precision import (
    Signal,
    compare_losses,
    exact_losses,
    measure,
    precision_suffices,
    probe_batch,
)
from ztune.types import F32, F64, Batch, Evaluation, Prompts


def test_ratio_and_rms_are_those_of_the_pairs_differences() -> None:
    reference = np.array([1.0, 0.6, 2.0, 2.3])  # differences 0.4 and −0.3
    computed = np.array([1.1, 0.6, 2.0, 2.4])  # off by 0.1 and −0.1
    signal = compare_losses(computed, reference)
    assert signal.n_directions == 2
    assert signal.signal == pytest.approx(np.sqrt((0.16 + 0.09) / 2))
    assert signal.error == pytest.approx(0.1)
    assert signal.ratio == pytest.approx(np.sqrt(0.125) / 0.1)
    assert not signal.passed
    # What both signs have in common moves no step.
    assert compare_losses(reference + 0.7, reference).ratio > 1e12


def test_without_any_difference_the_ratio_is_nought_or_finite() -> None:
    same = np.full(4, 2.0)
    assert compare_losses(same, same).ratio == 0
    assert compare_losses(same, same).perturbation_needed(0.01) is None
    reference = np.array([2.0, 2.1])
    assert np.isfinite(compare_losses(reference, reference).ratio)


@pytest.mark.parametrize(
    ("ratio", "perturbation", "expected"),
    [(1.0, 0.001, 0.02), (5.0, 0.01, 0.03), (5.0, 1e-4, 4e-4), (0.1, 0.01, None), (9.0, 0.1, None)],
)
def test_the_advice_doubles_the_limit_where_losses_are_linear(
    ratio: float, perturbation: float, expected: float | None
) -> None:
    assert Signal(8, ratio, 1.0, 10.0).perturbation_needed(perturbation) == expected


def test_losses_are_those_of_a_softmax_in_double_precision() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((6, 5)).astype(np.float32)
    texts, labels = rng.standard_normal((3, 4, 5)), np.array([0, 1, 2, 3, 0, 1])
    got = exact_losses(features, labels, texts, 2.5, -0.5)
    for candidate in range(3):
        total = 0.0
        for image in range(6):
            logits = [2.5 * float(features[image] @ text) - 0.5 for text in texts[candidate]]
            total += np.log(np.sum(np.exp(logits))) - logits[labels[image]]
        assert got[candidate] == pytest.approx(total / 6, rel=1e-12)


def test_probes_are_the_first_steps_own_and_leave_the_optimizer_alone() -> None:
    config = SpsaConfig(perturbation=0.03, n_pairs=3)
    start = np.random.default_rng(0).standard_normal(200)
    optimizer, untouched = (Spsa(config, start, np.random.default_rng(1)) for _ in range(2))
    before = optimizer.ask().points
    rounds = optimizer.probes(8, np.random.default_rng(2))
    assert rounds.shape == (3, 6, 200)  # whole rounds: nine directions for eight
    moves = rounds - start
    np.testing.assert_allclose(moves[:, 0::2], -moves[:, 1::2], atol=1e-12)
    sizes = np.abs(moves) / 0.03
    assert 0.5 <= sizes.min() < 0.51
    assert 0.99 < sizes.max() <= 1.0 + 1e-9
    np.testing.assert_array_equal(optimizer.ask().points, before)
    state, expected = optimizer.state(), untouched.state()
    assert state[1] == expected[1]
    for name, array in expected[0].items():
        np.testing.assert_array_equal(state[0][name], array)


def test_a_measurement_sees_the_tuning_oracle_and_the_reference() -> None:
    sizes = []

    class Map:
        dim = 40

        def __call__(self, points: F64) -> Prompts:
            return Prompts(points.astype(np.float32)[:, None, :])

    def exact(contexts: F32) -> F64:
        return np.asarray(contexts.astype(np.float64).sum(axis=(1, 2)))

    def oracle(prompts: Prompts, batch: Batch) -> Evaluation:
        contexts = prompts.contexts
        assert contexts is not None
        sizes.append(len(contexts))
        noise = np.tile([1e-3, -1e-3], len(contexts) // 2)
        return Evaluation(exact(contexts) + noise, np.zeros(len(contexts)), np.zeros(0, int), 0)

    optimizer = Spsa(SpsaConfig(), np.zeros(40), np.random.default_rng(1))
    batch = probe_batch(3, 128, np.random.default_rng(0))
    signal = measure(optimizer, Map(), oracle, exact, batch, np.random.default_rng(2))
    assert sizes == [10, 10]  # in rounds of the method's own size
    assert signal.n_directions == 10
    assert signal.error == pytest.approx(2e-3, rel=1e-6)
    moves = optimizer.probes(8, np.random.default_rng(2))[:, 0::2].sum(axis=-1).ravel()
    assert signal.signal == pytest.approx(np.sqrt(np.mean((2 * moves) ** 2)), rel=1e-6)


def test_the_batch_is_every_image_or_a_random_part() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(probe_batch(5, 128, rng).images, range(5))
    part = probe_batch(1000, 128, rng)
    assert len(set(part.images.tolist())) == 128
    assert part.images.max() > 700  # images stand class by class: not the first of them
    assert not part.views.any()


def test_exact_losses_know_of_an_answer_what_it_tells() -> None:
    rng = np.random.default_rng(5)
    features = rng.standard_normal((6, 4)).astype(np.float32)
    texts, labels = rng.standard_normal((2, 3, 4)), np.arange(6) % 3
    whole, all_three, label = (
        exact_losses(features, labels, texts, 2.0, 0.0, k) for k in (None, 3, 1)
    )
    np.testing.assert_allclose(all_three, whole, rtol=1e-12)
    for p, text in enumerate(texts):
        logits = 2 * features.astype(np.float64) @ text.T
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        best = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
        expected = -np.log(np.where(right, best, (1 - best) / 2)).mean()
        assert label[p] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("precision", "provider", "perturbation", "enough"),
    [
        ("fp32", "cpu", 0.01, True),
        ("fp32", "cuda", 0.001, True),
        ("fp32", "cpu", 0.0009, False),
        ("fp32", "tensorrt", 0.01, False),
        ("int8", "cpu", 0.01, False),
        ("fp16", "cuda", 0.01, False),
    ],
)
def test_what_need_not_be_measured(
    precision: str, provider: str, perturbation: float, enough: bool
) -> None:
    assert precision_suffices(precision, provider, perturbation, 0.01) == enough

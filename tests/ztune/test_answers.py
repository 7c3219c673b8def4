"""Logits known for the top classes only, cached text features and their weighted sum."""

import numpy as np
import pytest

from ztune import text_cache
from ztune.errors import DataError
from ztune.mixing import mix_text_features
from ztune.objective import NumpyScores, cross_entropy
from ztune.text_cache import CachedTextEncoder
from ztune.top_classes import TopClasses, top_k_logits
from ztune.types import F32, F64, I64, Batch, Prompts, Scores


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


LOGITS: F32 = (2 * rng(0).standard_normal((3, 7, 6))).astype(np.float32)


def probabilities(logits: F32) -> F64:
    e = np.exp(logits.astype(np.float64))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_the_top_classes_keep_their_probabilities_and_the_rest_is_shared(k: int) -> None:
    p = probabilities(LOGITS)
    found = top_k_logits(LOGITS, k)
    assert found.dtype == np.float32
    known = np.exp(found.astype(np.float64))
    np.testing.assert_allclose(known.sum(axis=-1), 1, atol=1e-5)
    order = np.argsort(-p, axis=-1)
    top, others = order[..., :k], order[..., k:]
    np.testing.assert_allclose(
        np.take_along_axis(known, top, -1), np.take_along_axis(p, top, -1), rtol=1e-4
    )
    rest = np.take_along_axis(known, others, -1)
    np.testing.assert_allclose(rest, rest[..., :1] * np.ones(6 - k), rtol=1e-6)
    assert (found.argmax(axis=-1) == LOGITS.argmax(axis=-1)).all()


@pytest.mark.parametrize("k", [6, 7, 100])
def test_all_classes_tell_all_but_a_constant(k: int) -> None:
    for scale in (1, 100):  # with CLIP's scale most probabilities are negligible
        moved = scale * LOGITS - top_k_logits(scale * LOGITS, k)
        np.testing.assert_allclose(moved, moved[..., :1] * np.ones(6), atol=1e-4 * scale)


def test_a_label_without_doubt_leaves_finite_logits() -> None:
    logits = np.array([[500.0, 0, -500], [0, 1, 500]], np.float32)
    for k in (1, 2, 3):
        found = top_k_logits(logits, k)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found.argmax(axis=-1), [0, 2])
    np.testing.assert_allclose(top_k_logits(logits, 1)[0], np.log([1, 1e-6, 1e-6]), atol=1e-5)


def test_equal_classes_are_told_in_their_order() -> None:
    np.testing.assert_allclose(top_k_logits(np.zeros((1, 4), np.float32), 1), np.log(0.25))
    found = np.exp(top_k_logits(np.array([[2.0, 2.0, 0, 0]], np.float32), 1))[0]
    assert found[0] == pytest.approx(0.4404, abs=1e-4)
    np.testing.assert_allclose(found[1:], (1 - 0.4404) / 3, atol=1e-4)


def test_scores_are_those_of_what_is_told() -> None:
    texts = rng(1).standard_normal((1, 4, 5)).astype(np.float32)
    features = rng(2).standard_normal((1, 8, 5)).astype(np.float32)
    labels: I64 = np.arange(8) % 4
    batch = Batch(np.arange(8), np.zeros(8, np.int64), 1)
    scorer = NumpyScores(texts[0], features, 2.0)
    whole = scorer(Prompts(visual=np.zeros((1, 1), np.float32)), batch, labels)
    assert whole.logits is not None
    for k in (1, 2):
        told = TopClasses(scorer, k)(Prompts(visual=np.zeros((1, 1), np.float32)), batch, labels)
        expected = top_k_logits(whole.logits, k)
        np.testing.assert_array_equal(told.logits, expected)
        np.testing.assert_allclose(told.losses, cross_entropy(expected, labels).mean(axis=-1))
        assert (told.losses != whole.losses).all()
        np.testing.assert_array_equal(told.accuracies, whole.accuracies)


def test_scores_without_logits_are_left_alone() -> None:
    alone = Scores(np.ones(2), np.zeros(2))
    batch = Batch(np.zeros(1, np.int64), np.zeros(1, np.int64), 1)
    found = TopClasses(lambda *_: alone, 1)(Prompts(), batch, np.zeros(1, np.int64))
    assert found is alone


class Encoder:
    """Counts its calls; a text's features are some function of its context."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, contexts: F32) -> F32:
        self.calls.append(len(contexts))
        classes = rng(3).standard_normal((contexts.shape[2], 4)).astype(np.float32)
        mean = contexts.mean(axis=1) @ classes
        return np.stack([mean, mean**2, np.sin(mean)], axis=1)


def contexts(n: int, seed: int = 4) -> F32:
    return rng(seed).standard_normal((n, 2, 5)).astype(np.float32)


def test_what_was_encoded_is_not_encoded_again() -> None:
    encoder = Encoder()
    remembering = CachedTextEncoder(encoder)
    first, other = contexts(3), contexts(3, seed=5)
    expected = encoder.encode(first)
    encoder.calls.clear()
    for _ in range(3):
        found = remembering.encode(first.copy())
        np.testing.assert_array_equal(found, expected)
        found[:] = np.nan  # the caller may change its copy
    assert encoder.calls == [3]
    np.testing.assert_array_equal(remembering.encode(other), encoder.encode(other))
    assert encoder.calls == [3, 3, 3]
    # Parts of a call are calls of their own: they may give other bytes.
    remembering.encode(first[:2])
    assert encoder.calls == [3, 3, 3, 2]


def test_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 3 * 4 * 4  # bytes of a context's features
    monkeypatch.setattr(text_cache, "_MOST_BYTES", 5 * one)
    encoder = Encoder()
    remembering = CachedTextEncoder(encoder)
    for seed in (1, 2, 3):  # 2 and 2 contexts fit, 2 more do not
        remembering.encode(contexts(2, seed))
    remembering.encode(contexts(1, 4))
    assert remembering._bytes == 5 * one
    encoder.calls.clear()
    for seed in (1, 2):
        remembering.encode(contexts(2, seed))
    remembering.encode(contexts(1, 4))
    assert encoder.calls == []
    for _ in range(2):
        expected = Encoder().encode(contexts(2, 3))
        np.testing.assert_array_equal(remembering.encode(contexts(2, 3)), expected)
    assert encoder.calls == [2, 2]


@pytest.mark.parametrize("at_once", [1, 3, 10, 11, 50])
def test_a_mixtures_texts_are_the_weighted_sum(at_once: int) -> None:
    encoder, given = Encoder(), contexts(11)
    weights = (100 * rng(6).standard_normal(11)).astype(np.float32)
    found = mix_text_features(encoder, given, weights, at_once)
    assert found.dtype == np.float32
    assert max(encoder.calls) <= at_once
    assert sum(encoder.calls) == 11
    expected = np.zeros((3, 4))
    for weight, text in zip(weights, Encoder().encode(given), strict=True):
        expected += float(weight) * text.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


class Fixed:
    """Answers every context with the same texts."""

    def __init__(self, texts: F32):
        self.texts = texts

    def encode(self, contexts: F32) -> F32:
        return np.repeat(self.texts[None], len(contexts), axis=0)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_weights_that_cancel_leave_what_float32_would_lose(at_once: int) -> None:
    texts = np.array([[0.6, 0.8], [1, 0]], np.float32)
    # In pairs far apart, so that sums of any order are large on the way: in float32 steps of 16.
    weights = np.concatenate([np.full(499, 3e5), [0.25], np.full(500, -3e5), [3e5]])
    weights = weights.astype(np.float32)
    given = np.zeros((len(weights), 2, 3), np.float32)
    found = mix_text_features(Fixed(texts), given, weights, at_once)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.25 * texts, atol=1e-6)
    naive = np.zeros_like(texts)
    for weight in weights:
        naive += weight * texts
    assert np.abs(naive - 0.25 * texts).max() > 0.1


@pytest.mark.parametrize("weights", [[3e38, 3e38], [-3e38, -3e38], [3e38, 0], [1e31, 0]])
def test_a_sum_that_is_not_finite_is_refused(weights: list[float]) -> None:
    texts = np.array([[0.6, 0.8], [1, 0]], np.float32)
    with pytest.raises(DataError, match="not finite or far too large: its weights are damaged"):
        mix_text_features(
            Fixed(texts), np.zeros((2, 2, 3), np.float32), np.array(weights, np.float32), 2
        )
    # Large on the way, and none in the end.
    opposite = np.array([3e38, 3e38, -3e38, -3e38], np.float32)
    found = mix_text_features(Fixed(texts), np.zeros((4, 2, 3), np.float32), opposite, 1)
    np.testing.assert_array_equal(found, 0)


def test_calls_that_were_made_before_mix_for_nothing() -> None:
    encoder, given = Encoder(), contexts(12)
    remembering = CachedTextEncoder(encoder)
    for first in range(0, 12, 4):
        remembering.encode(given[first : first + 4])
    encoder.calls.clear()
    mix_text_features(remembering, given, np.ones(12, np.float32), 4)
    assert encoder.calls == []

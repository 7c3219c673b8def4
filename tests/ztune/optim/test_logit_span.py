"""What is kept of many prompts' logits: all that they span, or what has the most energy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ztune.errors import ZtuneError
from ztune.optim.logit_span import LogitSpan
from ztune.types import F32, F64

N, C = 60, 4


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def centred(logits: NDArray[np.floating]) -> F64:
    wide = logits.astype(np.float64)
    return np.asarray(wide - wide.mean(axis=-1, keepdims=True))


@pytest.mark.parametrize("parts", [[30], [1] * 30, [4, 9, 2, 15]])
def test_logits_that_come_in_parts_span_what_they_span_at_once(parts: list[int]) -> None:
    # Thirty prompts in six dimensions, and an offset for all classes of an image.
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
    for rows, mixing in ((span.rows, span.mixing), span.contrasts()):
        R = mixing.shape[1]
        np.testing.assert_allclose(mixing.T @ mixing, np.eye(R), atol=1e-5)
        np.testing.assert_allclose(rows, np.tensordot(mixing.T, exact, 1), atol=1e-3)
    # Every prompt is a combination of the rows.
    back = np.tensordot(span.mixing, span.rows, 1)
    np.testing.assert_allclose(back, exact, atol=2e-3)
    # Of six dimensions, five move weights that keep their sum.
    basis, mixing = span.contrasts()
    assert len(basis) == 5
    np.testing.assert_allclose(mixing.sum(axis=0), 0, atol=1e-12)


def test_a_span_keeps_what_has_the_most_energy() -> None:
    strengths = np.array([100.0, 50, 20, 10, 5, 1])
    patterns = np.linalg.qr(rng(0).standard_normal((N * C, 6)))[0].T.reshape(6, N, C)
    patterns -= patterns.mean(axis=-1, keepdims=True)
    amounts = rng(1).standard_normal((80, 6))
    # Of the strongest all prompts have as much, so that no contrast holds it.
    amounts -= amounts.mean(axis=0)
    amounts[:, 0] = 1
    amounts *= strengths
    Z = np.tensordot(amounts, patterns, 1).astype(np.float32)
    span = LogitSpan.empty(3)
    for first in range(0, 80, 4):
        span.add(Z[first : first + 4])
        assert len(span.rows) <= 6
    basis, mixing = span.contrasts()
    assert len(basis) == 2
    np.testing.assert_allclose(basis, np.tensordot(mixing.T, Z, 1), atol=1e-2)
    share = (basis.astype(np.float64) ** 2).sum() / (Z.astype(np.float64) ** 2).sum()
    best = np.linalg.svd(Z.reshape(80, -1), compute_uv=False) ** 2
    assert share > 0.95 * best[1:3].sum() / best.sum() > 0.15


def test_prompts_that_agree_leave_nothing_to_move() -> None:
    one = rng(0).standard_normal((1, N, C)).astype(np.float32)
    for n_prompts in (1, 5):
        span = LogitSpan.empty(7)
        span.add(np.repeat(one, n_prompts, axis=0))
        basis, mixing = span.contrasts()
        assert (basis.shape, mixing.shape) == ((0, N, C), (n_prompts, 0))


def test_products_that_are_not_finite_are_an_error_of_one_line() -> None:
    span = LogitSpan.empty(2)
    span.add(np.ones((3, 4, 2), np.float32))
    span.rows[0] = np.nan  # as of a broken BLAS
    with pytest.raises(ZtuneError, match=r"logits of 3 prompts are not finite .*ztune doctor"):
        span.contrasts()

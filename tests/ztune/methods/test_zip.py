"""ZIP's map against its formulas, written out once more and slowly."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztune.errors import ConfigError
from ztune.methods.zip import ZipMap, fastfood, walsh_hadamard

finite = st.floats(-100, 100, allow_nan=False, width=64)


def hadamard(n: int) -> np.ndarray:
    """H by its definition: entry (i, j) is −1 to the number of bits set in both."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])


@given(st.integers(0, 6).flatmap(lambda k: hnp.arrays(np.float64, (3, 2**k), elements=finite)))
def test_hadamard_twice_is_n_times_the_vector(x: np.ndarray) -> None:
    n = x.shape[-1]
    np.testing.assert_allclose(walsh_hadamard(walsh_hadamard(x)), n * x, atol=1e-9 * n)
    np.testing.assert_allclose(walsh_hadamard(x), x @ hadamard(n), atol=1e-9 * n)


def contexts_of(zip_map: ZipMap, points: np.ndarray) -> np.ndarray:
    contexts = zip_map(points).contexts
    assert contexts is not None
    return contexts


def test_hadamard_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(np.ones(6))


def transcribed_fastfood(
    x: np.ndarray, B: np.ndarray, permutation: np.ndarray, G: np.ndarray, d: int
) -> np.ndarray:
    D = len(B)
    H, P = hadamard(D), np.eye(D)[permutation]
    padded = np.concatenate([x, np.zeros(D - len(x))])
    out = H @ np.diag(G) @ P @ H @ np.diag(B) @ padded
    return np.asarray(out[:d] / (np.sqrt(D * (G**2).sum()) * np.sqrt(d / D)))


def test_fastfood_is_its_formula_and_linear() -> None:
    rng = np.random.default_rng(5)
    B, permutation, G = rng.choice([-1.0, 1.0], 16), rng.permutation(16), rng.standard_normal(16)
    x, y = rng.standard_normal((2, 7))
    expected = transcribed_fastfood(x, B, permutation, G, 12)
    np.testing.assert_allclose(fastfood(x, B, permutation, G, 12), expected, atol=1e-12)
    both = fastfood(2 * x - 3 * y, B, permutation, G, 12)
    parts = 2 * expected - 3 * transcribed_fastfood(y, B, permutation, G, 12)
    np.testing.assert_allclose(both, parts, atol=1e-12)


def test_fastfood_keeps_norms_in_the_mean() -> None:
    rng = np.random.default_rng(6)
    d, q = 64, 20
    ratios = []
    for _ in range(200):
        B, permutation = rng.choice([-1.0, 1.0], 64), rng.permutation(64)
        x = rng.standard_normal(q)
        y = fastfood(x, B, permutation, rng.standard_normal(64), d)
        ratios.append((y @ y) / (x @ x))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)


def test_published_sizes_give_417_values() -> None:
    zip_map = ZipMap(np.zeros((8, 512), np.float32), 500, 5, np.random.default_rng(0))
    assert zip_map.q == 62
    assert zip_map.dim == 417


def test_contexts_agree_with_a_transcription_of_the_formulas() -> None:
    m, d, r, intrinsic = 3, 20, 2, 15
    q, D = intrinsic // m, 32
    initial = np.random.default_rng(1).standard_normal((m, d)).astype(np.float32)
    zip_map = ZipMap(initial, intrinsic, r, np.random.default_rng(7))
    rng = np.random.default_rng(7)  # the same draws, in the documented order
    draws = [
        (rng.choice([-1.0, 1.0], size=D), rng.permutation(D), rng.standard_normal(D))
        for _ in range(m)
    ]
    V0 = rng.standard_normal((q, r))
    start = zip_map.start()
    np.testing.assert_array_equal(contexts_of(zip_map, start[None])[0], initial)
    np.testing.assert_array_equal(start[m * r + r : m * r + r + q * r], V0.ravel())

    points = np.random.default_rng(8).standard_normal((4, zip_map.dim))
    got = contexts_of(zip_map, points)
    for point, contexts in zip(points, got, strict=True):
        U = point[: m * r].reshape(m, r)
        s = point[m * r : m * r + r]
        V = point[m * r + r : m * r + r + q * r].reshape(q, r)
        v = point[m * r + r + q * r :]
        W = U @ np.diag(s) @ V.T + np.ones((m, 1)) @ v[None, :]
        for i in range(m):
            expected = initial[i] + transcribed_fastfood(W[i], *draws[i], d)
            np.testing.assert_allclose(contexts[i], expected, atol=1e-6)


def test_more_values_than_the_width_are_padded_to_their_own_power_of_two() -> None:
    q, d, D = 100, 24, 128
    zip_map = ZipMap(np.zeros((1, d), np.float32), q, 1, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    draw = rng.choice([-1.0, 1.0], size=D), rng.permutation(D), rng.standard_normal(D)
    v = np.random.default_rng(4).standard_normal(q)
    point = np.concatenate([np.zeros(1), np.ones(1), np.zeros(q), v])
    expected = transcribed_fastfood(v, *draw, d)
    np.testing.assert_allclose(contexts_of(zip_map, point[None])[0, 0], expected, atol=1e-6)


def test_a_latent_of_an_impossible_size_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"9000 values for each of 1 context .*set intrinsic_dim between 1 and"
    ):
        ZipMap(np.zeros((1, 100), np.float32), 9000, 5, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="gives 0 values for each of"):
        ZipMap(np.zeros((8, 100), np.float32), 5, 5, np.random.default_rng(0))

"""The maps that are neither ZIP's nor a decoder's, against their formulas written out again."""

import numpy as np
import pytest

from ztune.maps import DirectContext, LinearContext, Pixels
from ztune.methods.base import ModelSpec, Patches
from ztune.methods.bptvlm import BptVlmConfig, LinearTokens, TextAndImage
from ztune.methods.cma import TextCmaConfig
from ztune.methods.ogn import VocabularyContext
from ztune.methods.sharpzo import SharpZoConfig
from ztune.types import F32, F64

M, D, WIDTH = 3, 4, 5
INITIAL: F32 = (np.arange(M * D).reshape(M, D) / 7).astype(np.float32)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def points(n: int, dim: int) -> F64:
    return rng(9).standard_normal((n, dim))


def contexts(found: F32 | None) -> F32:
    assert found is not None
    assert found.dtype == np.float32
    return found


def towers(table: F32, patches: Patches | None = None) -> ModelSpec:
    words = np.full((2, table.shape[1]), 0.5, dtype=np.float32)
    return ModelSpec(
        table.shape[1],
        table,
        lambda _: words,
        8,
        lambda g: g.random(3),
        patches,
        lambda _: np.arange(2),
        lambda: np.zeros(0, np.int64),
        n_images=60,
    )


def test_a_direct_context_is_the_point_in_rows() -> None:
    prompt_map = DirectContext(INITIAL)
    assert prompt_map.dim == M * D
    np.testing.assert_array_equal(prompt_map.start(), INITIAL.ravel())
    assert prompt_map.start().dtype == np.float64
    z = points(2, M * D)
    found = prompt_map(z)
    assert found.visual is None
    for p in range(2):
        for i in range(M):
            for j in range(D):
                assert contexts(found.contexts)[p, i, j] == np.float32(z[p, i * D + j])


def test_a_linear_context_moves_by_a_projection_drawn_from_its_seed() -> None:
    prompt_map = LinearContext(INITIAL, 6, 0.3, rng(4))
    assert prompt_map.dim == 6
    found = prompt_map(prompt_map.start()[None])
    np.testing.assert_array_equal(contexts(found.contexts)[0], INITIAL)
    # Column k of A is what the k-th value adds.
    A = np.array([[0.3 * value for value in row] for row in rng(4).standard_normal((6, M * D))]).T
    z = points(2, 6)
    found = prompt_map(z)
    assert found.visual is None
    for p in range(2):
        expected = INITIAL + (A @ z[p]).reshape(M, D)
        np.testing.assert_allclose(contexts(found.contexts)[p], expected, rtol=1e-6, atol=1e-6)


def test_a_context_of_words_is_rows_of_the_table() -> None:
    table = rng(0).standard_normal((50, D)).astype(np.float32)
    prompt_map = VocabularyContext(table, 3)
    assert prompt_map.dim == 3
    z = np.array([[0.0, 49.0, 7.0], [7.0, 7.0, 1.0]])
    found = prompt_map(z)
    assert found.visual is None
    assert len(found) == 2
    expected = [[table[0], table[49], table[7]], [table[7], table[7], table[1]]]
    np.testing.assert_array_equal(contexts(found.contexts), expected, strict=True)
    contexts(found.contexts)[:] = 0
    assert table.any()


def test_linear_tokens_are_a_projection_with_a_mean() -> None:
    prompt_map = LinearTokens(2, WIDTH, 6, 0.7, 0.2, rng(4))
    assert prompt_map.dim == 6
    A = (0.7 + 0.2 * rng(4).standard_normal((6, 2 * WIDTH))).T
    z = points(3, 6)
    found = prompt_map(z)
    assert found.contexts is None
    assert contexts(found.visual).shape == (3, 2, WIDTH)
    for p in range(3):
        expected = (A @ z[p]).reshape(2, WIDTH)
        np.testing.assert_allclose(contexts(found.visual)[p], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(contexts(prompt_map(np.zeros((1, 6))).visual), 0)


@pytest.mark.parametrize("shape", [(3, 2, 2), (7,)])
def test_pixels_are_the_point_itself(shape: tuple[int, ...]) -> None:
    prompt_map = Pixels(shape)
    z = points(2, prompt_map.dim)
    found = prompt_map(z)
    assert found.contexts is None
    assert contexts(found.visual).shape == (2, *shape)
    np.testing.assert_array_equal(contexts(found.visual).reshape(2, -1), z.astype(np.float32))


def test_both_take_their_own_part_of_the_point() -> None:
    text = LinearContext(INITIAL, 6, 0.3, rng(1))
    image = LinearTokens(2, WIDTH, 4, 0.1, 0.2, rng(2))
    both = TextAndImage(text, image)
    assert both.dim == 10
    z = points(3, 10)
    found = both(z)
    assert len(found) == 3
    np.testing.assert_array_equal(
        contexts(found.contexts), contexts(text(z[:, :6]).contexts), strict=True
    )
    np.testing.assert_array_equal(
        contexts(found.visual), contexts(image(z[:, 6:]).visual), strict=True
    )


@pytest.mark.parametrize("n_rows", [1, 300, 4096, 9001])
def test_the_spread_of_the_token_table_is_that_of_all_its_values(n_rows: int) -> None:
    # A mean far from nought: a difference of large sums would lose digits in 32 bits.
    table = (3 + 0.01 * rng(0).standard_normal((n_rows, D))).astype(np.float32)
    expected = np.std(table.astype(np.float64))
    assert towers(table).token_std == pytest.approx(expected, rel=1e-6)


def test_projections_are_drawn_as_published() -> None:
    """Half a million entries: their mean and spread are known to a few parts in a thousand."""
    table = (0.5 + 0.03 * rng(0).standard_normal((500, 40))).astype(np.float32)
    std, mean, spread, n_values = float(np.std(table)), 0.004, 0.09, 48
    patches = Patches(64, n_values, mean, spread)

    def columns(config: BptVlmConfig | TextCmaConfig | SharpZoConfig) -> list[F64]:
        """Return what each value of the point adds: to the context, to the tokens."""
        prompt_map, _ = config.build(towers(table, patches), 5000, 1)
        still = prompt_map(np.zeros((1, prompt_map.dim)))
        moved = prompt_map(np.eye(prompt_map.dim))
        found = []
        for before, after in ((still.contexts, moved.contexts), (still.visual, moved.visual)):
            if before is not None and after is not None:
                added = (after.astype(np.float64) - before).reshape(len(after), -1)
                found.append(added[added.any(axis=1)].ravel())
        return found

    text, image = columns(BptVlmConfig())
    # A_L ~ N(0, std(token table) / √dim): no initial prompt, 5 tokens of 40.
    assert text.size == 2000 * 5 * 40
    assert text.std() == pytest.approx(std / np.sqrt(2000), rel=0.01)
    assert abs(text.mean()) < 0.01 * std / np.sqrt(2000)
    # A_V: mean(conv1) · 3072 / dim, std(conv1) · √(3072 / dim), 5 tokens of 64.
    assert image.size == 2000 * 5 * 64
    assert image.std() == pytest.approx(spread * np.sqrt(3072 / 2000), rel=0.01)
    assert image.mean() == pytest.approx(mean * 3072 / 2000, abs=7e-4)
    assert abs(np.corrcoef(text, image[: text.size])[0, 1]) < 0.01
    # The dimension of each part is its own.
    text, image = columns(BptVlmConfig(text_dim=500, vision_dim=125))
    assert text.std() == pytest.approx(std / np.sqrt(500), rel=0.02)
    assert image.std() == pytest.approx(spread * np.sqrt(3072 / 125), rel=0.02)
    (alone,) = columns(BptVlmConfig(part="text", text_dim=500))
    np.testing.assert_array_equal(alone, text)
    (alone,) = columns(BptVlmConfig(part="vision", vision_dim=125))
    np.testing.assert_array_equal(alone, image)
    # By the model's own patches.
    _, image = columns(BptVlmConfig(patch_values=None))
    assert image.std() == pytest.approx(spread * np.sqrt(n_values / 2000), rel=0.01)
    assert image.mean() == pytest.approx(mean * n_values / 2000, abs=9e-5)

    (text,) = columns(TextCmaConfig())
    assert text.std() == pytest.approx(std / np.sqrt(500), rel=0.02)
    (text,) = columns(SharpZoConfig())
    assert text.std() == pytest.approx(1.0, rel=0.01)
    (text,) = columns(SharpZoConfig(projection_std=0.2))
    assert text.std() == pytest.approx(0.2, rel=0.01)


def test_without_text_there_is_no_initial_prompt_and_words_are_one_elsewhere() -> None:
    table = rng(0).standard_normal((50, D)).astype(np.float32)
    prompt_map, optimizer = BptVlmConfig(part="text", text_dim=8).build(towers(table), 100, 1)
    still = contexts(prompt_map(optimizer.recommend()[None]).contexts)
    np.testing.assert_array_equal(still, np.zeros((1, 5, D)))
    prompt_map, optimizer = TextCmaConfig(intrinsic_dim=8).build(towers(table), 100, 1)
    still = contexts(prompt_map(optimizer.recommend()[None]).contexts)
    np.testing.assert_array_equal(still, np.full((1, 2, D), 0.5))

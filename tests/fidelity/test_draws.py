"""Every random draw against the distribution that a paper, or docs/methods.md, states for it.

Draws are taken where the methods take them: from the maps and optimizers that a configuration
builds, the sampler of the loop, and the views of an image.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtimes import preprocess
from runtimes.bundle import ImageSpec
from tests.fidelity.laws import (
    normal,
    require_law,
    require_mean,
    require_share,
    require_uncorrelated,
    uniform,
)
from tests.fidelity.support import WORDS, compose, evaluation, model_spec
from ztune.methods import zip as zip_method
from ztune.methods.bar import BarConfig
from ztune.methods.base import ModelSpec, Patches, TextStart, TunedConfig
from ztune.methods.blackvip import BlackVipConfig
from ztune.methods.bptvlm import BptVlmConfig
from ztune.methods.cma import TextCmaConfig
from ztune.methods.ogn import OgnConfig
from ztune.methods.ogn_context import OgnContextConfig
from ztune.methods.rgf import DirectRgfConfig
from ztune.methods.sharpzo import SharpZoConfig
from ztune.methods.spsa import DirectSpsaConfig
from ztune.methods.spsa_gc import SpsaGcConfig
from ztune.methods.zip import ZipConfig
from ztune.objective import BatchSampler
from ztune.types import F64, Optimizer

# Starts


@pytest.mark.parametrize(
    ("config", "n_tokens", "deviation"),
    [
        (ZipConfig(), 8, 0.02),
        (OgnContextConfig(), 8, 0.005),
        (DirectSpsaConfig(init="random"), 4, 0.02),
    ],
    ids=["zip", "ogn-context", "spsa"],
)
def test_random_contexts_start_normal(config: TextStart, n_tokens: int, deviation: float) -> None:
    found = []
    for seed in range(10):
        prompt_map, optimizer = compose(config, model_spec(512), seed)
        contexts = prompt_map(optimizer.recommend()[None]).contexts
        assert contexts is not None
        assert contexts.shape == (1, n_tokens, 512)
        found.append(contexts[0].astype(np.float64))
    require_law(np.array(found), normal(0, deviation))
    require_uncorrelated(np.array(found[:-1]), np.array(found[1:]))
    require_uncorrelated(np.array(found)[:, :-1], np.array(found)[:, 1:])


def test_zips_point_starts_with_u_0_s_1_v_normal() -> None:
    drawn = []
    for seed in range(10):
        _, optimizer = compose(ZipConfig(rank=50), model_spec(), seed)
        U, s, V, v = np.split(optimizer.recommend(), np.cumsum([8 * 50, 50, 62 * 50]))
        assert (U == 0).all()
        assert (s == 1).all()
        assert (v == 0).all()
        drawn.append(V)
    require_law(np.array(drawn), normal(0, 1))
    require_uncorrelated(np.array(drawn[:-1]), np.array(drawn[1:]))


def test_bar_starts_normal() -> None:
    _, optimizer = compose(BarConfig(), model_spec(image_size=40))
    start = optimizer.recommend()
    assert start.shape == (3 * 40 * 40,)
    require_law(start, normal(0, 1))


def test_blackvips_trigger_starts_uniform() -> None:
    triggers = []
    for seed in range(10):
        _, optimizer = compose(BlackVipConfig(), model_spec(), seed)
        start = optimizer.recommend()
        assert start.shape == (9920,)
        triggers.append(start[: 32 * 7 * 7 - 768])  # 800 values
    found = np.array(triggers)
    require_law(found, uniform(0, 0.1))
    require_uncorrelated(found[:-1] - 0.05, found[1:] - 0.05)


# Fixed projections


def test_fastfoods_signs_permutation_and_gaussian(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[F64, np.ndarray, F64]] = []
    plain = zip_method.fastfood

    def recorded(x: F64, signs: F64, permutation: np.ndarray, gaussian: F64, width: int) -> F64:
        used.append((signs, permutation, gaussian))
        return plain(x, signs, permutation, gaussian, width)

    monkeypatch.setattr(zip_method, "fastfood", recorded)
    for seed in range(150):
        compose(ZipConfig(intrinsic_dim=64), model_spec(16), seed)
    n = len(used)
    assert n == 150 * 8  # each token has its own
    B, order, G = (np.array([draw[part] for draw in used]) for part in range(3))
    assert B.shape == order.shape == G.shape == (n, 16)
    assert (np.abs(B) == 1).all()
    require_mean(B, 0, 1)
    require_uncorrelated(B[:-1], B[1:])
    require_law(G, normal(0, 1))
    require_uncorrelated(G[:-1], G[1:])
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(16), (n, 1)))
    for place in range(16):
        for value in range(16):
            require_share(int((order[:, place] == value).sum()), n, 1 / 16)


def columns(config: TunedConfig, spec: ModelSpec) -> list[F64]:
    """Return what the first 50 and the last 50 values of the point add to contexts and tokens."""
    prompt_map, _ = compose(config, spec)
    moved = [*range(50), *range(prompt_map.dim - 50, prompt_map.dim)]
    points = np.zeros((101, prompt_map.dim))
    points[np.arange(100), moved] = 1
    prompts = prompt_map(points)
    parts = [part for part in (prompts.contexts, prompts.visual) if part is not None]
    return [(part[:-1] - part[-1]).astype(np.float64).reshape(100, -1) for part in parts]


@pytest.mark.parametrize("deviation", [1.0, 0.2])
def test_sharpzos_projection(deviation: float) -> None:
    config = SharpZoConfig(projection_std=deviation)
    (found,) = columns(config, model_spec())
    assert found.shape == (100, 4 * 8)
    require_law(found, normal(0, deviation))
    require_uncorrelated(found[:-1], found[1:])


def test_bpt_vlms_projections() -> None:
    """A_L ~ N(0, σ²/2000), A_V ~ N(mean · 3072/2000, std² · 3072/2000).

    σ is the standard deviation of the token table; mean and std are those of the patch weights.
    """
    spec = model_spec(16, patches=Patches(width=12, n_values=3072, mean=0.02, std=0.03))
    text, image = columns(BptVlmConfig(), spec)
    assert text.shape == (100, 5 * 16)
    assert image.shape == (100, 5 * 12)
    # The first half of the point moves the context only, the second the image tokens.
    assert (text[50:] == 0).all()
    assert (image[:50] == 0).all()
    text, image = text[:50], image[50:]
    table = spec.token_table.astype(np.float64)
    sigma = math.sqrt(((table - table.mean()) ** 2).mean())
    require_law(text, normal(0, sigma / math.sqrt(2000)))
    ratio = 3072 / 2000
    require_law(image, normal(0.02 * ratio, 0.03 * math.sqrt(ratio)))
    require_uncorrelated(text[:, :60], image - 0.02 * ratio)


def test_black_box_tunings_projection() -> None:
    spec = model_spec(16)
    (found,) = columns(TextCmaConfig(), spec)
    sigma = float(spec.token_table.astype(np.float64).std())
    require_law(found, normal(0, sigma / math.sqrt(500)))


# Candidates


def stand_still(optimizer: Optimizer) -> F64:
    """Return the next points, and answer with equal losses, which move no point."""
    points = optimizer.ask().points
    optimizer.tell(evaluation(np.zeros(len(points))))
    return points


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (ZipConfig(), 0.1),
        (BlackVipConfig(), 0.1),
        (SpsaGcConfig(), 0.1),
        (DirectSpsaConfig(), 0.101),
    ],
    ids=["zip", "blackvip", "spsa-gc", "spsa"],
)
def test_perturbations_of_spsa(config: TunedConfig, decay: float) -> None:
    """An element moves by c_k · U[0.5, 1], up or down with equal chances."""
    spec = replace(model_spec(64), decoder_start=lambda rng: rng.standard_normal(300))
    _, optimizer = compose(config, spec)
    start, drawn = optimizer.recommend(), []
    for k in range(1, 13):
        points = stand_still(optimizer)
        assert len(points) == 10
        c = 0.01 / k**decay
        np.testing.assert_allclose((points[0::2] + points[1::2]) / 2, [start] * 5, atol=1e-12)
        drawn.append((points[0::2] - points[1::2]) / (2 * c))
    p = np.concatenate(drawn)
    assert p.shape == (60, len(start))
    magnitudes, signs = np.abs(p), np.sign(p)
    require_law(magnitudes, uniform(0.5, 1))
    require_mean(signs, 0, 1)
    require_uncorrelated(signs, magnitudes - 0.75)
    for one in (signs, magnitudes - 0.75):
        require_uncorrelated(one[:-1], one[1:])
        require_uncorrelated(one[:, :-1], one[:, 1:])


@pytest.mark.parametrize(
    "config",
    [BarConfig(), DirectRgfConfig(init="random", n_context=1)],
    ids=["bar", "rgf"],
)
def test_directions_are_uniform_on_the_sphere(config: TunedConfig) -> None:
    """In three dimensions every coordinate of such a direction is uniform (Archimedes)."""
    # An image of one pixel has three values, and so has one token of three.
    _, optimizer = compose(config, model_spec(width=3, image_size=1))
    drawn = []
    for _ in range(2000):
        points = stand_still(optimizer)
        assert points.shape == (6, 3)
        drawn.append((points[1:] - points[0]) / 0.01)
    u = np.concatenate(drawn)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, atol=1e-9)
    for axis in range(3):
        require_law(u[:, axis], uniform(-1, 1))
        # The product of two squares has the mean 1/15 and a mean square of 1/105.
        product = u[:, axis] ** 2 * u[:, (axis + 1) % 3] ** 2
        require_mean(product, 1 / 15, math.sqrt(1 / 105 - 1 / 225))
        require_uncorrelated(u[:, axis], u[:, (axis + 1) % 3])
    require_uncorrelated(u[:-1], u[1:])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_sharpzos_directions_are_normal_on_the_coordinates_kept(fraction: float) -> None:
    config = SharpZoConfig(intrinsic_dim=64, warmup_steps=0, keep_fraction=fraction)
    _, optimizer = compose(config, model_spec())
    rng = np.random.default_rng(3)
    for _ in range(4):  # the differences of a pruning, 2 · 64 points in calls of 32
        points = optimizer.ask().points
        assert len(points) == 32
        optimizer.tell(evaluation(rng.standard_normal(32)))
    drawn = []
    for _ in range(150):
        plus, minus = stand_still(optimizer)
        drawn.append((plus - minus) / 2e-3)
    u = np.array(drawn)
    is_kept = (u != 0).any(axis=0)
    assert is_kept.sum() == 64 * fraction
    assert (u[:, is_kept] != 0).all()
    require_law(u[:, is_kept], normal(0, 1))
    require_uncorrelated(u[:-1, is_kept], u[1:, is_kept])


@pytest.mark.parametrize(
    ("config", "size", "sigma"),
    [
        (TextCmaConfig(), 20, 1.0),
        (TextCmaConfig(sigma=0.3), 20, 0.3),
        (BptVlmConfig(), 15, 1.0),
    ],
    ids=["cma", "cma small", "bptvlm"],
)
def test_the_first_generation_is_normal(config: TunedConfig, size: int, sigma: float) -> None:
    patches = Patches(width=4, n_values=3072, mean=0.004, std=0.03)
    _, optimizer = compose(config, model_spec(4, patches=patches))
    points = optimizer.ask().points
    assert len(points) == size
    require_law(points, normal(0, sigma))
    require_uncorrelated(points[:-1], points[1:])


def test_the_first_generation_of_sharpzo_is_normal() -> None:
    config = SharpZoConfig(intrinsic_dim=128)
    _, optimizer = compose(config, model_spec())
    for _ in range(8):
        stand_still(optimizer)  # no slope, so that candidates are evaluated where they are
    points = optimizer.ask().points
    assert points.shape == (40, 128)
    require_law(points, normal(0, 0.4))


def test_ogns_tokens_are_log_uniform_in_the_rank() -> None:
    """Rank r of v tokens, from v/100 on, has the chance log((r + 1) / r) / log(100)."""
    config = OgnConfig(init="random", n_prompts=5000)
    _, optimizer = compose(config, model_spec())
    points = optimizer.ask().points
    assert points.shape == (5000, 4)
    assert np.isin(points, WORDS).all()
    ranks = np.searchsorted(WORDS, points.astype(np.int64)).astype(np.float64)
    support = np.arange(20, 2000)
    chances = np.log((support + 1) / support) / math.log(100)
    assert chances.sum() == pytest.approx(1)
    assert ranks.min() >= 20
    assert ranks.max() < 2000
    # Half of the tokens are among the first tenth.
    require_share(int((ranks < 200).sum()), ranks.size, 0.5)
    for r in (20, 21, 22):
        require_share(int((ranks == r).sum()), ranks.size, float(chances[r - 20]))
    logs = np.log(support)
    mean = float(chances @ logs)
    deviation = math.sqrt(float(chances @ (logs - mean) ** 2))
    found = np.log(ranks)
    require_mean(found, mean, deviation)
    spread = float(chances @ (logs - mean) ** 4)
    require_mean((found - mean) ** 2, deviation**2, math.sqrt(spread - deviation**4))
    require_uncorrelated(found[:, :-1] - mean, found[:, 1:] - mean)


# Images


def test_batches_have_each_image_and_view_equally_often() -> None:
    n_images, size, n_views, n_epochs = 10, 3, 4, 800
    sampler = BatchSampler(n_images, size, n_views, np.random.default_rng(11))
    places = np.zeros((n_images, 9), dtype=np.int64)
    views = np.zeros((n_images, n_views), dtype=np.int64)
    pairs = 0
    for _ in range(n_epochs):
        epoch: list[int] = []
        for _ in range(3):
            batch = sampler.next()
            assert len(batch.images) == size
            epoch += batch.images.tolist()
            np.add.at(views, (batch.images, batch.views), 1)
            pairs += {0, 1} <= set(batch.images.tolist())
        assert len(set(epoch)) == 9  # no image twice in an epoch; the last batch is dropped
        places[epoch, np.arange(9)] += 1
    for image in range(n_images):
        require_share(int(places[image].sum()), n_epochs, 9 / 10)
        for place in range(9):
            require_share(int(places[image, place]), n_epochs, 1 / 10)
        for view in range(n_views):
            require_share(int(views[image, view]), int(views[image].sum()), 1 / n_views)
    # Two images are in one batch with the chance 3 · (3 · 2) / (10 · 9).
    require_share(pairs, n_epochs, 1 / 5)


@pytest.mark.parametrize("size", [10, 128])
def test_a_batch_that_takes_all_images_takes_each_once(size: int) -> None:
    sampler = BatchSampler(10, size, 4, np.random.default_rng(12))
    drawn = []
    for _ in range(300):
        batch = sampler.next()
        np.testing.assert_array_equal(np.sort(batch.images), np.arange(10))
        drawn.append(batch.views[np.argsort(batch.images)])
    views = np.array(drawn)
    for view in range(4):
        require_share(int((views == view).sum()), views.size, 1 / 4)


WIDTH, HEIGHT = 1200, 1000
N_VIEWS = 12_000


@pytest.fixture(scope="module")
def views() -> tuple[F64, F64]:
    """Return boxes f64[N_VIEWS, 4], left, top, width, height, and whether each view is flipped."""
    spec = ImageSpec(4, (0.5,) * 3, (0.5,) * 3, "bilinear", "shortest", 127)
    # What is cut out is replaced by a view that is dark on the left.
    levels = np.zeros((4, 4, 3), dtype=np.uint8)
    levels[:, 2:] = 255
    small, boxes, flips = Image.fromarray(levels), [], []

    def cut(_: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        boxes.append((left, top, right - left, bottom - top))
        return small

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preprocess, "_cut", cut)
        image, rng = Image.new("RGB", (WIDTH, HEIGHT)), np.random.default_rng(21)
        for _ in range(N_VIEWS):
            pixels: Any = preprocess.random_view(image, spec, rng)
            flips.append(float(pixels[0, 0, 0] > pixels[0, -1, 0]))
    return np.array(boxes, dtype=np.float64), np.array(flips)


def test_half_of_the_views_are_flipped(views: tuple[F64, F64]) -> None:
    boxes, flips = views
    require_share(int(flips.sum()), N_VIEWS, 0.5)
    require_uncorrelated(flips - 0.5, boxes[:, 0] - boxes[:, 0].mean())


def test_areas_and_ratios_of_random_crops(views: tuple[F64, F64]) -> None:
    """The area is U[0.08, 1] of the image's, the ratio log-uniform in 3/4 … 4/3, if both fit.

    A pair that does not fit is drawn again, so large areas with unfavourable ratios are missing.
    Moments of what is left come from a fine grid of all pairs.
    """
    boxes, _ = views
    _, _, width, height = boxes.T
    area, ratio = width * height / (WIDTH * HEIGHT), width / height
    # Sides of 270 and more are rounded to whole pixels. The limits are reached.
    assert 0.08 * (1 - 1 / 200) <= area.min() <= 0.08 * (1 + 1 / 50)
    assert 0.97 <= area.max() <= 1
    assert 0.75 * (1 - 1 / 200) <= ratio.min() <= 0.75 * (1 + 1 / 100)
    assert 4 / 3 * (1 - 1 / 100) <= ratio.max() <= 4 / 3 * (1 + 1 / 200)
    cells = (np.arange(800) + 0.5) / 800
    areas = 0.08 + 0.92 * cells[:, None]
    logs = math.log(0.75) + math.log(16 / 9) * cells[None]
    fits = (areas * WIDTH * HEIGHT * np.exp(logs) <= WIDTH**2) & (
        areas * WIDTH * HEIGHT / np.exp(logs) <= HEIGHT**2
    )
    assert 0.5 < fits.mean() < 0.9  # many do not fit
    for found, of_pairs in ((area, areas + 0 * logs), (np.log(ratio), logs + 0 * areas)):
        left = of_pairs[fits]
        mean, deviation = float(left.mean()), float(left.std())
        require_mean(found, mean, deviation)
        squares = (left - mean) ** 2
        require_mean((found - mean) ** 2, deviation**2, float(squares.std()))


def test_small_crops_are_uniform_in_area_and_ratio(views: tuple[F64, F64]) -> None:
    """Up to an area of 3/4 · 1000/1200 all ratios fit, so none is missing there."""
    boxes, _ = views
    _, _, width, height = boxes.T
    area, ratio = width * height / (WIDTH * HEIGHT), width / height
    small = area <= 0.6
    assert small.sum() > 5000
    require_law(area[small], uniform(0.08, 0.6), rounding=1e-3)
    require_law(np.log(ratio[small]), uniform(math.log(3 / 4), math.log(4 / 3)), rounding=1e-2)


def test_positions_of_random_crops_are_uniform(views: tuple[F64, F64]) -> None:
    boxes, _ = views
    left, top, width, height = boxes.T
    both = []
    for start, room in ((left, WIDTH - width), (top, HEIGHT - height)):
        assert (start >= 0).all()
        assert (start <= room).all()
        # Whole pixels from 0 to `room`: the middle of each one's share of [0, 1].
        both.append((start + 0.5) / (room + 1))
    wide = (WIDTH - width >= 100) & (HEIGHT - height >= 100)
    assert wide.sum() > 5000
    for place in both:
        require_law(place[wide], uniform(0, 1))
    require_uncorrelated(both[0][wide] - 0.5, both[1][wide] - 0.5)

"""BAR's estimator and its focal loss (arXiv 2007.08714), by hand."""

import math

import numpy as np
import pytest

from tests.fidelity.support import compose, evaluation, model_spec
from ztune.methods.bar import BarConfig
from ztune.objective import FewShotObjective, NumpyScores, focal_loss
from ztune.types import F32, F64, Batch, Prompts

SIDE = 4
DIM = 3 * SIDE * SIDE


def smooth_loss(w: F64) -> float:
    return sum((0.1 + 0.02 * j) * math.cos(w[j] + j) for j in range(len(w)))


@pytest.mark.parametrize("step_size", [0.02, 0.2])
def test_steps_use_one_pivot_and_five_unit_directions(step_size: float) -> None:
    """The step size is constant here: only the estimator is under test.

    Losses of about 10 are rounded to 1e-15; δ / 5β = 960 multiplies that.
    """
    beta, n_directions, seed = 0.01, 5, 4
    config = BarConfig(step_size=step_size, last_step_size=step_size)
    _, optimizer = compose(config, model_spec(image_size=SIDE), seed)
    w = np.random.default_rng([seed, 0]).standard_normal(DIM)
    np.testing.assert_array_equal(optimizer.recommend(), w)
    rng = np.random.default_rng([seed, 2])
    for _ in range(8):
        drawn = rng.standard_normal((n_directions, DIM))
        pivot, estimate = smooth_loss(w), np.zeros(DIM)
        asked = [w]
        for row in drawn:
            u = row / math.sqrt(sum(value**2 for value in row))
            asked.append(w + beta * u)
            estimate += DIM / n_directions * u * (smooth_loss(w + beta * u) - pivot) / beta
        points = optimizer.ask().points
        np.testing.assert_allclose(points, asked, rtol=0, atol=1e-10)
        optimizer.tell(evaluation(np.array([smooth_loss(point) for point in points])))
        w = w - step_size * estimate
        np.testing.assert_allclose(optimizer.recommend(), w, rtol=0, atol=1e-10)


def test_the_published_settings_of_the_estimator() -> None:
    config = BarConfig()
    assert (config.perturbation, config.n_directions, config.focal) == (0.01, 5, 2)
    assert config.step_queries() == 6


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        # Two classes: p = 1 / (1 + exp(−margin)), and the loss is −(1 − p)² log p.
        (0.0, 0.25 * math.log(2)),  # p = 1/2
        (math.log(3), 0.0625 * math.log(4 / 3)),  # p = 3/4
        (-math.log(3), 0.5625 * math.log(4)),  # p = 1/4
        (math.log(9), 0.01 * math.log(10 / 9)),  # p = 9/10
    ],
)
def test_the_focal_loss_of_two_classes(margin: float, expected: float) -> None:
    logits = np.array([[0.5 + margin, 0.5], [0.5, 0.5 + margin]], dtype=np.float32)
    found = focal_loss(BarConfig().focal)(logits, np.array([0, 1]))
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-6)


class Turned:
    """Images in the plane at the angles 0° and 90°, which a visual prompt turns."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        """Return unit features f32[P, N, 2] for angles f32[P, 1] in degrees."""
        angles = np.radians(visual[:, 0, None] + np.array([0.0, 90.0])[batch.images])
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def test_the_loss_of_a_candidate_is_the_mean_focal_loss_of_its_images() -> None:
    # Texts along the axes, logits 2 cos: at 0° both margins are 2; turned by 90° the first image
    # is class 1's (margin −2) and the second has cosines 0 and −… of −1 with class 0: margin 2.
    texts = np.eye(2, dtype=np.float32)
    scores = NumpyScores(texts, Turned(), 2.0, 0.0, focal_loss(2.0))
    objective = FewShotObjective(scores, np.array([0, 1]))
    visual = np.array([[0.0], [90.0]], dtype=np.float32)
    batch = Batch(np.array([0, 1]), np.zeros(2, np.int64), 1)
    found = objective(Prompts(visual=visual), batch).losses
    right, wrong = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    own = [-((1 - p) ** 2) * math.log(p) for p in (right, wrong)]
    np.testing.assert_allclose(found, [own[0], (own[1] + own[0]) / 2], rtol=1e-5)

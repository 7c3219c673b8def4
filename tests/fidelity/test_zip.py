"""ZIP's loop against a transcription of arXiv 2504.06838, with explicit matrices and loops.

Both sides get the same random streams and call the same small model.
"""

import math
import time

import numpy as np
import pytest

from tests.fidelity.support import model_spec
from ztune.budget import Budget
from ztune.loop import Tuning, tune
from ztune.methods.zip import ZipConfig
from ztune.objective import BatchSampler
from ztune.types import F32, F64, I64, Batch, Evaluation, Prompts

M, D, Q, R = 8, 48, 62, 5  # tokens, text width, ⌊500 / 8⌋, rank
SIZE = 64  # the next power of two >= D
N_IMAGES, N_VIEWS, N_CLASSES, N_STEPS, N_HIDDEN = 20, 3, 4, 50, 6


class Model:
    """A smooth loss of a context: cross-entropy of logits that each image and view reads off it."""

    def __init__(self, slope: float):
        rng = np.random.default_rng(5)
        self.mix = slope * rng.standard_normal((M * D, N_HIDDEN))
        self.images = 2 * rng.standard_normal((N_VIEWS, N_IMAGES, N_CLASSES, N_HIDDEN))
        self.labels = np.arange(N_IMAGES) % N_CLASSES

    def loss(self, context: F32, images: I64, views: I64) -> float:
        """Return the mean loss of a batch, with 64-bit arithmetic on the 32-bit context."""
        hidden = np.tanh(context.astype(np.float64).ravel() @ self.mix)
        total = 0.0
        for image, view in zip(images, views, strict=True):
            logits = self.images[view, image] @ hidden
            total += math.log(np.exp(logits).sum()) - logits[self.labels[image]]
        return total / len(images)

    def __call__(self, prompts: Prompts, batch: Batch) -> Evaluation:
        """Answer as an oracle."""
        assert prompts.contexts is not None
        assert prompts.visual is None
        losses = np.array([self.loss(c, batch.images, batch.views) for c in prompts.contexts])
        labels = self.labels[batch.images]
        return Evaluation(losses, np.zeros_like(losses), labels, batch.number)


def hadamard(n: int) -> F64:
    """Return the un-normalised Walsh–Hadamard matrix, by its recursion."""
    if n == 1:
        return np.ones((1, 1))
    half = hadamard(n // 2)
    return np.block([[half, half], [half, -half]])


class Transcription:
    """The map and the loop, as in sections 3 and 4 of the paper."""

    def __init__(self, seed: int, batch_size: int):
        noise = np.random.default_rng([seed, 0]).standard_normal((M, D))
        self.initial = (0.02 * noise).astype(np.float32).astype(np.float64)
        rng = np.random.default_rng([seed, 1])
        H = hadamard(SIZE)
        self.transforms = []
        for _ in range(M):
            B = np.diag(rng.choice([-1.0, 1.0], size=SIZE))
            order = rng.permutation(SIZE)
            permutation = np.zeros((SIZE, SIZE))
            for row, column in enumerate(order):
                permutation[row, column] = 1
            g = rng.standard_normal(SIZE)
            whole = H @ np.diag(g) @ permutation @ H @ B
            scale = math.sqrt(SIZE * sum(value**2 for value in g)) * math.sqrt(D / SIZE)
            self.transforms.append(whole[:D] / scale)
        V = rng.standard_normal((Q, R))
        self.w = np.array([0.0] * (M * R) + [1.0] * R + list(V.ravel()) + [0.0] * Q)
        self.steps = np.random.default_rng([seed, 2])
        self.batches = np.random.default_rng([seed, 3])
        self.batch_size = batch_size
        self.queue: list[int] = []
        self.n_clipped = 0

    def context(self, w: F64) -> F32:
        """Return ctx0_i + Fastfood_i(W_i), W = U diag(s) Vᵀ + 1 vᵀ, as float32."""
        U = w[: M * R].reshape(M, R)
        s = w[M * R : M * R + R]
        V = w[M * R + R : M * R + R + Q * R].reshape(Q, R)
        v = w[M * R + R + Q * R :]
        W = U @ np.diag(s) @ V.T + np.ones((M, 1)) @ v[None]
        rows = []
        for i in range(M):
            padded = np.concatenate([W[i], np.zeros(SIZE - Q)])
            rows.append(self.initial[i] + self.transforms[i] @ padded)
        return np.array(rows).astype(np.float32)

    def next_batch(self) -> tuple[I64, I64]:
        """Return images and views; an epoch's incomplete last batch is dropped."""
        if self.batch_size >= N_IMAGES:
            images = list(range(N_IMAGES))
        else:
            if len(self.queue) < self.batch_size:
                self.queue = list(self.batches.permutation(N_IMAGES))
            images = [self.queue.pop(0) for _ in range(self.batch_size)]
        views = self.batches.integers(N_VIEWS, size=len(images), dtype=np.int64)
        return np.array(images), views

    def step(self, k: int, model: Model) -> list[float]:
        """Take step k = 1, 2, …; return its ten losses, each pair's plus before its minus."""
        dim = len(self.w)
        a, c = 0.01 / (k + 1) ** 0.4, 0.01 / k**0.1
        magnitudes = self.steps.uniform(0.5, 1.0, (5, dim))
        signs = self.steps.choice([-1.0, 1.0], (5, dim))
        images, views = self.next_batch()
        estimate, losses = np.zeros(dim), []
        for magnitude, sign in zip(magnitudes, signs, strict=True):
            p = magnitude * sign
            plus = model.loss(self.context(self.w + c * p), images, views)
            minus = model.loss(self.context(self.w - c * p), images, views)
            estimate += (plus - minus) / (2 * c * p) / 5
            losses += [plus, minus]
        norm = math.sqrt(sum(value**2 for value in estimate))
        if norm >= math.sqrt(dim):
            estimate *= math.sqrt(dim) / norm
            self.n_clipped += 1
        self.w = self.w - a * estimate
        return losses


@pytest.mark.parametrize(
    ("seed", "batch_size", "slope"), [(1, 6, 0.03), (2, 5, 0.03), (3, 128, 0.08)]
)
def test_fifty_steps_are_those_of_the_paper(seed: int, batch_size: int, slope: float) -> None:
    """The settings are ZIP's defaults, apart from the batch size: 20 images are 3 batches of 6,
    4 of 5, or fewer than one.

    Contexts reach the model as float32. Both sides compute them in float64 and agree to 1e-15, so
    that on another processor some may round to a neighbour, 1e-8 away. That changes a loss by less
    than 1e-8, an estimate by 1 / 2cp < 150 times as much, and a point by 0.008 times that: 1e-8
    per step, and less than 1e-6 after 50.
    """
    config, model = ZipConfig(batch_size=batch_size), Model(slope)
    prompt_map, optimizer = config.build(model_spec(D), 500, seed)
    assert prompt_map.dim == 417
    expected = Transcription(seed, batch_size)
    rng = np.random.default_rng([seed, 3])
    sampler = BatchSampler(N_IMAGES, config.images_of(N_IMAGES, N_CLASSES), N_VIEWS, rng)
    tuning = Tuning(optimizer, sampler, Budget(500), time.monotonic())

    def compare(now: Tuning, answer: Evaluation) -> None:
        losses = expected.step(now.step, model)
        np.testing.assert_allclose(answer.losses, losses, rtol=0, atol=1e-6)
        w = now.optimizer.recommend()
        np.testing.assert_allclose(w, expected.w, rtol=0, atol=1e-6)
        contexts = prompt_map(w[None]).contexts
        assert contexts is not None
        np.testing.assert_allclose(contexts[0], expected.context(expected.w), rtol=0, atol=1e-6)

    images, views = np.arange(N_IMAGES), np.zeros(N_IMAGES, np.int64)
    before = model.loss(expected.context(expected.w), images, views)
    assert tune(tuning, prompt_map, model, N_CLASSES, compare) == "budget"
    assert tuning.step == N_STEPS
    assert tuning.budget.queries == 10 * N_STEPS
    assert tuning.budget.text_forwards == 10 * N_STEPS * N_CLASSES
    # Both branches of the clipping were taken, and the steps lead somewhere.
    assert 5 <= expected.n_clipped <= N_STEPS - 5
    assert model.loss(expected.context(expected.w), images, views) < before - 0.01

"""SPSA with gradient correction (BlackVIP, arXiv 2303.14773), in loops over single values."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.fidelity.support import compose, evaluation, model_spec
from ztune.methods.base import TunedConfig
from ztune.methods.blackvip import BlackVipConfig
from ztune.methods.spsa_gc import SpsaGcConfig
from ztune.types import F64

N_STEPS, N_PAIRS = 50, 5


def loss(w: F64) -> float:
    return sum(math.cos(j) * math.sin(3 * w[j]) + (w[j] - 0.3) ** 2 for j in range(len(w)))


@pytest.mark.parametrize("config", [BlackVipConfig(), SpsaGcConfig()], ids=["blackvip", "spsa-gc"])
def test_fifty_steps_follow_the_momentum_recursion(config: TunedConfig) -> None:
    """Losses of about 30 are rounded to 1e-14, and a quotient multiplies that by 1 / 2cp < 150."""
    seed = 3
    # A decoder of 40 values, and a context of 4 words with 8 values each.
    spec = replace(model_spec(), decoder_start=lambda rng: rng.standard_normal(40))
    _, optimizer = compose(config, spec, seed)
    w = optimizer.recommend()
    dim = len(w)
    rng = np.random.default_rng([seed, 2])
    m, is_long = np.zeros(dim), []
    for k in range(1, N_STEPS + 1):
        a, c = 0.01 / (k + 1) ** 0.4, 0.01 / k**0.1
        magnitudes = rng.uniform(0.5, 1.0, (N_PAIRS, dim))
        signs = rng.choice([-1.0, 1.0], (N_PAIRS, dim))
        estimate = np.zeros(dim)
        for magnitude, sign in zip(magnitudes, signs, strict=True):
            p = magnitude * sign
            difference = loss(w + c * p) - loss(w - c * p)
            for j in range(dim):
                estimate[j] += difference / (2 * c * p[j]) / N_PAIRS
        is_long.append(np.linalg.norm(estimate) > math.sqrt(dim))
        for j in range(dim):
            m[j] = 0.8 * m[j] + estimate[j]
            w[j] -= a * (estimate[j] + 0.8 * m[j])
        points = optimizer.ask().points
        assert len(points) == 2 * N_PAIRS
        optimizer.tell(evaluation(np.array([loss(point) for point in points])))
        np.testing.assert_allclose(optimizer.recommend(), w, rtol=0, atol=1e-9)
    assert any(is_long)  # and nothing is clipped

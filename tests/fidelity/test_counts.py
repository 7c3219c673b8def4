"""Queries, candidates and step sizes of ZIP's comparison, per data set, as published.

Source: the published code of ZIP (ICLR 2025): batches of 128 of which an incomplete last one is
dropped, 5,000 calls at one per batch, 1,000 epochs at most, 16 shots.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.ztune.methods.test_methods import towers
from ztune.methods.bar import BarConfig
from ztune.methods.bptvlm import BptVlmConfig
from ztune.methods.registry import METHODS, method_config
from ztune.optim.epochs import Epochs
from ztune.optim.rgf import Rgf
from ztune.types import Evaluation

# Classes; those of Caltech101 without faces and background.
CLASSES = {
    "caltech101": 100, "oxfordpets": 37, "flowers102": 102, "food101": 101, "fgvcaircraft": 100,
    "sun397": 397, "dtd": 47, "svhn": 10, "eurosat": 10, "resisc45": 45, "clevr": 8, "ucf101": 101,
    "imagenet": 1000,
}  # fmt: skip
CALLS, SHOTS, BATCH, EPOCHS, POPULATION = 5000, 16, 128, 1000, 15


def published_count(n_images: int) -> tuple[int, int]:
    """Return candidates begun and calls spent: one epoch a candidate, until the calls are spent.

    Epochs are counted between generations, so the last generation is completed.
    """
    per_candidate = max(1, n_images // BATCH)
    candidates = calls = 0
    while candidates < EPOCHS:
        for _ in range(POPULATION):
            calls = min(CALLS, calls + per_candidate)
            candidates += 1
            if calls == CALLS:
                return candidates, calls
    return candidates, calls


def ours(n_images: int) -> tuple[int, int, str | None]:
    """Run the preset on losses of noise; return whole candidates, queries and why it ends."""
    settings = {"text_dim": 4, "vision_dim": 4}
    config = method_config(METHODS["bptvlm"], settings, "published")
    assert isinstance(config, BptVlmConfig)
    _, optimizer = config.build(replace(towers(), n_images=n_images), CALLS, 1)
    assert isinstance(optimizer, Epochs)
    rng, candidates, queries = np.random.default_rng(0), 0, 0
    while optimizer.finished() is None:
        proposal = optimizer.ask()
        n = len(proposal.points)
        candidates += 0 if proposal.mid_step else n
        queries += n
        assert queries <= CALLS
        optimizer.tell(Evaluation(rng.random(n), np.zeros(n), np.zeros(1, np.int64), 1))
    return candidates, queries, optimizer.finished()


EXPECTED = {
    "caltech101": (417, 5000), "oxfordpets": (1005, 4020), "flowers102": (417, 5000),
    "food101": (417, 5000), "fgvcaircraft": (417, 5000), "sun397": (103, 5000),
    "dtd": (1000, 5000), "svhn": (1005, 1005), "eurosat": (1005, 1005), "resisc45": (1000, 5000),
    "clevr": (1005, 1005), "ucf101": (417, 5000), "imagenet": (40, 5000),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_candidates_of_bptvlm(name: str) -> None:
    """Ours are whole: the published last one may end after a part of its batches."""
    n_images = SHOTS * CLASSES[name]
    begun, calls = published_count(n_images)
    assert (begun, calls) == EXPECTED[name]
    per_candidate = max(1, n_images // BATCH)
    whole = calls // per_candidate
    assert begun - whole in (0, 1)
    reason = "candidates" if calls < CALLS else "budget"
    assert ours(n_images) == (whole, whole * per_candidate, reason)


# At the last of 834 steps, with 1, 4, 12 and 125 batches an epoch.
@pytest.mark.parametrize(
    ("name", "last"),
    [("eurosat", 1.04), ("oxfordpets", 7.9), ("caltech101", 9.3), ("imagenet", 9.9)],
)
def test_step_sizes_of_bar(name: str, last: float) -> None:
    n_images = SHOTS * CLASSES[name]
    _, optimizer = BarConfig().build(replace(towers(), n_images=n_images), CALLS, 1)
    assert isinstance(optimizer, Rgf)
    n_steps = CALLS // 6
    horizon = 0.9 * EPOCHS * max(1, n_images // BATCH)
    for step in (1, 2, n_steps // 2, n_steps, n_steps + 1):
        optimizer._step = step - 1
        expected = (10 - 0.1) * (1 - step / horizon) ** 0.9 + 0.1
        assert optimizer._step_size == pytest.approx(expected, rel=1e-12)
    assert optimizer._step_size == pytest.approx(last, rel=0.01)
    optimizer._step = 10**6
    assert optimizer._step_size == pytest.approx(0.1)

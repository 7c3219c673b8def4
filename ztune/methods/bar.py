"""BAR: a trained border around the image, by random gradient-free steps.

Source: Tsai et al., "Transfer Learning without Knowing: Reprogramming Black-box Machine Learning
Models", ICML 2020 (arXiv 2007.08714), with the settings of its comparison in ZIP (arXiv
2504.06838).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.capabilities import LOGITS, LOSS, PIXELS
from ztune.io.config import require
from ztune.maps import Pixels
from ztune.methods.base import (
    INITIAL,
    STEPS,
    Composition,
    ModelSpec,
    Preset,
    TunedConfig,
    TunedMethod,
    batches_of_epoch,
)
from ztune.optim.rgf import Rgf, RgfConfig


@dataclass(frozen=True)
class BarConfig(RgfConfig, TunedConfig):
    """BAR's settings are those of RgfConfig."""

    focal_gamma: float = 2.0
    batch_size: int | None = 128
    decay_epochs: int | None = 900
    """Epochs over which the step size decays, 0.9 of the published 1,000; None: the budget."""
    program = "border"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "batch_size", "decay_epochs")
        require(self, 0, "focal_gamma")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOGITS if self.focal_gamma else LOSS, PIXELS))

    @property
    def focal(self) -> float:
        return self.focal_gamma

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = Pixels((3, spec.image_size, spec.image_size))
        start = np.random.default_rng([seed, INITIAL]).standard_normal(prompt_map.dim)
        rng = np.random.default_rng([seed, STEPS])
        n_steps = queries // self.step_queries()
        if self.decay_epochs is not None:
            n_steps = self.decay_epochs * batches_of_epoch(spec.n_images, self.batch_size)
        return prompt_map, Rgf(self, start, n_steps, rng)


METHOD = TunedMethod(
    name="bar",
    title="black-box adversarial reprogramming: a trained border around the image",
    paper="BAR, ICML 2020 (arXiv 2007.08714), with the settings of its comparison in ZIP",
    config=BarConfig,
    presets={"published": Preset(views=16)},
)

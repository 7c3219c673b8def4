"""Random gradient-free steps on the context's own values.

Source: Nesterov and Spokoiny, Foundations of Computational Mathematics 17, 2017. No paper tunes
prompts this way: step sizes are from ztune's measurements (docs/methods.md), the rest is BAR's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.maps import DirectContext
from ztune.methods.base import STEPS, Composition, ModelSpec, TextStart, TunedMethod
from ztune.optim.rgf import Rgf, RgfConfig


@dataclass(frozen=True)
class DirectRgfConfig(RgfConfig, TextStart):
    """Random gradient-free steps on the context's values (Nesterov and Spokoiny 2017)."""

    batch_size: int | None = 128
    step_size: float = 0.1
    last_step_size: float = 0.01

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        RgfConfig.__post_init__(self)

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(spec, seed))
        rng = np.random.default_rng([seed, STEPS])
        return prompt_map, Rgf(self, prompt_map.start(), queries // self.step_queries(), rng)


METHOD = TunedMethod(
    name="rgf",
    title="one-sided random gradient-free steps on the context's own values",
    paper="Nesterov and Spokoiny 2017",
    config=DirectRgfConfig,
)

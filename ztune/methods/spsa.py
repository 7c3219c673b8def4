"""Plain SPSA on the context's own values.

Source: Spall, IEEE Trans. Automatic Control 37, 1992, with the decays of Spall 1998.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.maps import DirectContext
from ztune.methods.base import STEPS, Composition, ModelSpec, Preset, TextStart, TunedMethod
from ztune.optim.spsa import Spsa, SpsaConfig


@dataclass(frozen=True)
class DirectSpsaConfig(SpsaConfig, TextStart):
    """Plain SPSA on the context's values (Spall 1992), with the decays of Spall 1998."""

    step_decay: float = 0.602
    perturbation_decay: float = 0.101
    clip: bool = False
    batch_size: int | None = 128

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        SpsaConfig.__post_init__(self)

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(spec, seed))
        return prompt_map, Spsa(self, prompt_map.start(), np.random.default_rng([seed, STEPS]))


METHOD = TunedMethod(
    name="spsa",
    title="simultaneous perturbation of the context's own values",
    paper="Spall 1992; decays of Spall 1998",
    config=DirectSpsaConfig,
    presets={"tuned": Preset({"step_size": 1.0})},
)

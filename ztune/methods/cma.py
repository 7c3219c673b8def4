"""CMA-ES on a projected context, as in black-box tuning (BBT).

Source: Sun et al., "Black-Box Tuning for Language-Model-as-a-Service", ICML 2022 (arXiv
2201.03514).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.io.config import require
from ztune.maps import LinearContext
from ztune.methods.base import MAP, Composition, Generations, ModelSpec, TextStart, TunedMethod


@dataclass(frozen=True)
class TextCmaConfig(Generations, TextStart):
    """A projected context by CMA-ES, as in black-box tuning (BBT, ICML 2022)."""

    intrinsic_dim: int = 500
    population: int | None = 20

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        Generations.__post_init__(self)
        require(self, 1, "intrinsic_dim")

    @property
    def n_values(self) -> int:
        return self.intrinsic_dim

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        self.check_reach(queries)
        std = spec.token_std / np.sqrt(self.intrinsic_dim)
        rng = np.random.default_rng([seed, MAP])
        prompt_map = LinearContext(self.initial(spec, seed), self.intrinsic_dim, std, rng)
        return prompt_map, self.optimizer(prompt_map.start(), spec.n_images, queries, seed)


METHOD = TunedMethod(
    name="cma",
    title="CMA-ES on a projected context",
    paper="BBT, ICML 2022 (arXiv 2201.03514)",
    config=TextCmaConfig,
)

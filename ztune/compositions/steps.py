"""Methods that move a context step by step, by differences of losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.compositions.base import (
    MAP,
    Composition,
    ModelSpec,
    TextStart,
    require_at_least_one,
)
from ztune.compositions.descent import PairedSteps, PivotedSteps
from ztune.maps.context import DirectContext
from ztune.maps.zip import ZipMap


@dataclass(frozen=True)
class _SpsaSteps(TextStart, PairedSteps):
    """A context moved by simultaneous perturbation."""

    batch_size: int | None = 128

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        PairedSteps.__post_init__(self)


@dataclass(frozen=True)
class ZipConfig(_SpsaSteps):
    """ZIP (arXiv 2504.06838)."""

    n_context: int = 8
    init: str = "random"
    intrinsic_dim: int = 500
    """Values before the low-rank split; q = ⌊intrinsic_dim / m⌋ per token."""
    rank: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "rank", "intrinsic_dim")

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        rng = np.random.default_rng([seed, MAP])
        prompt_map = ZipMap(self.initial(towers, seed), self.intrinsic_dim, self.rank, rng)
        return prompt_map, self.spsa(prompt_map.start(), seed)


@dataclass(frozen=True)
class DirectSpsaConfig(_SpsaSteps):
    """The context's own values by plain SPSA (Spall 1992), its decays as Spall 1998 advises."""

    step_decay: float = 0.602
    perturbation_decay: float = 0.101
    clip: bool = False

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(towers, seed))
        return prompt_map, self.spsa(prompt_map.start(), seed)


@dataclass(frozen=True)
class SpsaGcConfig(DirectSpsaConfig):
    """The context's own values by SPSA with gradient correction (BlackVIP's optimizer)."""

    step_decay: float = 0.4
    perturbation_decay: float = 0.1
    momentum: float = 0.8


@dataclass(frozen=True)
class DirectRgfConfig(TextStart, PivotedSteps):
    """The context's own values by random gradient-free steps (Nesterov and Spokoiny 2017).

    No paper tunes prompts so: the step sizes are those of our measurements (docs/methods.md), all
    else is BAR's.
    """

    batch_size: int | None = 128
    step_size: float = 0.1
    last_step_size: float = 0.01

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        PivotedSteps.__post_init__(self)

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(towers, seed))
        return prompt_map, self.rgf(prompt_map.start(), queries, seed)

"""Methods that change images by values of their own: BlackVIP's decoder and BAR's border."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.access import FEATURES, LOGITS, LOSS, PIXELS
from ztune.compositions.base import (
    INITIAL,
    Composition,
    Defaults,
    ModelSpec,
    require_at_least_one,
)
from ztune.compositions.descent import PairedSteps, PivotedSteps
from ztune.errors import ConfigError
from ztune.maps.visual import Pixels


@dataclass(frozen=True)
class BlackVipConfig(Defaults, PairedSteps):
    """BlackVIP (CVPR 2023) with the settings of its comparison in ZIP (arXiv 2504.06838)."""

    clip: bool = False
    momentum: float = 0.8
    batch_size: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "batch_size")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOSS, PIXELS, FEATURES))

    @property
    def program(self) -> str | None:
        return "decoder"

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        start = towers.decoder_start(np.random.default_rng([seed, INITIAL]))
        return Pixels(start.shape), self.spsa(start, seed)


@dataclass(frozen=True)
class BarConfig(Defaults, PivotedSteps):
    """BAR (ICML 2020) with the settings of its comparison in ZIP (arXiv 2504.06838)."""

    focal_gamma: float = 2.0
    batch_size: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "batch_size")
        if not self.focal_gamma >= 0:
            raise ConfigError(f"focal_gamma is {self.focal_gamma}, expected at least 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOGITS if self.focal_gamma else LOSS, PIXELS))

    @property
    def program(self) -> str | None:
        return "border"

    @property
    def focal(self) -> float:
        return self.focal_gamma

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        shape = (3, towers.image_size, towers.image_size)
        prompt_map = Pixels(shape)
        start = np.random.default_rng([seed, INITIAL]).standard_normal(prompt_map.dim)
        return prompt_map, self.rgf(start, queries, seed)

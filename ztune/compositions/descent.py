"""The descents that several methods share: how many candidates they send, and how far apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.compositions.base import STEPS, part_of
from ztune.optim.rgf import Rgf, RgfConfig
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.types import F64


@dataclass(frozen=True)
class PairedSteps(SpsaConfig):
    """Simultaneous perturbation: pairs of candidates around a point."""

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return 2 * self.n_pairs

    def step_queries(self) -> int:
        return 2 * self.n_pairs

    def spsa(self, start: F64, seed: int) -> Spsa:
        return Spsa(part_of(SpsaConfig, self), start, np.random.default_rng([seed, STEPS]))


@dataclass(frozen=True)
class PivotedSteps(RgfConfig):
    """One-sided differences: a point and candidates around it."""

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return self.n_directions + 1

    def step_queries(self) -> int:
        return self.n_directions + 1

    def rgf(self, start: F64, queries: int, seed: int) -> Rgf:
        """Return the optimizer with a schedule that ends with the budget of `queries`."""
        n_steps = queries // self.step_queries()
        return Rgf(part_of(RgfConfig, self), start, n_steps, np.random.default_rng([seed, STEPS]))

"""Simultaneous perturbation with averaged pairs, intrinsic-dimensional clipping and momentum.

Source: Spall 1992 for the estimator; Park et al. 2025 (ZIP, arXiv 2504.06838) for the schedule and
the clipping; Oh et al. 2023 (BlackVIP, arXiv 2303.14773) for the momentum. The loop:

    optimizer = Spsa(SpsaConfig(), start, np.random.default_rng(1))
    for _ in range(500):
        optimizer.tell(oracle(to_contexts(optimizer.ask().points), batch))
    best = optimizer.recommend()
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.types import F64, Evaluation, Optimizer, Proposal, State


@dataclass(frozen=True)
class SpsaConfig:
    """ZIP's published settings."""

    step_size: float = 0.01
    """a in a_k = a / (k + step_offset)^step_decay."""
    step_offset: float = 1.0
    step_decay: float = 0.4
    perturbation: float = 0.01
    """c in c_k = c / k^perturbation_decay."""
    perturbation_decay: float = 0.1
    n_pairs: int = 5
    """Two-sided estimates averaged per step of 2 * n_pairs queries."""
    clip: bool = True
    """Clip the gradient to norm √δ."""
    momentum: float = 0.0
    """β of SPSA-GC, 0.8 in BlackVIP; 0 is plain SPSA."""

    def __post_init__(self) -> None:
        require(self, 1, "n_pairs")
        require(self, 0, "step_size", "perturbation", above=True)
        require(self, 0, "step_offset", "step_decay", "perturbation_decay")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum}, expected in [0, 1)")

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        """Name and value of the distance of a pair's points."""
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return 2 * self.n_pairs

    def step_queries(self) -> int:
        return 2 * self.n_pairs


class Spsa(Optimizer):
    """w ← w − a_k ĝ with ĝ the mean of n_pairs two-sided estimates on the same images.

    With momentum: m ← β m + ĝ, w ← w − a_k (ĝ + β m), which is Nesterov's look-ahead.
    """

    def __init__(self, config: SpsaConfig, start: F64, rng: np.random.Generator):
        self._config = config
        self._point = start.astype(np.float64)
        self._rng = rng
        self._momentum = np.zeros_like(self._point)  # m
        self._step = 1  # k
        self._perturbations = self._draw(self._rng)

    def _draw(self, rng: np.random.Generator) -> F64:
        """Return p f64[n_pairs, δ]: magnitudes U[0.5, 1] with random signs."""
        shape = (self._config.n_pairs, len(self._point))
        magnitudes = rng.uniform(0.5, 1.0, shape)
        return np.asarray(magnitudes * rng.choice([-1.0, 1.0], shape))

    @property
    def _scale(self) -> float:
        c = self._config
        return float(c.perturbation / self._step**c.perturbation_decay)  # c_k

    def _pairs(self, perturbations: F64) -> F64:
        """Return f64[2 n_pairs, δ], w + c_k p before w − c_k p."""
        moves = self._scale * perturbations
        pairs = np.stack([self._point + moves, self._point - moves], axis=1)
        return np.asarray(pairs.reshape(-1, len(self._point)))

    def ask(self) -> Proposal:
        return Proposal(points=self._pairs(self._perturbations))

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        n_rounds = -(-n_directions // self._config.n_pairs)
        return np.stack([self._pairs(self._draw(rng)) for _ in range(n_rounds)])

    def tell(self, evaluation: Evaluation) -> None:
        c = self._config
        plus, minus = evaluation.losses.reshape(c.n_pairs, 2).T
        differences = (plus - minus)[:, None] / (2 * self._scale * self._perturbations)
        gradient: F64 = differences.mean(axis=0)
        if c.clip:
            gradient = clip_norm(gradient, float(np.sqrt(len(gradient))))
        if c.momentum:
            self._momentum = c.momentum * self._momentum + gradient
            gradient = gradient + c.momentum * self._momentum
        step_size = c.step_size / (self._step + c.step_offset) ** c.step_decay  # a_k
        self._point = self._point - step_size * gradient
        self._step += 1
        self._perturbations = self._draw(self._rng)

    def recommend(self) -> F64:
        return np.array(self._point)

    def state(self) -> State:
        arrays = {
            "point": self._point.copy(),
            "perturbations": self._perturbations.copy(),
            "momentum": self._momentum.copy(),
        }
        return arrays, {"step": self._step, "generator": generator_to_json(self._rng)}

    def restore(self, state: State) -> None:
        saved, dim = Saved(state), len(self._point)
        self._point = saved.f64("point", dim)
        self._perturbations = p = saved.f64("perturbations", self._config.n_pairs, dim)
        saved.require(bool((np.abs(p) >= 0.5).all()), "perturbations", "magnitudes of at least 0.5")
        self._momentum = saved.f64("momentum", dim)
        self._step = saved.count("step", 1)
        self._rng = saved.generator()


def clip_norm(gradient: F64, limit: float) -> F64:
    """Return `gradient` clipped to norm `limit` (√δ in ZIP, section 4.3)."""
    norm = float(np.linalg.norm(gradient))
    return np.asarray(gradient * (limit / norm) if norm >= limit else gradient)

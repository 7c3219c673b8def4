"""One-sided finite differences along random unit directions (random gradient-free method).

Source: Nesterov and Spokoiny 2017 for the estimator; Tsai et al. 2020 (BAR, arXiv 2007.08714) for
the averaging and the settings.
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
class RgfConfig:
    """BAR's published settings."""

    step_size: float = 10.0
    """At the first step."""
    last_step_size: float = 0.1
    """After n_steps."""
    step_power: float = 0.9
    perturbation: float = 0.01
    """β: the length of a probe's step."""
    n_directions: int = 5
    """Probes averaged per step; a step costs n_directions + 1 queries."""

    def __post_init__(self) -> None:
        require(self, 1, "n_directions")
        require(self, 0, "step_size", "last_step_size", "step_power", "perturbation", above=True)

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        """Name and value of the probe distance."""
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return self.n_directions + 1

    def step_queries(self) -> int:
        return self.n_directions + 1


class Rgf(Optimizer):
    """w ← w − η_t ĝ with ĝ = (δ/n) Σ_i u_i (L(w + β u_i) − L(w)) / β, ‖u_i‖ = 1.

    η_t = (η_0 − η_T) (1 − t/T)^power + η_T with t from 1, and η_T from T = n_steps on.
    """

    def __init__(self, config: RgfConfig, start: F64, n_steps: int, rng: np.random.Generator):
        if n_steps < 1:
            raise ConfigError(f"n_steps is {n_steps}, expected at least 1")
        self._config = config
        self._point = start.astype(np.float64)
        self._n_steps = n_steps
        self._step = 0  # t − 1
        self._rng = rng
        self._advance()

    def _advance(self) -> None:
        # Directions are five times the size of the point (6 MB for an image's border): the state
        # has their generator's state instead.
        self._drawn_from = generator_to_json(self._rng)
        self._directions = self._draw(self._rng)

    def _draw(self, rng: np.random.Generator) -> F64:
        """Return u f64[n_directions, δ], uniform on the unit sphere."""
        directions = rng.standard_normal((self._config.n_directions, len(self._point)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return directions

    @property
    def _step_size(self) -> float:
        c = self._config
        left = max(0.0, 1 - (self._step + 1) / self._n_steps)
        return float((c.step_size - c.last_step_size) * left**c.step_power + c.last_step_size)

    def ask(self) -> Proposal:
        moves = self._config.perturbation * self._directions
        return Proposal(points=np.concatenate([self._point[None], self._point + moves]))

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        n_rounds = -(-n_directions // self._config.n_directions)
        rounds = []
        for _ in range(n_rounds):
            moved = self._point + self._config.perturbation * self._draw(rng)
            pairs = np.stack([moved, np.broadcast_to(self._point, moved.shape)], axis=1)
            rounds.append(pairs.reshape(-1, len(self._point)))
        return np.stack(rounds)

    def tell(self, evaluation: Evaluation) -> None:
        c = self._config
        differences = (evaluation.losses[1:] - evaluation.losses[0]) / c.perturbation
        gradient = (len(self._point) / c.n_directions) * (differences @ self._directions)
        self._point = self._point - self._step_size * gradient
        self._step += 1
        self._advance()

    def recommend(self) -> F64:
        return np.array(self._point)

    def state(self) -> State:
        return {"point": self._point.copy()}, {"step": self._step, "generator": self._drawn_from}

    def restore(self, state: State) -> None:
        saved = Saved(state)
        self._point = saved.f64("point", len(self._point))
        self._step = saved.count("step")
        self._rng = saved.generator()
        self._advance()

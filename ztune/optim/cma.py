"""Covariance matrix adaptation evolution strategy, with a full or a diagonal covariance.

Equation numbers are those of Hansen's tutorial (arXiv 1604.00772). The separable form is Ros and
Hansen 2008: C stays diagonal, weights are positive only, and it learns (n + 2) / 3 times as fast.
Only the order of the losses matters. The complete loop:

    optimizer = Cma(CmaConfig(sigma=0.5), start, np.random.default_rng(1))
    for _ in range(300):
        optimizer.tell(oracle(to_contexts(optimizer.ask().points), batch))
    best = optimizer.recommend()
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.types import F64, Evaluation, Json, Optimizer, Proposal, State

COVARIANCES = ("full", "separable")
KEEPS = ("best", "mean")
_RESAMPLINGS = 100
"""Draws outside the bound before a candidate is clipped."""
_LEAST = 1e-8
"""Keeps the denominators of (46) and (52) above zero."""
_SIGMAS = 1e-32, 1e32
_MOST_GROWTH = 200.0  # more than the range of sigmas, and exp does not overflow
"""Limits of σ, which grows without end on an unbounded slope; squares must not overflow."""
# Limits of a covariance: bytes of its matrices, and hours of its eigendecompositions, at some 10¹⁰
# operations per second on a core of 2026.
_MOST_BYTES, _MOST_HOURS, _OPERATIONS_A_SECOND = 4e9, 5, 1e10


@dataclass(frozen=True)
class CmaConfig:
    """The tutorial's defaults."""

    population: int | None = None
    """λ, queries per step; None is 4 + ⌊3 ln n⌋ (48)."""
    sigma: float = 1.0
    """Initial σ."""
    covariance: str = "full"
    """`full`, or `separable` for n too large for n² values (see `cost_of`)."""
    keep: str = "best"
    """The recommendation: `best`, the first candidate of the lowest loss so far, or `mean`."""
    bound: float | None = None
    """Candidates stay in [−bound, bound]^n."""

    _keeps: ClassVar[tuple[str, ...]] = KEEPS

    def __post_init__(self) -> None:
        # Three leave one parent, with a rank-μ rate (58) of zero.
        require(self, 4, "population")
        require(self, 0, "sigma", "bound", above=True)
        if self.covariance not in COVARIANCES:
            raise ConfigError(
                f'covariance is "{self.covariance}", expected one of {", ".join(COVARIANCES)}'
            )
        if self.keep not in self._keeps:
            raise ConfigError(f'keep is "{self.keep}", expected one of {", ".join(self._keeps)}')

    def queries_per_step(self, dim: int) -> int:
        """Return λ."""
        return default_population(dim) if self.population is None else self.population


def default_population(dim: int) -> int:
    """Return λ = 4 + ⌊3 ln n⌋ (48)."""
    return 4 + math.floor(3 * math.log(dim))


@dataclass(frozen=True)
class Cost:
    """The cost of CMA-ES without the forward passes."""

    bytes: float
    """Peak memory."""
    flops: float
    """Per generation."""


def cost_of(dim: int, covariance: str, population: int | None = None) -> Cost:
    """Return an estimate, good to a factor of two, for rejecting infeasible sizes."""
    n, size = float(dim), default_population(dim) if population is None else population
    samples = 3 * size * n  # z, y and x
    if covariance == "separable":
        return Cost(8 * (samples + 8 * n), 12 * size * n)
    # C, B, B·D, and the eigendecomposition's copy and 2 n² of work space. It takes about 9 n³
    # operations, C from B and D another 2 n³.
    return Cost(8 * (6 * n**2 + samples), 11 * n**3 + 8 * size * n**2)


def own_seconds(covariance: str, dim: int, population: int, n_generations: int) -> float:
    """Return the approximate seconds of so many generations without the forward passes."""
    cost = cost_of(dim, covariance, population)
    return cost.flops * max(1, n_generations) / _OPERATIONS_A_SECOND


def check_reach(covariance: str, dim: int, population: int, n_generations: int) -> None:
    """Check that CMA-ES of this size is feasible.

    Raises: ConfigError with the required memory and time.
    """
    n_bytes = cost_of(dim, covariance, population).bytes
    hours = own_seconds(covariance, dim, population, n_generations) / 3600
    if n_bytes > _MOST_BYTES or hours > _MOST_HOURS:
        raise ConfigError(
            f"CMA-ES with a {covariance} covariance of {dim} values takes "
            f"{n_bytes / 1e9:.1f} GB and some {hours:.0f} hours for {n_generations} generations, "
            "too much (use fewer values, or a separable covariance if available)"
        )


@dataclass(frozen=True)
class _Rates:
    """Weights and learning rates, which depend on n and λ only."""

    weights: F64
    """w f64[λ], from the best candidate on; the first μ are positive and sum to 1."""
    mu: int
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float

    @staticmethod
    def of(n: int, size: int, covariance: str) -> _Rates:
        mu = size // 2
        full = covariance == "full"
        middle = (size + 1) / 2 if full else mu + 1
        raw = math.log(middle) - np.log(np.arange(1, size + 1))  # (49)
        good, bad = raw[:mu], raw[mu:]
        mu_eff = float(good.sum() ** 2 / (good**2).sum())
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)  # (57), α_cov = 2
        if full:
            # (58) as in the tutorial's edition of 2016.
            c_mu = 2 * (mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff)
            c_mu = min(1 - c_1 - _LEAST, c_mu)
            mu_eff_bad = float(bad.sum() ** 2 / (bad**2).sum())
            alpha = min(
                1 + c_1 / c_mu,  # (50)
                1 + 2 * mu_eff_bad / (mu_eff + 2),  # (51)
                (1 - c_1 - c_mu) / (n * c_mu),  # (52)
            )
            bad = bad * (alpha / np.abs(raw[raw < 0]).sum())
            c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # (55)
            c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)  # (56)
        else:
            bad = np.zeros_like(bad)
            rank_one = 2 / (mu_eff * (n + math.sqrt(2)) ** 2)
            rank_mu = min(1.0, (2 * mu_eff - 1) / ((n + 2) ** 2 + mu_eff))
            c_mu = (n + 2) / 3 * (rank_one + (1 - 1 / mu_eff) * rank_mu)
            # With few values and many candidates the rate exceeds 1, and C becomes negative.
            c_mu = min(1 - c_1, c_mu)
            c_sigma = (mu_eff + 2) / (n + mu_eff + 3)
            c_c = 4 / (n + 4)
        d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma  # (55)
        weights = np.concatenate([good / good.sum(), bad])  # (53)
        return _Rates(weights, mu, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu)


class Cma(Optimizer):
    """x_k ~ N(m, σ² C), where m, σ and C are updated from the moves of the better half."""

    def __init__(self, config: CmaConfig, start: F64, rng: np.random.Generator):
        n = len(start)
        if config.bound is not None and np.abs(start).max() > config.bound:
            raise ConfigError(
                f"bound is {config.bound}, expected at least the start's {np.abs(start).max():g}"
            )
        self._config = config
        self._rng = rng
        self._rates = _Rates.of(n, config.queries_per_step(n), config.covariance)
        self._chi_n = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # E‖N(0, I)‖
        self._mean = start.astype(np.float64)
        self._sigma = config.sigma
        # C = B D² Bᵀ is stored as its eigendecomposition; B is I in the separable form.
        self._D = np.ones(n)
        self._B = np.eye(n) if config.covariance == "full" else None
        self._p_sigma = np.zeros(n)
        self._p_c = np.zeros(n)
        self._generation = 0
        self._best = self._mean.copy()
        self._best_loss: float | None = None
        self._points = self._sample()

    def _stretch(self, z: F64) -> F64:
        """Return y = B D z for each row of z: N(0, C) from N(0, I) (39)."""
        y = z * self._D
        return y if self._B is None else np.asarray(y @ self._B.T)

    def _whiten(self, y: F64) -> F64:
        """Return C^(−1/2) y = B D⁻¹ Bᵀ y for each row of y."""
        if self._B is None:
            return np.asarray(y / self._D)
        return np.asarray(((y @ self._B) / self._D) @ self._B.T)

    def _sample(self) -> F64:
        """Return x f64[λ, n] (38–40)."""
        shape = len(self._rates.weights), len(self._mean)
        bound = self._config.bound
        if bound is None:
            z = self._rng.standard_normal(shape)
            return np.asarray(self._mean + self._sigma * self._stretch(z))
        points = np.empty(shape)
        for x in points:
            for _ in range(_RESAMPLINGS + 1):
                z = self._rng.standard_normal((1, shape[1]))
                x[:] = self._mean + self._sigma * self._stretch(z)[0]
                if np.abs(x).max() <= bound:
                    break
        return points.clip(-bound, bound)

    def draw(self) -> F64:
        """Return another population f64[λ, n], which is not evaluated."""
        return self._sample()

    def ask(self) -> Proposal:
        return Proposal(points=self._points.copy())

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        n_pairs = self._rates.mu
        rounds = []
        for _ in range(-(-n_directions // n_pairs)):
            z = rng.standard_normal((n_pairs, len(self._mean)))
            moves = self._sigma * self._stretch(z)
            pairs = np.stack([self._mean + moves, self._mean - moves], axis=1)
            rounds.append(pairs.reshape(-1, len(self._mean)))
        return np.stack(rounds)

    def tell(self, evaluation: Evaluation) -> None:
        """Take one loss per point, measured at it or, in SharpZO, near it."""
        losses, size = evaluation.losses, len(self._points)
        if len(losses) != size:
            raise ValueError(f"got {len(losses)} losses, expected {size}")
        order = np.argsort(losses, kind="stable")
        least = float(losses[order[0]])
        if self._best_loss is None or least < self._best_loss:
            self._best, self._best_loss = self._points[order[0]].copy(), least
        self._learn((self._points[order] - self._mean) / self._sigma)
        self._points = self._sample()

    def _learn(self, y: F64) -> None:
        """Update m, σ and C from the moves y f64[λ, n], best first."""
        r, n = self._rates, len(self._mean)
        self._generation += 1
        y_w = r.weights[: r.mu] @ y[: r.mu]  # (41)
        self._mean = self._mean + self._sigma * y_w  # (42), c_m = 1 (54)

        whitened = self._whiten(np.concatenate([y_w[None], y]))
        gain = math.sqrt(r.c_sigma * (2 - r.c_sigma) * r.mu_eff)
        self._p_sigma = (1 - r.c_sigma) * self._p_sigma + gain * whitened[0]  # (43)
        length = float(np.linalg.norm(self._p_sigma))
        growth = min(r.c_sigma / r.d_sigma * (length / self._chi_n - 1), _MOST_GROWTH)
        sigma = self._sigma * math.exp(growth)  # (44)

        # While the path is too long, σ already grows, so C ignores the path.
        convergence = math.sqrt(1 - (1 - r.c_sigma) ** (2 * (self._generation + 1)))
        h_sigma = float(length / convergence < (1.4 + 2 / (n + 1)) * self._chi_n)
        gain = h_sigma * math.sqrt(r.c_c * (2 - r.c_c) * r.mu_eff)
        self._p_c = (1 - r.c_c) * self._p_c + gain * y_w  # (45)
        lengths = (whitened[1:] ** 2).sum(axis=1)
        weights = np.where(r.weights >= 0, r.weights, r.weights * n / (lengths + _LEAST))  # (46)
        missed = (1 - h_sigma) * r.c_c * (2 - r.c_c)
        keep = 1 + r.c_1 * missed - r.c_1 - r.c_mu * r.weights.sum()
        if self._B is None:
            C = keep * self._D**2 + r.c_1 * self._p_c**2 + r.c_mu * (weights @ y**2)  # (47)
            self._D = _roots(C)
        else:
            C = keep * ((self._B * self._D**2) @ self._B.T)  # (47)
            C += r.c_1 * np.outer(self._p_c, self._p_c)
            C += r.c_mu * ((y.T * weights) @ y)
            values, self._B = np.linalg.eigh((C + C.T) / 2)
            self._D = _roots(values)
        self._sigma = min(max(sigma, _SIGMAS[0]), _SIGMAS[1])

    def recommend(self) -> F64:
        return np.array(self._best if self._config.keep == "best" else self._mean)

    def state(self) -> State:
        arrays = {name: getattr(self, f"_{name}").copy() for name in self._arrays()}
        values: dict[str, Json] = {
            "sigma": self._sigma,
            "generation": self._generation,
            "best_loss": self._best_loss,
            "generator": generator_to_json(self._rng),
        }
        return arrays, values

    def restore(self, state: State) -> None:
        saved = Saved(state)
        for name in self._arrays():
            setattr(self, f"_{name}", saved.f64(name, *getattr(self, f"_{name}").shape))
        saved.require(bool((self._D > 0).all()), "D", "positive values")
        if self._B is not None:
            error = float(np.abs(self._B @ self._B.T - np.eye(len(self._B))).max())
            saved.require(error < 1e-6, "B", "orthonormal columns")
        self._sigma = saved.number("sigma", *_SIGMAS)
        self._generation = saved.count("generation")
        self._best_loss = None if saved.is_null("best_loss") else saved.number("best_loss")
        self._rng = saved.generator()

    def _arrays(self) -> tuple[str, ...]:
        # B is saved too: eigenvectors of equal eigenvalues are not unique and may depend on the
        # number of threads.
        names = ("mean", "D", "p_sigma", "p_c", "best", "points")
        return names if self._B is None else (*names, "B")


def _roots(values: F64) -> F64:
    """Return √values, with values that rounding made non-positive clipped."""
    return np.asarray(np.sqrt(np.maximum(values, np.finfo(np.float64).eps * values.max())))

"""A sharpness-aware evolution strategy as warm-up, then sparse zeroth-order steps.

Source: Yang et al. 2025 (SharpZO, arXiv 2506.20990). Where the published code differs, the paper is
followed; preset `published-code` follows the code. docs/methods.md lists the differences.

Coordinate-wise differences are many points (1,024 at 512 values), evaluated in chunks on the same
images: calls have bounded memory, and a run can be saved between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.maps import LinearContext
from ztune.methods.base import MAP, STEPS, Composition, ModelSpec, Preset, TextStart, TunedMethod
from ztune.optim.cma import Cma, CmaConfig, check_reach, own_seconds
from ztune.optim.nested import put_state
from ztune.optim.validation import Patience
from ztune.types import F64, I64, Evaluation, Json, Optimizer, Proposal, State


@dataclass(frozen=True)
class SharpZoConfig(TextStart):
    """The paper's settings; the paper chooses σ and T_c per data set."""

    intrinsic_dim: int = 512
    projection_std: float = 1.0
    """Standard deviation of the projection's entries; published as 1 or 0.2, by data set."""
    population: int = 40
    sigma: float = 0.4
    """σ of the warm-up's CMA-ES, 0.1 to 1 in the paper."""
    bound: float | None = 5.0
    """Candidates of the warm-up stay in [−bound, bound]^δ before they are perturbed; None: free."""
    radius: float = 0.1
    """ρ: the length of the perturbation towards higher losses."""
    smoothing: float = 1e-3
    """µ: half the distance of a difference's two points."""
    warmup_steps: int = 100
    """T_c, 100 to 500 in the paper."""
    warmup_patience: int | None = None
    """Validations without a gain that end the warm-up early (10 in the paper), at one more query
    per step; None: never."""
    warmup_gain: float = 0.01
    """The minimum gain in validation accuracy."""
    step_size: float = 1e-3
    """η of the sparse steps."""
    prune_every: int | None = 200
    """K: sparse steps between prunings; None: no pruning, and no differences for it."""
    keep_fraction: float = 0.5
    """Fraction of coordinates kept by a pruning."""
    differences_at: str = "mean"
    """Where the warm-up measures differences and ends: at the `mean` of CMA-ES, or, as in the
    published code, at the mean of a `population` that is drawn and not evaluated."""
    copies: int = 1
    """Copies of the point whose mean counts, 40 in the published code: ρ, and the random directions
    of the later steps, shrink by √copies."""
    sum_steps: bool = False
    """Later steps follow the sum of the warm-up's last g and all estimates since, as in the
    published code, which never resets it."""
    probes_per_call: int = 32
    """Points of coordinate-wise differences in one proposal; even."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "intrinsic_dim", "warmup_patience", "prune_every", "copies")
        require(self, 0, "projection_std", "sigma", "bound", "smoothing", "step_size", above=True)
        require(self, 0, "radius", "warmup_steps", "warmup_gain")
        require(self, 4, "population")
        if not 0 < self.keep_fraction <= 1:
            raise ConfigError(f"keep_fraction is {self.keep_fraction}, expected in (0, 1]")
        if self.differences_at not in ("mean", "population"):
            raise ConfigError(
                f'differences_at is "{self.differences_at}", expected mean or population'
            )
        if self.probes_per_call < 2 or self.probes_per_call % 2:
            raise ConfigError(
                f"probes_per_call is {self.probes_per_call}, expected an even number of at least 2"
            )

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        return "smoothing", self.smoothing

    @property
    def round_size(self) -> int:
        return max(self.population, self.probes_per_call)

    def step_queries(self) -> int:
        """Return 2 δ + λ, plus one if a validation follows: 1,064 by default."""
        return 2 * self.intrinsic_dim + self.population + (self.warmup_patience is not None)

    @property
    def validates(self) -> bool:
        return self.warmup_patience is not None

    def _generations(self, queries: int) -> int:
        return min(self.warmup_steps, queries // self.step_queries())

    def own_seconds(self, queries: int) -> float:
        n_generations = self._generations(queries)
        return own_seconds("full", self.intrinsic_dim, self.population, n_generations)

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        check_reach("full", self.intrinsic_dim, self.population, self._generations(queries))
        rng = np.random.default_rng([seed, MAP])
        initial = self.initial(spec, seed)
        prompt_map = LinearContext(initial, self.intrinsic_dim, self.projection_std, rng)
        steps = np.random.default_rng([seed, STEPS])
        return prompt_map, SharpZo(self, prompt_map.start(), steps)


# The purpose of the next proposal.
_DIFFERENCES, _POPULATION, _VALIDATION, _PAIR = "differences", "population", "validation", "pair"


class SharpZo(Optimizer):
    """Warm-up: CMA-ES on L(x_i + ε*), ε* = ρ g / ‖g‖, with g of coordinate-wise central differences
    at its mean; it takes the losses as those of x_i.

    Then, from its mean: w ← w − η ĝ, ĝ = (L(w + µu) − L(w − µu)) / 2µ · u, u ~ N(0, I) on the
    coordinates kept. They are chosen first and every K steps by the highest w² · zscore(g²).
    """

    def __init__(self, config: SharpZoConfig, start: F64, rng: np.random.Generator):
        self._config = config
        self._rng = rng
        dim = len(start)
        # CMA-ES has its own generator, so that both states can be saved separately.
        seed = int(rng.integers(2**63))
        self._cma: Cma | None = self._new_cma(start, np.random.default_rng(seed))
        self._patience = (
            None
            if config.warmup_patience is None
            else Patience(config.warmup_patience, config.warmup_gain)
        )
        self._point = start.astype(np.float64)  # the CMA mean, then w
        self._slopes = np.zeros(dim)  # g, as far as measured
        self._n_slopes = 0
        self._kept = np.ones(dim)
        self._direction = np.zeros(dim)  # u
        self._sum = np.zeros(dim)  # with sum_steps
        self._step = 0  # of the stage
        self._purpose = _DIFFERENCES
        if config.warmup_steps == 0:
            self._end_warmup()

    def _new_cma(self, start: F64, rng: np.random.Generator) -> Cma:
        c = self._config
        return Cma(CmaConfig(c.population, c.sigma, "full", "mean", c.bound), start, rng)

    def _coordinate_pairs(self, coordinates: range | I64) -> F64:
        """Return f64[2 n, δ]: the point moved by +µ, then −µ, along each coordinate."""
        index = np.asarray(coordinates, dtype=np.int64)
        points = np.repeat(self._point[None], 2 * len(index), axis=0)
        pair = np.arange(len(index))
        points[2 * pair, index] += self._config.smoothing
        points[2 * pair + 1, index] -= self._config.smoothing
        return points

    @property
    def _next_coordinates(self) -> range:
        last = self._n_slopes + self._config.probes_per_call // 2
        return range(self._n_slopes, min(last, len(self._point)))

    def ask(self) -> Proposal:
        if self._purpose == _DIFFERENCES:
            points = self._coordinate_pairs(self._next_coordinates)
            mid_step = self._n_slopes > 0
            return Proposal(points, same_batch=mid_step, mid_step=mid_step)
        if self._purpose == _VALIDATION:
            return Proposal(self.recommend()[None], validation=True)
        if self._cma is not None:
            radius = self._config.radius / math.sqrt(self._config.copies)
            points = self._cma.ask().points + radius * unit(self._slopes)  # ε*
            return Proposal(points, same_batch=True, mid_step=True)
        move = self._config.smoothing * self._direction
        return Proposal(np.stack([self._point + move, self._point - move]))

    def tell(self, evaluation: Evaluation) -> None:
        if self._purpose == _DIFFERENCES:
            self._take_differences(evaluation.losses)
        elif self._purpose == _POPULATION:
            self._take_population(evaluation)
        elif self._purpose == _VALIDATION:
            self._take_validation(float(evaluation.accuracies[0]))
        else:
            self._take_pair(evaluation.losses)

    def _take_differences(self, losses: F64) -> None:
        coordinates = self._next_coordinates
        plus, minus = losses.reshape(len(coordinates), 2).T
        self._slopes[coordinates.start : coordinates.stop] = (plus - minus) / (
            2 * self._config.smoothing
        )
        self._n_slopes = coordinates.stop
        if self._n_slopes < len(self._point):
            return
        if self._cma is not None:
            self._purpose = _POPULATION
            return
        self._kept = kept(self._point, self._slopes, self._config.keep_fraction)
        self._begin_pair()

    def _begin_differences(self) -> None:
        self._purpose = _DIFFERENCES
        self._slopes = np.zeros_like(self._slopes)
        self._n_slopes = 0

    def _begin_pair(self) -> None:
        self._purpose = _PAIR
        u = self._rng.standard_normal(len(self._point)) / math.sqrt(self._config.copies)
        self._direction = self._kept * u

    def _take_population(self, evaluation: Evaluation) -> None:
        assert self._cma is not None
        self._cma.tell(evaluation)
        self._point = self._cma.recommend()
        if self._config.differences_at == "population":
            self._point = self._cma.draw().mean(axis=0)
        self._step += 1
        if self._patience is not None:
            self._purpose = _VALIDATION
        else:
            self._end_warmup_step()

    def _take_validation(self, accuracy: float) -> None:
        assert self._patience is not None
        self._patience.see(accuracy)
        self._end_warmup_step()

    def _end_warmup_step(self) -> None:
        tired = self._patience is not None and self._patience.exhausted
        if tired or self._step >= self._config.warmup_steps:
            self._end_warmup()
        else:
            self._begin_differences()

    def _end_warmup(self) -> None:
        self._cma = None
        self._step = 0
        if self._config.sum_steps:
            self._sum = self._slopes.copy()
        self._begin_step()

    def _begin_step(self) -> None:
        every = self._config.prune_every
        if every is not None and self._step % every == 0:
            self._begin_differences()
        else:
            self._begin_pair()

    def _take_pair(self, losses: F64) -> None:
        c = self._config
        difference = float(losses[0] - losses[1]) / (2 * c.smoothing)
        estimate = difference * self._direction
        if c.sum_steps:
            self._sum = estimate = self._sum + estimate
        self._point = self._point - c.step_size * estimate
        self._step += 1
        self._begin_step()

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        """Return rounds of coordinate-wise pairs, which have the smallest differences."""
        dim = len(self._point)
        n_pairs = min(self._config.probes_per_call // 2, dim)
        rounds = range(-(-n_directions // n_pairs))
        chosen = [rng.choice(dim, n_pairs, replace=False) for _ in rounds]
        return np.stack([self._coordinate_pairs(coordinates) for coordinates in chosen])

    def recommend(self) -> F64:
        return np.array(self._point)

    def state(self) -> State:
        arrays = {
            "point": self._point.copy(),
            "slopes": self._slopes.copy(),
            "kept": self._kept.copy(),
            "direction": self._direction.copy(),
        }
        if self._config.sum_steps:
            arrays["sum"] = self._sum.copy()
        values: dict[str, Json] = {
            "n_slopes": self._n_slopes,
            "step": self._step,
            "purpose": self._purpose,
            "generator": generator_to_json(self._rng),
        }
        if self._patience is not None:
            values["patience"] = self._patience.to_json()
        if self._cma is not None:
            inner_arrays, inner_values = put_state("cma", self._cma.state())
            return arrays | inner_arrays, values | inner_values
        return arrays, values

    def restore(self, state: State) -> None:
        saved, dim = Saved(state), len(self._point)
        self._cma = None
        purposes = [_DIFFERENCES, _PAIR]
        if saved.has_inner("cma"):
            self._cma = self._new_cma(np.zeros_like(self._point), np.random.default_rng(0))
            self._cma.restore(saved.inner("cma").state)
            purposes = [_DIFFERENCES, _POPULATION]
        if self._patience is not None:
            self._patience.restore(saved.inner("patience"))
            purposes += [] if self._cma is None else [_VALIDATION]
        self._point, self._slopes = saved.f64("point", dim), saved.f64("slopes", dim)
        self._kept, self._direction = saved.f64("kept", dim), saved.f64("direction", dim)
        saved.require(bool(np.isin(self._kept, (0, 1)).all()), "kept", "zeros and ones")
        if self._config.sum_steps:
            self._sum = saved.f64("sum", dim)
        self._step = saved.count("step")
        self._purpose = saved.choice("purpose", purposes)
        most = dim - 1 if self._purpose == _DIFFERENCES else dim
        self._n_slopes = saved.count("n_slopes", most=most)
        self._rng = saved.generator()


def _scaled(vector: F64) -> F64:
    """Return `vector` scaled to a largest magnitude of 1, so that squares do not overflow."""
    largest = float(np.abs(vector).max())
    return np.asarray(vector / largest if largest > 0 else vector)


def unit(vector: F64) -> F64:
    """Return vector / ‖vector‖, or zero for zero."""
    scaled = _scaled(vector)
    norm = float(np.linalg.norm(scaled))
    return scaled / norm if norm > 0 else scaled


def kept(point: F64, slopes: F64, fraction: float) -> F64:
    """Return the mask f64[δ] of the coordinates with the highest w² · zscore(g²).

    Ties, such as for w = 0 or equal slopes, are broken by g², then by index.
    """
    squares = _scaled(slopes) ** 2
    deviations = squares - squares.mean()
    spread = float(np.sqrt((deviations**2).mean()))
    # Equal slopes would leave only rounding errors as scores.
    zscores = deviations / spread if spread > 1e-12 else np.zeros_like(squares)
    scores = _scaled(point) ** 2 * zscores
    best_first = np.lexsort((-squares, -scores))
    mask = np.zeros(len(point))
    mask[best_first[: max(1, round(fraction * len(point)))]] = 1.0
    return mask


METHOD = TunedMethod(
    name="sharpzo",
    title="sharpness-aware CMA-ES, then sparse zeroth-order steps on a projected context",
    paper="SharpZO, NeurIPS 2025 (arXiv 2506.20990)",
    config=SharpZoConfig,
    presets={
        # The published script and its logged run, which prune nothing.
        "published-code": Preset(
            {
                "prune_every": None,
                "differences_at": "population",
                "copies": 40,
                "sum_steps": True,
            },
            views=1,
            least_area=0.5,
        ),
        "tuned": Preset({"warmup_steps": 1, "prune_every": 2000, "step_size": 0.01}),
    },
)

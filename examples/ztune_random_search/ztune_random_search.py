"""Random search on a context's own values.

Each round sends the best point so far with random neighbours, on the same images, and moves to the
best of them. The radius grows after a success and shrinks after a failure, as in a (1+λ) evolution
strategy (Rechenberg 1973).
"""

from dataclasses import dataclass

import numpy as np

from ztune.io.config import require
from ztune.maps import DirectContext
from ztune.methods.base import Composition, ModelSpec, TextStart, TunedMethod
from ztune.types import F64, Evaluation, Optimizer, Proposal, State


@dataclass(frozen=True)
class RandomSearchConfig(TextStart):
    """Settings chosen for the example: no paper tunes prompts so."""

    n_neighbours: int = 9
    radius: float = 0.1
    """Standard deviation of a neighbour's values around the best point, at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "n_neighbours")
        require(self, 0, "radius", above=True)

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        return "radius", self.radius

    @property
    def round_size(self) -> int:
        return self.n_neighbours + 1

    def step_queries(self) -> int:
        return self.round_size

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(spec, seed))
        return prompt_map, RandomSearch(self, prompt_map.start(), seed)


class RandomSearch(Optimizer):
    """w ← the best of w and w + radius · N(0, I), n_neighbours times."""

    def __init__(self, config: RandomSearchConfig, start: F64, seed: int):
        self._n, self._seed = config.n_neighbours, seed
        self._point, self._radius, self._round = start, config.radius, 0

    def _neighbours(self, n: int, rng: np.random.Generator) -> F64:
        return self._point + self._radius * rng.standard_normal((n, len(self._point)))

    def ask(self) -> Proposal:
        drawn = self._neighbours(self._n, np.random.default_rng([self._seed, self._round]))
        return Proposal(np.concatenate([self._point[None], drawn]))

    def tell(self, evaluation: Evaluation) -> None:
        best = int(evaluation.losses.argmin())
        self._point = self.ask().points[best]
        self._radius *= 1.2 if best else 0.8
        self._round += 1

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        drawn = self._neighbours(n_directions, rng)
        return np.stack([np.stack([one, self._point]) for one in drawn])

    def recommend(self) -> F64:
        return self._point.copy()

    def state(self) -> State:
        return {"point": self._point.copy()}, {"radius": self._radius, "round": self._round}

    def restore(self, state: State) -> None:
        self._point = np.array(state[0]["point"])
        self._radius, self._round = float(str(state[1]["radius"])), int(str(state[1]["round"]))


METHOD = TunedMethod(
    name="random-search",
    title="random search on the context's own values",
    paper="Rechenberg 1973",
    config=RandomSearchConfig,
)

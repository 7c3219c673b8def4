"""Methods that evaluate a population: CMA-ES on projected contexts and tokens, and SharpZO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ztune.access import CONTEXTS, IMAGE_TOKENS, LOSS, PIXELS
from ztune.artifact import MOST_TOKENS
from ztune.compositions.base import (
    MAP,
    STEPS,
    Composition,
    Defaults,
    ModelSpec,
    TextStart,
    part_of,
    require_at_least_one,
)
from ztune.errors import ConfigError
from ztune.maps.context import LinearContext
from ztune.maps.visual import LinearTokens, TextAndImage
from ztune.optim.cma import Cma, CmaConfig, cost_of, default_population
from ztune.optim.sharpzo import SharpZo, SharpZoConfig
from ztune.types import F64, PromptMap

# Beyond these a full covariance is refused: bytes of its matrices, and hours of its
# eigendecompositions, of which a core of 2026 does some 10¹⁰ operations in a second.
_MOST_BYTES, _MOST_HOURS, _OPERATIONS_A_SECOND = 4e9, 5, 1e10


def _cma_seconds(covariance: str, dim: int, population: int, n_generations: int) -> float:
    cost = cost_of(dim, covariance, population)
    return cost.flops * max(1, n_generations) / _OPERATIONS_A_SECOND


def _check_reach(covariance: str, dim: int, population: int, n_generations: int) -> None:
    """Refuse a size of CMA-ES that would not come to an end.

    Raises: ConfigError saying what it would take.
    """
    n_bytes = cost_of(dim, covariance, population).bytes
    hours = _cma_seconds(covariance, dim, population, n_generations) / 3600
    if n_bytes > _MOST_BYTES or hours > _MOST_HOURS:
        raise ConfigError(
            f"CMA-ES with a {covariance} covariance of {dim} values takes "
            f"{n_bytes / 1e9:.1f} GB and some {hours:.0f} hours for {n_generations} generations, "
            "out of reach here (use fewer values, or a separable covariance where there is one)"
        )


@dataclass(frozen=True)
class Generations(CmaConfig, ABC):
    """CMA-ES: every round is a generation of candidates."""

    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "batch_size")
        if self.keep == "best" and self.batch_size is not None:
            raise ConfigError(
                "keep=best compares losses over all images: leave out batch_size, or set keep=mean"
            )

    @property
    @abstractmethod
    def n_values(self) -> int:
        """How many values are optimised."""

    @property
    def finest(self) -> tuple[str, float]:
        return "sigma", self.sigma

    @property
    def round_size(self) -> int:
        return self.population or default_population(self.n_values)

    def step_queries(self) -> int:
        return self.round_size

    def own_seconds(self, queries: int) -> float:
        size = self.round_size
        return _cma_seconds(self.covariance, self.n_values, size, queries // size)

    def check_reach(self, queries: int) -> None:
        """Refuse a size that would not come to an end, before anything of that size is made."""
        size = self.round_size
        _check_reach(self.covariance, self.n_values, size, queries // size)

    def cma(self, start: F64, seed: int) -> Cma:
        return Cma(part_of(CmaConfig, self), start, np.random.default_rng([seed, STEPS]))


@dataclass(frozen=True)
class TextCmaConfig(Generations, TextStart):
    """A projected context by CMA-ES, as in black-box tuning (BBT, ICML 2022)."""

    intrinsic_dim: int = 500
    population: int | None = 20

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        Generations.__post_init__(self)
        require_at_least_one(self, "intrinsic_dim")

    @property
    def n_values(self) -> int:
        return self.intrinsic_dim

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        self.check_reach(queries)
        std = towers.token_std / np.sqrt(self.intrinsic_dim)
        rng = np.random.default_rng([seed, MAP])
        prompt_map = LinearContext(self.initial(towers, seed), self.intrinsic_dim, std, rng)
        return prompt_map, self.cma(prompt_map.start(), seed)


@dataclass(frozen=True)
class BptVlmConfig(Generations, Defaults):
    """BPT-VLM (IJCAI 2023) with the settings of its comparison in ZIP (arXiv 2504.06838)."""

    part: str = "both"
    """text, vision or both."""
    n_context: int = 5
    n_tokens: int = 5
    """Extra image tokens, after the patches."""
    text_dim: int = 2000
    vision_dim: int = 2000
    population: int | None = 15
    covariance: str = "separable"
    """The full one takes minutes a generation at 4,000 values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in ("text", "vision", "both"):
            raise ConfigError(f'part is "{self.part}", expected text, vision or both')
        require_at_least_one(self, "n_context", "n_tokens", "text_dim", "vision_dim")
        if self.n_tokens > MOST_TOKENS:
            raise ConfigError(f"n_tokens is {self.n_tokens}, expected at most {MOST_TOKENS}")

    @property
    def needs(self) -> frozenset[str]:
        text = () if self.part == "vision" else (CONTEXTS,)
        image = () if self.part == "text" else (PIXELS, IMAGE_TOKENS)
        return frozenset((LOSS, *text, *image))

    @property
    def program(self) -> str | None:
        return None if self.part == "text" else "tokens"

    @property
    def n_values(self) -> int:
        text = 0 if self.part == "vision" else self.text_dim
        return text + (0 if self.part == "text" else self.vision_dim)

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        self.check_reach(queries)
        text, image = np.random.default_rng([seed, MAP]).spawn(2)
        maps: list[PromptMap] = []
        if self.part != "vision":
            no_prompt = np.zeros((self.n_context, towers.text_width), dtype=np.float32)
            std = towers.token_std / np.sqrt(self.text_dim)
            maps.append(LinearContext(no_prompt, self.text_dim, std, text))
        if self.part != "text":
            patches = towers.patches
            if patches is None:
                raise ConfigError("the image tower takes no extra tokens")
            ratio = patches.n_values / self.vision_dim
            mean, std = patches.mean * ratio, patches.std * np.sqrt(ratio)
            width = patches.width
            maps.append(LinearTokens(self.n_tokens, width, self.vision_dim, mean, std, image))
        prompt_map = TextAndImage(*maps) if len(maps) == 2 else maps[0]
        return prompt_map, self.cma(np.zeros(prompt_map.dim), seed)


@dataclass(frozen=True)
class SharpZoMethodConfig(TextStart, SharpZoConfig):
    """SharpZO (arXiv 2506.20990): sharpness-aware CMA-ES, then sparse zeroth-order steps."""

    intrinsic_dim: int = 512
    projection_std: float = 1.0
    """Of the fixed projection's entries; published as 1 or 0.2, by data set."""

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        SharpZoConfig.__post_init__(self)
        require_at_least_one(self, "intrinsic_dim")
        if not self.projection_std > 0:
            raise ConfigError(f"projection_std is {self.projection_std}, expected more than 0")

    @property
    def finest(self) -> tuple[str, float]:
        return "smoothing", self.smoothing

    @property
    def round_size(self) -> int:
        return max(self.population, self.probes_per_call)

    def step_queries(self) -> int:
        return self.queries_per_warmup_step(self.intrinsic_dim)

    @property
    def validates(self) -> bool:
        return self.warmup_patience is not None

    def _generations(self, queries: int) -> int:
        return min(self.warmup_steps, queries // self.step_queries())

    def own_seconds(self, queries: int) -> float:
        n_generations = self._generations(queries)
        return _cma_seconds("full", self.intrinsic_dim, self.population, n_generations)

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        n_generations = self._generations(queries)
        _check_reach("full", self.intrinsic_dim, self.population, n_generations)
        rng = np.random.default_rng([seed, MAP])
        initial = self.initial(towers, seed)
        prompt_map = LinearContext(initial, self.intrinsic_dim, self.projection_std, rng)
        steps = np.random.default_rng([seed, STEPS])
        return prompt_map, SharpZo(part_of(SharpZoConfig, self), prompt_map.start(), steps)

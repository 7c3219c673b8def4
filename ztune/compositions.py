"""The tuned methods: each a configuration that composes a map and an optimizer.

A configuration's defaults are the published settings, where a paper has tuned prompts so. What it
needs of a runtime, how many candidates it sends at once and what its first step costs are known
before anything is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np

from ztune.access import CONTEXTS, FEATURES, IMAGE_TOKENS, LOGITS, LOSS, PIXELS
from ztune.errors import ConfigError
from ztune.maps.context import DirectContext, LinearContext
from ztune.maps.visual import LinearTokens, Pixels, TextAndImage
from ztune.maps.zip import ZipMap
from ztune.optim.cma import Cma, CmaConfig, cost_of, default_population
from ztune.optim.rgf import Rgf, RgfConfig
from ztune.optim.sharpzo import SharpZo, SharpZoConfig
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.types import F32, F64, Optimizer, PromptMap

Composition = tuple[PromptMap, Optimizer]
# Streams of a run's seed; 3 draws batches, 4 the signal's probes.
_INITIAL, _MAP, _STEPS = 0, 1, 2


@dataclass(frozen=True)
class Patches:
    """The image tower's patch embedding, where the tower takes extra tokens."""

    width: int
    """Values of a token."""
    n_values: int
    """Pixels of a patch times channels."""
    mean: float
    """Of the patch embedding's weights."""
    std: float


@dataclass(frozen=True)
class Towers:
    """What a method may know of a model before it asks anything."""

    text_width: int
    token_table: F32
    """f32[vocabulary, d], memory-mapped."""
    context_of_words: Callable[[str], F32]
    """The embeddings f32[m, d] of a text's tokens."""
    image_size: int
    decoder_start: Callable[[np.random.Generator], F64]
    """Random initial values of BlackVIP's decoder."""
    patches: Patches | None

    @property
    def token_std(self) -> float:
        """The standard deviation of all token embeddings."""
        parts = np.array_split(self.token_table, max(1, len(self.token_table) // 4096))
        total, squares = 0.0, 0.0
        for part in parts:  # a table of 100 MB is read, not held
            wide = part.astype(np.float64)
            total, squares = total + wide.sum(), squares + (wide**2).sum()
        n = self.token_table.size
        return float(np.sqrt(squares / n - (total / n) ** 2))


class TunedConfig(Protocol):
    """A tuned method's settings, and how they become a map and an optimizer."""

    @property
    def batch_size(self) -> int | None:
        """Pictures of a batch; None: all of them in every round."""

    @property
    def needs(self) -> frozenset[str]:
        """What the runtime must give."""

    @property
    def program(self) -> str | None:
        """What its visual prompt is (border, decoder or tokens); None where it tunes text alone."""

    @property
    def focal(self) -> float:
        """γ of the focal loss; 0 is cross-entropy."""

    @property
    def validates(self) -> bool:
        """Whether the method itself asks for validation passes."""

    @property
    def finest(self) -> tuple[str, float]:
        """The setting that says how far apart two points are whose losses are compared."""

    @property
    def round_size(self) -> int:
        """The most candidates of one call."""

    def step_queries(self) -> int:
        """Return what the first step costs: the least budget."""

    def own_seconds(self, queries: int) -> float:
        """Return roughly what the optimizer's own arithmetic takes, where that is worth a word."""

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        """Return map and optimizer at their start, for a budget of `queries`."""


ConfigType = TypeVar("ConfigType")


def _part(kind: type[ConfigType], whole: Any) -> ConfigType:
    """Return the settings of one part of a method."""
    return kind(**{f.name: getattr(whole, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")


class _Defaults:
    """What most methods have in common."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOSS, CONTEXTS))

    @property
    def program(self) -> str | None:
        return None

    @property
    def focal(self) -> float:
        return 0.0

    @property
    def validates(self) -> bool:
        return False

    def own_seconds(self, queries: int) -> float:
        return 0.0


@dataclass(frozen=True)
class _Text(_Defaults):
    """What is common to methods that tune a context alone."""

    n_context: int = 4
    """m: context tokens at a random start; words given as `init` count themselves."""
    init: str = "a photo of a"
    """`random`: N(0, init_std²); anything else is taken as words."""
    init_std: float = 0.02
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(self, "n_context", "batch_size")

    def initial(self, towers: Towers, seed: int) -> F32:
        """Return the start f32[m, d], shared by all classes."""
        if self.init != "random":
            return towers.context_of_words(self.init)
        rng = np.random.default_rng([seed, _INITIAL])
        noise = rng.standard_normal((self.n_context, towers.text_width))
        return (self.init_std * noise).astype(np.float32)


@dataclass(frozen=True)
class _SpsaSteps(_Text, SpsaConfig):
    """A context moved by simultaneous perturbation."""

    batch_size: int | None = 128

    def __post_init__(self) -> None:
        _Text.__post_init__(self)
        SpsaConfig.__post_init__(self)

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return 2 * self.n_pairs

    def step_queries(self) -> int:
        return 2 * self.n_pairs

    def _steps(self, start: F64, seed: int) -> Spsa:
        return Spsa(_part(SpsaConfig, self), start, np.random.default_rng([seed, _STEPS]))


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
        _at_least_one(self, "rank", "intrinsic_dim")

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        rng = np.random.default_rng([seed, _MAP])
        prompt_map = ZipMap(self.initial(towers, seed), self.intrinsic_dim, self.rank, rng)
        return prompt_map, self._steps(prompt_map.start(), seed)


@dataclass(frozen=True)
class DirectSpsaConfig(_SpsaSteps):
    """The context's own values by plain SPSA (Spall 1992), its decays as Spall 1998 advises."""

    step_decay: float = 0.602
    perturbation_decay: float = 0.101
    clip: bool = False

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(towers, seed))
        return prompt_map, self._steps(prompt_map.start(), seed)


@dataclass(frozen=True)
class SpsaGcConfig(DirectSpsaConfig):
    """The context's own values by SPSA with gradient correction (BlackVIP's optimizer)."""

    step_decay: float = 0.4
    perturbation_decay: float = 0.1
    momentum: float = 0.8


@dataclass(frozen=True)
class DirectRgfConfig(_Text, RgfConfig):
    """The context's own values by random gradient-free steps (Nesterov and Spokoiny 2017).

    No paper tunes prompts so: the step sizes are those of our measurements (docs/methods.md), all
    else is BAR's.
    """

    batch_size: int | None = 128
    step_size: float = 0.1
    last_step_size: float = 0.01

    def __post_init__(self) -> None:
        _Text.__post_init__(self)
        RgfConfig.__post_init__(self)

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return self.n_directions + 1

    def step_queries(self) -> int:
        return self.n_directions + 1

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(towers, seed))
        rng = np.random.default_rng([seed, _STEPS])
        n_steps = queries // self.step_queries()
        return prompt_map, Rgf(_part(RgfConfig, self), prompt_map.start(), n_steps, rng)


# Beyond these a full covariance is refused: bytes of its matrices, and hours of its
# eigendecompositions, of which a core of 2026 does some 10¹⁰ operations in a second.
_MOST_BYTES, _MOST_HOURS, _OPERATIONS_A_SECOND = 4e9, 5, 1e10


def _cma_seconds(config: CmaConfig, dim: int, population: int, queries: int) -> float:
    cost = cost_of(dim, config.covariance, population)
    return cost.flops * max(1, queries // population) / _OPERATIONS_A_SECOND


def _check_reach(config: CmaConfig, dim: int, population: int, queries: int) -> None:
    """Refuse a size of CMA-ES that would not come to an end.

    Raises: ConfigError saying what it would take.
    """
    n_bytes = cost_of(dim, config.covariance, population).bytes
    hours = _cma_seconds(config, dim, population, queries) / 3600
    if n_bytes > _MOST_BYTES or hours > _MOST_HOURS:
        raise ConfigError(
            f"CMA-ES with a {config.covariance} covariance of {dim} values takes "
            f"{n_bytes / 1e9:.1f} GB and some {hours:.0f} hours for {queries} queries, out of "
            "reach here (use fewer values, or covariance=separable)"
        )


@dataclass(frozen=True)
class TextCmaConfig(_Text, CmaConfig):
    """A projected context by CMA-ES, as in black-box tuning (BBT, ICML 2022)."""

    intrinsic_dim: int = 500
    population: int | None = 20

    def __post_init__(self) -> None:
        _Text.__post_init__(self)
        CmaConfig.__post_init__(self)
        _at_least_one(self, "intrinsic_dim")

    @property
    def finest(self) -> tuple[str, float]:
        return "sigma", self.sigma

    @property
    def round_size(self) -> int:
        return self.population or default_population(self.intrinsic_dim)

    def step_queries(self) -> int:
        return self.round_size

    def own_seconds(self, queries: int) -> float:
        return _cma_seconds(self, self.intrinsic_dim, self.round_size, queries)

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        _check_reach(self, self.intrinsic_dim, self.round_size, queries)
        std = towers.token_std / np.sqrt(self.intrinsic_dim)
        rng = np.random.default_rng([seed, _MAP])
        prompt_map = LinearContext(self.initial(towers, seed), self.intrinsic_dim, std, rng)
        steps = np.random.default_rng([seed, _STEPS])
        return prompt_map, Cma(_part(CmaConfig, self), prompt_map.start(), steps)


@dataclass(frozen=True)
class BptVlmConfig(_Defaults, CmaConfig):
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
    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in ("text", "vision", "both"):
            raise ConfigError(f'part is "{self.part}", expected text, vision or both')
        _at_least_one(self, "n_context", "n_tokens", "text_dim", "vision_dim", "batch_size")

    @property
    def needs(self) -> frozenset[str]:
        text = () if self.part == "vision" else (CONTEXTS,)
        image = () if self.part == "text" else (PIXELS, IMAGE_TOKENS)
        return frozenset((LOSS, *text, *image))

    @property
    def program(self) -> str | None:
        return None if self.part == "text" else "tokens"

    @property
    def finest(self) -> tuple[str, float]:
        return "sigma", self.sigma

    @property
    def _dim(self) -> int:
        return {"text": 0, "vision": self.vision_dim, "both": self.vision_dim}[self.part] + (
            0 if self.part == "vision" else self.text_dim
        )

    @property
    def round_size(self) -> int:
        return self.population or default_population(self._dim)

    def step_queries(self) -> int:
        return self.round_size

    def own_seconds(self, queries: int) -> float:
        return _cma_seconds(self, self._dim, self.round_size, queries)

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        _check_reach(self, self._dim, self.round_size, queries)
        text, image = np.random.default_rng([seed, _MAP]).spawn(2)
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
        steps = np.random.default_rng([seed, _STEPS])
        return prompt_map, Cma(_part(CmaConfig, self), np.zeros(prompt_map.dim), steps)


@dataclass(frozen=True)
class SharpZoMethodConfig(_Text, SharpZoConfig):
    """SharpZO (arXiv 2506.20990): sharpness-aware CMA-ES, then sparse zeroth-order steps."""

    intrinsic_dim: int = 512
    projection_std: float = 1.0
    """Of the fixed projection's entries; published as 1 or 0.2, by data set."""

    def __post_init__(self) -> None:
        _Text.__post_init__(self)
        SharpZoConfig.__post_init__(self)
        _at_least_one(self, "intrinsic_dim")
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

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        rng = np.random.default_rng([seed, _MAP])
        initial = self.initial(towers, seed)
        prompt_map = LinearContext(initial, self.intrinsic_dim, self.projection_std, rng)
        steps = np.random.default_rng([seed, _STEPS])
        return prompt_map, SharpZo(_part(SharpZoConfig, self), prompt_map.start(), steps)


@dataclass(frozen=True)
class BlackVipConfig(_Defaults, SpsaConfig):
    """BlackVIP (CVPR 2023) with the settings of its comparison in ZIP (arXiv 2504.06838)."""

    clip: bool = False
    momentum: float = 0.8
    batch_size: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "batch_size")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOSS, PIXELS, FEATURES))

    @property
    def program(self) -> str | None:
        return "decoder"

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return 2 * self.n_pairs

    def step_queries(self) -> int:
        return 2 * self.n_pairs

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        start = towers.decoder_start(np.random.default_rng([seed, _INITIAL]))
        steps = np.random.default_rng([seed, _STEPS])
        return Pixels(start.shape), Spsa(_part(SpsaConfig, self), start, steps)


@dataclass(frozen=True)
class BarConfig(_Defaults, RgfConfig):
    """BAR (ICML 2020) with the settings of its comparison in ZIP (arXiv 2504.06838)."""

    focal_gamma: float = 2.0
    batch_size: int | None = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "batch_size")
        if not self.focal_gamma >= 0:
            raise ConfigError(f"focal_gamma is {self.focal_gamma}, expected at least 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOGITS, PIXELS))

    @property
    def program(self) -> str | None:
        return "border"

    @property
    def focal(self) -> float:
        return self.focal_gamma

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return self.n_directions + 1

    def step_queries(self) -> int:
        return self.n_directions + 1

    def build(self, towers: Towers, queries: int, seed: int) -> Composition:
        shape = (3, towers.image_size, towers.image_size)
        prompt_map = Pixels(shape)
        start = np.random.default_rng([seed, _INITIAL]).standard_normal(prompt_map.dim)
        n_steps = queries // self.step_queries()
        rng = np.random.default_rng([seed, _STEPS])
        return prompt_map, Rgf(_part(RgfConfig, self), start, n_steps, rng)

"""The table of methods: a tuned method is a map and an optimizer, a closed-form one is a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from ztune.config import configured
from ztune.errors import ConfigError
from ztune.heads.gda import GdaConfig
from ztune.maps.zip import ZipMap
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.types import F32, Json, Optimizer, PromptMap


@dataclass(frozen=True)
class ZipConfig(SpsaConfig):
    """ZIP with its published settings (arXiv 2504.06838)."""

    n_context: int = 8
    """m: context tokens at a random start; words given as `init` count themselves."""
    init: str = "random"
    """`random`: N(0, init_std²); anything else is taken as words, such as "a photo of a"."""
    init_std: float = 0.02
    intrinsic_dim: int = 500
    """Values before the low-rank split; q = ⌊intrinsic_dim / m⌋ per token."""
    rank: int = 5
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_context", "batch_size", "rank", "intrinsic_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")

    def queries_per_step(self) -> int:
        """Return what one step costs: the least budget."""
        return 2 * self.n_pairs


@dataclass(frozen=True)
class TunedMethod:
    """A method that asks for losses."""

    name: str
    title: str
    paper: str
    config: type[ZipConfig]
    augment: Mapping[str, int] = field(default_factory=dict)
    """Cached random views per training picture, by preset."""


@dataclass(frozen=True)
class HeadMethod:
    """A method in closed form on image features."""

    name: str
    title: str
    paper: str
    config: type[GdaConfig]
    augment: Mapping[str, int] = field(default_factory=dict)


METHODS: dict[str, TunedMethod | HeadMethod] = {
    "zip": TunedMethod(
        "zip",
        "low-rank, intrinsically clipped zeroth-order prompt tuning",
        "ZIP, ICLR 2025 (arXiv 2504.06838)",
        ZipConfig,
        {"default": 0, "published": 16},
    ),
    "gda": HeadMethod(
        "gda",
        "Gaussian discriminant analysis on features, blended with zero-shot",
        "Wang et al., ICLR 2024",
        GdaConfig,
        {"default": 0, "published": 0},
    ),
}
PRESETS = ("default", "published")


def find_method(name: str) -> TunedMethod | HeadMethod:
    """Return a method of the table.

    Raises: ConfigError listing the known names.
    """
    if name not in METHODS:
        raise ConfigError(f'unknown method "{name}"; known: {", ".join(METHODS)}')
    return METHODS[name]


def method_config(
    method: TunedMethod | HeadMethod, settings: Mapping[str, Json]
) -> ZipConfig | GdaConfig:
    """Return the method's configuration with `settings` over its published defaults."""
    return configured(method.config, settings, f'method "{method.name}"')


def initial_context(config: ZipConfig, width: int, seed: int) -> F32:
    """Return the random start f32[m, d] ~ N(0, init_std²), shared by all classes."""
    rng = np.random.default_rng([seed, 0])
    return (config.init_std * rng.standard_normal((config.n_context, width))).astype(np.float32)


def build_zip(config: ZipConfig, initial: F32, seed: int) -> tuple[PromptMap, Optimizer]:
    """Return ZIP's map and optimizer for an initial context f32[m, d]."""
    prompt_map = ZipMap(
        initial, config.intrinsic_dim, config.rank, np.random.default_rng([seed, 1])
    )
    steps = SpsaConfig(**{f.name: getattr(config, f.name) for f in fields(SpsaConfig)})
    return prompt_map, Spsa(steps, prompt_map.start(), np.random.default_rng([seed, 2]))

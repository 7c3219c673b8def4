"""The interface of methods: entries of the table, settings, and the model's properties.

A tuned method's settings compose a map and an optimizer; their defaults are the published ones,
if a paper has tuned prompts this way. The capabilities that a method needs, its candidates per
round and the cost of its first step are known before anything is opened.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from ztune.capabilities import CONTEXTS, LOSS
from ztune.errors import ConfigError
from ztune.heads import Fitted, Shots
from ztune.io.config import require
from ztune.optim.cma import KEEPS as CMA_KEEPS
from ztune.optim.cma import Cma, CmaConfig, check_reach, default_population, own_seconds
from ztune.optim.epochs import BUDGET, CANDIDATES, KEEPS, Epochs
from ztune.types import F32, F64, I64, LEAST_AREA, Json, Optimizer, PromptMap, TokenRows

Composition = tuple[PromptMap, Optimizer]
# Streams of a run's seed; 3 draws batches, 4 the signal's probes.
INITIAL, MAP, STEPS = 0, 1, 2
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]*")


@dataclass(frozen=True)
class Patches:
    """The patch embedding of an image tower that takes extra tokens."""

    width: int
    """Values per token."""
    n_values: int
    """Pixels per patch times channels."""
    mean: float
    """Mean of the patch embedding's weights; `std` is their standard deviation."""
    std: float


@dataclass(frozen=True)
class ModelSpec:
    """The properties of model and images that a method may use before its first query."""

    text_width: int
    token_table: TokenRows
    """[vocabulary, d], memory-mapped."""
    context_of_words: Callable[[str], F32]
    """The embeddings f32[m, d] of a text's tokens."""
    image_size: int
    decoder_start: Callable[[np.random.Generator], F64]
    """Random initial values of BlackVIP's decoder."""
    patches: Patches | None
    ids_of_words: Callable[[str], I64]
    """The ids i64[m] of a text's tokens, rows of the table."""
    words: Callable[[], I64]
    """The sorted ids i64[v] of text tokens; a vocabulary starts with frequent ones."""
    n_images: int
    """Training images."""

    @property
    def token_std(self) -> float:
        """The standard deviation of all token embeddings."""
        parts = np.array_split(self.token_table, max(1, len(self.token_table) // 4096))
        total, squares = 0.0, 0.0
        for part in parts:  # in chunks, since the table may take 100 MB
            wide = part.astype(np.float64)
            total, squares = total + wide.sum(), squares + (wide**2).sum()
        n = self.token_table.size
        return float(np.sqrt(squares / n - (total / n) ** 2))


class TunedConfig(Protocol):
    """A tuned method's settings, which build its map and optimizer.

    A dataclass that derives from this inherits the defaults below.
    """

    @property
    def batch_size(self) -> int | None:
        """Images per batch; None: all of them in every round."""
        return None

    @property
    def needs(self) -> frozenset[str]:
        """The capabilities that the method needs."""
        return frozenset((LOSS, CONTEXTS))

    @property
    def program(self) -> str | None:
        """The kind of visual prompt (border, decoder or tokens); None if only text is tuned."""
        return None

    @property
    def extractor(self) -> str | None:
        """The ONNX file whose features a decoder gets; None: the bundle's image tower."""
        return None

    @property
    def focal(self) -> float:
        """γ of the focal loss; 0 is cross-entropy."""
        return 0.0

    @property
    def validates(self) -> bool:
        """Whether the method itself asks for validation passes."""
        return False

    @property
    def mixes(self) -> bool:
        """Whether the result is a mixture of prompts, with a Mixing optimizer."""
        return False

    @property
    def ensembles(self) -> bool:
        """Whether heads on features are added to the mixture (`ztune.ensemble`)."""
        return False

    @property
    def keeps_batch(self) -> bool:
        """Whether all rounds use the images and views of the first."""
        return False

    @property
    def top_classes(self) -> int | None:
        """The number of classes whose probabilities an answer has; None: all."""
        return None

    @property
    def notice(self) -> str:
        """A warning before the first query, or an empty string."""
        return ""

    @property
    def in_effect(self) -> TunedConfig:
        """The configuration to tune with, which may be a fallback of these settings."""
        return self

    @property
    @abstractmethod
    def perturbation_setting(self) -> tuple[str, float] | None:
        """Name and value of the setting for the distance of points whose losses are compared.

        None if the method uses no differences of neighbouring points.
        """

    @property
    @abstractmethod
    def round_size(self) -> int:
        """The maximum number of candidates per call."""

    def images_of(self, n_images: int, n_classes: int) -> int:
        """Return the number of training images per batch."""
        return min(self.batch_size or n_images, n_images)

    @abstractmethod
    def step_queries(self) -> int:
        """Return the queries of the first step, the minimum budget."""

    def least_queries(self, n_images: int) -> int:
        """Return the minimum budget with `n_images` training images."""
        return self.step_queries()

    def spends(self, queries: int) -> int:
        """Return the part of a budget that the method uses at most."""
        return queries

    def own_seconds(self, queries: int) -> float:
        """Return the approximate seconds of the optimizer's own computation, if significant."""
        return 0.0

    @abstractmethod
    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        """Return the initial map and optimizer for a budget of `queries`."""


@dataclass(frozen=True)
class TextStart(TunedConfig):
    """Settings of methods that tune a context only."""

    n_context: int = 4
    """m: context tokens with init=random; otherwise the words of `init` define it."""
    init: str = "a photo of a"
    """`random`: N(0, init_std²); otherwise a text."""
    init_std: float = 0.02
    batch_size: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "n_context", "batch_size")
        require(self, 0, "init_std")

    def initial(self, spec: ModelSpec, seed: int) -> F32:
        """Return the initial context f32[m, d], shared by all classes."""
        if self.init != "random":
            return spec.context_of_words(self.init)
        rng = np.random.default_rng([seed, INITIAL])
        noise = rng.standard_normal((self.n_context, spec.text_width))
        return (self.init_std * noise).astype(np.float32)


def batches_of_epoch(n_images: int, batch_size: int | None) -> int:
    """Return the batches of an epoch, whose incomplete last one is dropped."""
    return max(1, n_images // (batch_size or n_images))


@dataclass(frozen=True)
class Generations(CmaConfig, TunedConfig):
    """CMA-ES: every round is a generation of candidates."""

    batch_size: int | None = None
    """A candidate is evaluated on every batch of an epoch, a query each; None: all at once."""
    most_candidates: int | None = None
    """Candidates after which a run ends; None: the budget decides."""

    _keeps: ClassVar[tuple[str, ...]] = KEEPS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "batch_size", "most_candidates")

    @property
    @abstractmethod
    def n_values(self) -> int:
        """The number of optimised values."""

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        return "sigma", self.sigma

    @property
    def round_size(self) -> int:
        return self.population or default_population(self.n_values)

    def step_queries(self) -> int:
        return self.round_size

    def least_queries(self, n_images: int) -> int:
        """Return the queries of one candidate, or of a generation on one batch if more."""
        return max(self.round_size, batches_of_epoch(n_images, self.batch_size))

    def own_seconds(self, queries: int) -> float:
        size = self.round_size
        return own_seconds(self.covariance, self.n_values, size, queries // size)

    def check_reach(self, queries: int) -> None:
        """Check that the size is feasible, before anything is allocated."""
        size = self.round_size
        check_reach(self.covariance, self.n_values, size, queries // size)

    def optimizer(self, start: F64, n_images: int, queries: int, seed: int) -> Optimizer:
        """Return CMA-ES at its start; with batches, on whole epochs."""
        rng = np.random.default_rng([seed, STEPS])
        if self.batch_size is None and self.most_candidates is None and self.keep in CMA_KEEPS:
            return Cma(self, start, rng)
        n_batches = batches_of_epoch(n_images, self.batch_size)
        affordable = queries // n_batches
        most = min(affordable, self.most_candidates or affordable)
        reason = BUDGET if most == affordable else CANDIDATES
        inner = CmaConfig(self.population, self.sigma, self.covariance, "mean", self.bound)
        return Epochs(Cma(inner, start, rng), n_batches, most, self.keep, reason)


@dataclass(frozen=True)
class Preset:
    """What a preset changes."""

    settings: Mapping[str, Json] = field(default_factory=dict)
    """The settings that differ from the defaults."""
    views: int = 0
    """Cached random views per training image; 0: the centre crop."""
    least_area: float = LEAST_AREA
    """The smallest share of an image's area in a random view."""


@dataclass(frozen=True)
class TunedMethod:
    """A method that tunes prompts with losses.

    Raises: ConfigError naming what is missing.
    """

    name: str
    title: str
    paper: str
    config: type[Any]
    """A dataclass that is a TunedConfig."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """By name; one that is missing equals the defaults."""

    def __post_init__(self) -> None:
        _check(self)
        if missing := _missing(TunedConfig, self.config):
            raise ConfigError(
                f'method "{self.name}": {self.config.__name__} lacks {", ".join(missing)} (derive '
                "it from ztune.methods.base.TunedConfig and define them)"
            )

    def serves_new_classes(self) -> bool:
        return True


@dataclass(frozen=True)
class HeadMethod:
    """A closed-form method on image features.

    Raises: ConfigError naming what is missing.
    """

    name: str
    title: str
    paper: str
    config: type[Any]
    fit: Callable[[Any, Shots, int], Fitted]
    uses_images: bool = True
    """Whether training images change the result."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """By name; one that is missing equals the defaults."""

    def __post_init__(self) -> None:
        _check(self)
        if not callable(self.fit):
            raise ConfigError(f'method "{self.name}": fit is {self.fit!r}, expected a function')

    def serves_new_classes(self) -> bool:
        return False

    def fit_shots(self, config: Any, shots: Shots, seed: int) -> Fitted:
        """Fit to the shots.

        Raises: ConfigError if `fit` returns another type; errors of `fit`.
        """
        found = self.fit(config, shots, seed)
        if not isinstance(found, Fitted):
            raise ConfigError(
                f'method "{self.name}": fit returned {type(found).__name__}, expected '
                "ztune.heads.Fitted"
            )
        return found


Method = TunedMethod | HeadMethod


def _check(method: Method) -> None:
    """Check that an entry of the table is complete."""
    name, config = method.name, method.config
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(
            f'method name {name!r}: expected lower-case letters, digits, "-", "_" and "+", as in '
            "my-method"
        )
    for what in ("title", "paper"):
        text = getattr(method, what)
        if not (isinstance(text, str) and text.strip()):
            raise ConfigError(f'method "{name}": {what} is {text!r}, expected a line of text')
    if not (isinstance(config, type) and is_dataclass(config)):
        raise ConfigError(
            f'method "{name}": config is {config!r}, expected a dataclass of its settings'
        )
    unset = [f.name for f in fields(config) if f.default is f.default_factory is MISSING]
    if unset:
        raise ConfigError(
            f'method "{name}": {config.__name__} has no default for {", ".join(unset)}'
        )


def _missing(protocol: type, given: object) -> list[str]:
    """Return the members of a protocol that an object or class lacks."""
    members = [name for name in vars(protocol) if name == "__call__" or not name.startswith("_")]
    abstract = getattr(given, "__abstractmethods__", ())
    return [name for name in members if name in abstract or not hasattr(given, name)]


def build_method(config: TunedConfig, spec: ModelSpec, queries: int, seed: int) -> Composition:
    """Return a method's initial map and optimizer.

    Raises: ConfigError if `build` returns another type; errors of `build`.
    """
    pair, what = config.build(spec, queries, seed), f"{type(config).__name__}.build"
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise ConfigError(f"{what} returned {type(pair).__name__}, expected a map and an optimizer")
    for part, protocol in zip(pair, (PromptMap, Optimizer), strict=True):
        if missing := _missing(protocol, part):
            raise ConfigError(
                f"{what}: {type(part).__name__} lacks {', '.join(missing)} of a "
                f"{protocol.__name__} (ztune.types)"
            )
    return pair

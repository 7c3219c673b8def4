"""What the tuned methods have in common: a configuration composes a map and an optimizer.

A configuration's defaults are the published settings, where a paper has tuned prompts so. What it
needs of a runtime, how many candidates it sends at once and what its first step costs are known
before anything is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ztune.access import CONTEXTS, LOSS
from ztune.errors import ConfigError
from ztune.types import F32, F64, I64, Optimizer, PromptMap

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Composition = tuple[PromptMap, Optimizer]
# Streams of a run's seed; 3 draws batches, 4 the signal's probes.
INITIAL, MAP, STEPS = 0, 1, 2


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
class ModelSpec:
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
    ids_of_words: Callable[[str], I64]
    """The ids i64[m] of a text's tokens, rows of the table."""
    words: Callable[[], I64]
    """The ids i64[v] that stand for text, sorted; a vocabulary has its frequent ones first."""

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
        """Images of a batch; None: all of them in every round."""

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
    def mixes(self) -> bool:
        """Whether the result is a mixture of prompts: its optimizer is Mixing."""

    @property
    def keeps_batch(self) -> bool:
        """Whether all rounds see the images and views of the first."""

    @property
    def top_classes(self) -> int | None:
        """Of how many classes an answer tells the probabilities; None: of all."""

    @property
    def notice(self) -> str:
        """What a person should know before the first query; empty for most."""

    @property
    def finest(self) -> tuple[str, float] | None:
        """The setting that says how far apart two points are whose losses are compared.

        None where no differences of neighbouring points are taken.
        """

    @property
    def round_size(self) -> int:
        """The most candidates of one call."""

    def images_of(self, n_images: int, n_classes: int) -> int:
        """Return how many of the training images a batch has."""

    def step_queries(self) -> int:
        """Return what the first step costs: the least budget."""

    def spends(self, queries: int) -> int:
        """Return how much of a budget the method uses at most."""

    def own_seconds(self, queries: int) -> float:
        """Return roughly what the optimizer's own arithmetic takes, where that is worth a word."""

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        """Return map and optimizer at their start, for a budget of `queries`."""


ConfigType = TypeVar("ConfigType", bound="DataclassInstance")


def part_of(kind: type[ConfigType], whole: Any) -> ConfigType:
    """Return the settings of one part of a method."""
    return kind(**{f.name: getattr(whole, f.name) for f in fields(kind)})


def require_at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")


class Defaults:
    """What most methods have in common."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOSS, CONTEXTS))

    @property
    def program(self) -> str | None:
        return None

    @property
    def mixes(self) -> bool:
        return False

    @property
    def keeps_batch(self) -> bool:
        return False

    @property
    def top_classes(self) -> int | None:
        return None

    @property
    def notice(self) -> str:
        return ""

    @property
    def focal(self) -> float:
        return 0.0

    @property
    def validates(self) -> bool:
        return False

    def images_of(self, n_images: int, n_classes: int) -> int:
        size: int | None = getattr(self, "batch_size", None)
        return min(size or n_images, n_images)

    def spends(self, queries: int) -> int:
        return queries

    def own_seconds(self, queries: int) -> float:
        return 0.0


@dataclass(frozen=True)
class TextStart(Defaults):
    """What is common to methods that tune a context alone."""

    n_context: int = 4
    """m: context tokens at a random start; words given as `init` count themselves."""
    init: str = "a photo of a"
    """`random`: N(0, init_std²); anything else is taken as words."""
    init_std: float = 0.02
    batch_size: int | None = None

    def __post_init__(self) -> None:
        require_at_least_one(self, "n_context", "batch_size")
        if not self.init_std >= 0:
            raise ConfigError(f"init_std is {self.init_std}, expected at least 0")

    def initial(self, towers: ModelSpec, seed: int) -> F32:
        """Return the start f32[m, d], shared by all classes."""
        if self.init != "random":
            return towers.context_of_words(self.init)
        rng = np.random.default_rng([seed, INITIAL])
        noise = rng.standard_normal((self.n_context, towers.text_width))
        return (self.init_std * noise).astype(np.float32)

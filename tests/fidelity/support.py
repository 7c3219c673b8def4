"""What the fidelity tests share: a small model's properties, and builders of a method's parts."""

import numpy as np

from runtimes import decoder
from ztune.methods.base import Composition, ModelSpec, Patches, TunedConfig
from ztune.types import F32, F64, Evaluation

WORDS = np.delete(np.arange(3000), np.arange(0, 3000, 3))
"""The ids of 2,000 text tokens, with gaps."""


def model_spec(width: int = 8, image_size: int = 224, patches: Patches | None = None) -> ModelSpec:
    """Return the properties of a model with `width` values per context token."""
    table: F32 = np.random.default_rng(99).normal(0.1, 0.3, (3000, width)).astype(np.float32)
    return ModelSpec(
        text_width=width,
        token_table=table,
        context_of_words=lambda words: table[: len(words.split())],
        image_size=image_size,
        decoder_start=lambda rng: decoder.initial_values(768, image_size, rng),
        patches=patches,
        ids_of_words=lambda words: np.arange(len(words.split())),
        words=lambda: WORDS,
        n_images=160,
    )


def compose(config: TunedConfig, spec: ModelSpec, seed: int = 1) -> Composition:
    """Return a method's map and optimizer for 5,000 queries."""
    return config.build(spec, 5000, seed)


def evaluation(losses: F64) -> Evaluation:
    """Return an answer with losses only."""
    return Evaluation(losses, np.zeros_like(losses), np.zeros(1, np.int64), 1)


def unit(*row: float) -> list[float]:
    """Return a direction as a unit vector."""
    norm = sum(value * value for value in row) ** 0.5
    return [value / norm for value in row]

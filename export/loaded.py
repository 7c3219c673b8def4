"""A model that is ready for export, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from export.reference import Reference
from export.text_tower import TextTower, graph_kind
from export.vocabulary import Vocabulary
from runtimes.bundle import ImageSpec, TextSpec
from ztune.errors import ConfigError
from ztune.io.schema import convert
from ztune.types import Json


@dataclass(frozen=True)
class LoadedClip:
    """A model ready for export, with the metadata of its bundle."""

    model: nn.Module
    """In float32 and evaluation mode."""
    config: Mapping[str, Json]
    """The library's description of the architecture."""
    tower: TextTower
    image: ImageSpec
    text: TextSpec
    tokenizer_json: str
    reference: Reference
    source: Mapping[str, str]
    notes: tuple[str, ...]
    """Choices that differ from the library's default."""


def text_spec(tower: TextTower, vocabulary: Vocabulary, model: str) -> TextSpec:
    """Return the manifest's `text` for a tower with a vocabulary.

    Raises: FormatError for a value that no bundle may have.
    """
    text = {
        "width": tower.width,
        "context_length": tower.context_length,
        "prefix_ids": vocabulary.prefix_ids,
        "suffix_ids": vocabulary.suffix_ids,
        "pad_id": vocabulary.pad_id,
        "cleaning": vocabulary.cleaning,
        "causal": tower.causal,
        "pooling": tower.pooling,
        "graph": graph_kind(
            tower, vocabulary.prefix_ids, vocabulary.suffix_ids, largest_id=vocabulary.largest_id
        ),
    }
    return convert(text, TextSpec, f'text tower of model "{model}"')


def check_finite(module: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises: ConfigError naming the first tensor.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ConfigError(
                f'weight "{name}" {list(tensor.shape)} has {count} values that are NaN or infinite '
                "(damaged or diverged in training): use an earlier checkpoint"
            )

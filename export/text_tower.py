"""Describe a model's text tower, and choose its prompt graph.

In a causal tower the states of `[SOS][context]` do not depend on the class, and tokens after the
end-of-text token have no effect: the prefix graph uses both. Every other tower gets the sequence
graph, which is its own forward with given rows in place of token embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from open_clip import transformer as towers
from open_clip.hf_model import HFTextEncoder, MeanPooler
from open_clip.model import CLIP
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn

from ztune.errors import ConfigError
from ztune.types import F32


@dataclass(frozen=True)
class TowerParts:
    """The parts of open_clip's own text transformers."""

    positions: Tensor
    """f32[L, d]."""
    blocks: nn.ModuleList
    ln_final: nn.Module
    projection: nn.Module | Tensor | None
    plain: bool
    """Whether the prefix graph can compute it."""


@dataclass(frozen=True)
class TextTower:
    """A text tower, of any library."""

    embedding: nn.Embedding
    """Ids i64[B, L] to f32[B, L, d]; a module anywhere in the model."""
    context_length: int
    """Tokens of a whole sequence."""
    pooling: str
    """As in `TextSpec`."""
    causal: bool = False
    pad_id: int | None = None
    """The id that the tower itself masks; None: it masks none."""
    eos_id: int | None = None
    """The id at which the tower pools if `pooling` is "eos"."""
    parts: TowerParts | None = None
    """None: not one of open_clip's own."""

    @property
    def width(self) -> int:
        return int(self.embedding.embedding_dim)

    @property
    def sees_padding(self) -> bool:
        """Whether the feature depends on the padding."""
        return not (self.causal and self.pooling in ("argmax", "eos"))

    def table(self) -> F32:
        """Return the token embeddings f32[V, d] as the tower gets them.

        They are the weights, except where the embedding is of a class that scales them.
        """
        with torch.no_grad():
            if type(self.embedding) is nn.Embedding:
                rows: F32 = self.embedding.weight.numpy()
            else:
                rows = self.embedding(torch.arange(self.embedding.num_embeddings)).numpy()
        return rows

    @contextlib.contextmanager
    def embedded(self, rows: Tensor) -> Iterator[None]:
        """Let the tower take `rows` f32[B, L, d] in place of its token embeddings."""
        # Not a hook, which would also run the embedding.
        instance = vars(self.embedding)
        instance["forward"] = lambda _: rows
        try:
            yield
        finally:
            del instance["forward"]


@runtime_checkable
class DescribesText(Protocol):
    """A model that describes its text tower itself."""

    def text_tower(self) -> TextTower: ...


def text_tower(model: nn.Module, context_length: int | None = None) -> TextTower:
    """Return what a model says of its text tower, or what open_clip's models are known for.

    `context_length` is that of the tokenizer, for an encoder that leaves it free.

    Raises: ConfigError for another model.
    """
    if isinstance(model, DescribesText):
        return model.text_tower()
    owner: Any = getattr(model, "text", model)
    if isinstance(owner, HFTextEncoder):
        return _encoder_tower(owner, context_length or DEFAULT_CONTEXT_LENGTH)
    if not isinstance(owner, towers.TextTransformer | CLIP):
        raise ConfigError(
            f"text tower {type(owner).__name__} is not supported (expected one of open_clip's)"
        )
    pooling = owner.text_pool_type if isinstance(owner, CLIP) else owner.pool_type
    class_token = getattr(owner, "cls_emb", None)
    if class_token is not None:
        pooling = "class"
    if pooling not in ("argmax", "eos", "last", "first", "class"):
        raise ConfigError(f'text pooling "{pooling}" is not supported')
    length = int(owner.positional_embedding.shape[0]) - (class_token is not None)
    transformer = owner.transformer
    mask = owner.attn_mask
    size = int(owner.positional_embedding.shape[0])
    causal = mask is not None and torch.equal(
        mask.cpu(), torch.full((size, size), float("-inf")).triu(1)
    )
    plain = (
        causal
        and class_token is None
        and not getattr(owner, "use_pad_mask", False)
        and type(transformer) is towers.Transformer
        and all(_is_plain(block) for block in transformer.resblocks)
    )
    return TextTower(
        embedding=owner.token_embedding,
        context_length=length,
        pooling=pooling,
        causal=causal,
        eos_id=int(owner.text_eos_id if isinstance(owner, CLIP) else owner.eos_id),
        parts=TowerParts(
            positions=owner.positional_embedding.detach(),
            blocks=transformer.resblocks,
            ln_final=owner.ln_final,
            projection=owner.text_projection,
            plain=plain,
        ),
    )


def _encoder_tower(encoder: HFTextEncoder, context_length: int) -> TextTower:
    """Return the text tower of open_clip's adapter for Hugging Face models."""
    embedding: Any = encoder.transformer.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return TextTower(
        embedding=embedding,
        context_length=context_length,
        pooling="mean" if isinstance(encoder.pooler, MeanPooler) else "first",
        pad_id=int(encoder.config.pad_token_id),
    )


def _is_plain(block: nn.Module) -> bool:
    if type(block) is not towers.ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return False
    attention = block.attn
    return (
        type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def graph_kind(
    tower: TextTower, prefix_ids: tuple[int, ...], suffix_ids: tuple[int, ...], largest_id: int
) -> str:
    """Return "prefix" if sharing the context's states between classes is exact, else "sequence".

    It is exact for a plain causal tower with one [SOS] and one [EOT], at which the tower pools:
    open_clip pools at the largest id (argmax) or at the first end-of-text id (eos).
    """
    if not (tower.parts and tower.parts.plain) or len(prefix_ids) != 1 or len(suffix_ids) != 1:
        return "sequence"
    pooled = {"argmax": largest_id, "eos": tower.eos_id}.get(tower.pooling)
    return "prefix" if pooled == suffix_ids[0] and prefix_ids != suffix_ids else "sequence"

"""A model of transformers with open_clip's methods, which the graphs call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from export.text_tower import TextTower

_MASKED_LENGTH = 77
"""Tokens of a sequence in towers that mask padding: any length gives the same features, and the
cost grows with it. open_clip's default."""


class HuggingFaceModel(nn.Module):
    """A CLIPModel, SiglipModel, ChineseCLIPModel or AltCLIPModel of transformers.

    Padding is masked in a text tower of BERT's or RoBERTa's kind, as the tokenizer's attention mask
    does, and not in others, as the models were trained.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config.text_config
        self.pad_id: int | None = text.pad_token_id if _masks_padding(model) else None

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.model, "logit_bias", None)

    @property
    def visual(self) -> nn.Module:
        tower: nn.Module = self.model.vision_model
        return tower

    def text_tower(self) -> TextTower:
        """Return the description of the text tower, for the prompt graph."""
        text = self.model.config.text_config
        length = int(text.max_position_embeddings)
        if type(self.model).__name__ == "AltCLIPModel":
            length -= int(text.pad_token_id) + 1  # RoBERTa's positions start after the pad id
        kind = type(self.model).__name__
        pooling = {"SiglipModel": "last", "CLIPModel": "eos"}.get(kind, "first")
        if kind == "CLIPModel" and text.eos_token_id == 2:
            pooling = "argmax"
        return TextTower(
            embedding=self.model.text_model.get_input_embeddings(),
            context_length=length if self.pad_id is None else min(length, _MASKED_LENGTH),
            pooling=pooling,
            causal=kind == "CLIPModel",
            pad_id=self.pad_id,
            eos_id=text.eos_token_id,
        )

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Return features f32[N, e] of normalised pixels f32[N, 3, S, S]."""
        return _features(self.model.get_image_features(pixel_values=pixels), normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Return features f32[B, e] of token ids i64[B, L]."""
        mask = None if self.pad_id is None else (tokens != self.pad_id).long()
        found = self.model.get_text_features(input_ids=tokens, attention_mask=mask)
        return _features(found, normalize)


def _features(found: Any, normalize: bool) -> Tensor:
    """Return the features that a version of transformers returns as they are or in an object."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return functional.normalize(features, dim=-1) if normalize else features


def _masks_padding(model: Any) -> bool:
    return type(model).__name__ in ("ChineseCLIPModel", "AltCLIPModel")

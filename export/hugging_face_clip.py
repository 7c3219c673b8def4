"""Convert a CLIPModel of transformers to open_clip's CLIP, which has the fast prompt graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from ztune.errors import ConfigError

_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSPOSED = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def open_clip_config(config: Any) -> dict[str, Any] | None:
    """Return open_clip's config of a CLIPConfig, None if open_clip cannot compute the model."""
    text, vision = config.text_config, config.vision_config
    activations = {text.hidden_act, vision.hidden_act}
    sides = (vision.image_size, vision.patch_size, text.eos_token_id)
    if activations not in ({"quick_gelu"}, {"gelu"}) or not all(isinstance(n, int) for n in sides):
        return None
    # With the id 2, which old configs have for every tokenizer, transformers pools at the largest.
    pooling = (
        {"pool_type": "argmax"}
        if text.eos_token_id == 2
        else {
            "pool_type": "eos",
            "eos_id": text.eos_token_id,
        }
    )
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_transformer_config(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **pooling,
            **_transformer_config(text),
        },
    }


def _transformer_config(config: Any) -> dict[str, Any]:
    width, hidden = config.hidden_size, config.intermediate_size
    ratio = hidden / width
    return {
        "width": width,
        "layers": config.num_hidden_layers,
        # open_clip rounds width * ratio down.
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def to_open_clip(state: Mapping[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """Return open_clip's CLIP with the weights of a CLIPModel.

    Raises: ConfigError naming weights that one of the two has and the other lacks.
    """
    with torch.random.fork_rng(devices=[]):
        model = CLIP(**config)
    converted = convert_state(state)
    expected = model.state_dict()
    for found, lacking in (
        (sorted(converted.keys() - expected.keys()), "open_clip's model"),
        (sorted(expected.keys() - converted.keys()), "the CLIPModel"),
    ):
        if found:
            raise ConfigError(
                f"{len(found)} weights have no counterpart in {lacking}: {', '.join(found[:3])}"
            )
    model.load_state_dict(converted)
    return model


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a CLIPModel under open_clip's names; unknown names stay."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):
            continue  # a constant, which old versions saved
        if name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = tensor.T
        elif ".encoder.layers." in name:
            _convert_block(name, tensor, state, converted)
        else:
            converted[_NAMES.get(name, name)] = tensor
    return converted


def _convert_block(
    name: str, tensor: Tensor, state: Mapping[str, Tensor], converted: dict[str, Tensor]
) -> None:
    tower, _, rest = name.partition("_model.encoder.layers.")
    index, _, parameter = rest.partition(".")
    part, _, kind = parameter.rpartition(".")
    block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{index}"
    if part in ("self_attn.k_proj", "self_attn.v_proj"):
        return  # with the query
    if part == "self_attn.q_proj":
        three = [state.get(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        tensors = [one for one in three if one is not None]
        converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(tensors)
    else:
        converted[f"{block}.{_BLOCK.get(part, part)}.{kind}"] = tensor

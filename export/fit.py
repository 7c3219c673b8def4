"""Put the weights of a checkpoint into a model, under whatever prefix they have in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from torch import Tensor, nn

from export.architecture import describe, nearest_names
from export.hugging_face_clip import convert_state
from ztune.errors import ConfigError
from ztune.printing import one_line

# Components of names that wrappers of modules add.
_ADDED = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")
_TIMM_POSITIONS = ("pos_embed", "relative_position_bias_table", "rope")
_SHOWN = 3


def fit_weights(
    module: nn.Module, state: Mapping[str, Tensor], where: str, name: str, interpolate: bool = False
) -> tuple[str, ...]:
    """Load the weights of checkpoint `where` into `module`, the model `name`; return notes.

    `interpolate` resizes position embeddings of another resolution or context length.

    Raises: ConfigError when weights are missing or have other shapes, saying what they look like.
    """
    expected = module.state_dict()
    notes = []
    patches = next((key for key in state if "vision_model.embeddings.patch_" in key), None)
    if patches is not None:
        prefix = patches[: patches.index("vision_model.")]
        state = convert_state({key.removeprefix(prefix): part for key, part in state.items()})
        notes.append(
            "the weights have transformers' names and are taken for a CLIPModel's; its folder as "
            "`model` has its tokenizer and preprocessing too"
        )
    found, unused = _select(module, expected, state, where)
    if "logit_bias" in expected and "logit_bias" not in found:
        # open_clip's own rule for a CLIP that is loaded into a SigLIP
        found["logit_bias"] = torch.zeros_like(expected["logit_bias"])
        notes.append("the checkpoint has no logit_bias: 0 is taken, as in open_clip")
    for key, counter in expected.items():
        if key.endswith("num_batches_tracked"):  # unused in evaluation; older torch saves none
            found.setdefault(key, counter)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in found and scalar in expected and found[scalar].numel() == 1:
            found[scalar] = found[scalar].reshape(expected[scalar].shape)
    _fit_positions(module, expected, found, where, name, interpolate)
    misfits = [
        f'"{key}"' + (f" {_shape(found[key])} instead of {_shape(wanted)}" if key in found else "")
        for key, wanted in expected.items()
        if key not in found or found[key].shape != wanted.shape
    ]
    if misfits:
        looks = describe(state)
        close = nearest_names(state)
        raise ConfigError(
            f'{where} does not match model "{name}": {len(expected) - len(misfits)} of its '
            f"{len(expected)} weights are in it; missing or of another shape: "
            f"{', '.join(misfits[:_SHOWN])}{', ...' if len(misfits) > _SHOWN else ''}; "
            + (f"it looks like {looks}" if looks else f"its weights begin {_first(state)}")
            + (f": try `model` {' or '.join(close)}" if close else "")
        )
    integers = [
        key
        for key, wanted in expected.items()
        if wanted.is_floating_point() and not found[key].is_floating_point()
    ]
    if integers:
        raise ConfigError(
            f'{where}: "{integers[0]}" is {found[integers[0]].dtype}, expected floating point '
            "(quantized weights): pass the checkpoint before quantization"
        )
    module.load_state_dict({key: found[key] for key in expected})
    if unused:
        notes.append(f"{len(unused)} weights of the checkpoint are not used: {_first(unused)}")
    return tuple(notes)


def _first(names: Any) -> str:
    names = [one_line(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "number"


def _select(
    module: Any, expected: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights by the model's names, and the names of the others.

    They are those under the prefix with the most names of the model.
    """
    cleaned: dict[str, Tensor] = {}
    for key, tensor in state.items():
        plain = ".".join(part for part in key.split(".") if part not in _ADDED)
        plain = key if key in expected else plain
        if plain in cleaned and not torch.equal(cleaned[plain], tensor):
            raise ConfigError(
                f'{where} has two weights "{one_line(plain)}" that differ, with and without the '
                "prefix of a wrapper: save the state_dict of one model"
            )
        cleaned[plain] = tensor
    names = {*expected, *_other_layout(expected)}
    hits: Counter[str] = Counter()
    for key in cleaned:
        parts = key.split(".")
        hits.update(
            ".".join(parts[:start])
            for start in range(len(parts))
            if ".".join(parts[start:]) in names
        )
    ranked = hits.most_common(2)
    prefix = ranked[0][0] if ranked else ""
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1] >= len(expected):
        raise ConfigError(
            f'{where} has two models, under "{ranked[0][0]}" and "{ranked[1][0]}": save the '
            "state_dict of one of them"
        )
    start = f"{prefix}." if prefix else ""
    inside = {key[len(start) :]: tensor for key, tensor in cleaned.items() if key.startswith(start)}
    others = [key for key in cleaned if not key.startswith(start)]
    inside = convert_state_dict(module, inside)
    if "positional_embedding" in inside and "positional_embedding" not in expected:
        inside = convert_to_custom_text_state_dict(inside)
    elif "text.positional_embedding" in inside and "text.positional_embedding" not in expected:
        inside = {
            key.removeprefix("text.")
            if key.startswith(tuple(f"text.{t}" for t in _TEXT))
            else key: t
            for key, t in inside.items()
        }
    found = {key: tensor for key, tensor in inside.items() if key in expected}
    # CoCa's captioner, and what older versions of transformers saved
    left_out = ("text_decoder.", "position_ids")
    unused = [
        key
        for key in inside
        if key not in expected and not (key.startswith(left_out) or key.endswith(left_out))
    ]
    return found, [*(f"{start}{key}" for key in unused), *others]


def _other_layout(expected: Mapping[str, Tensor]) -> set[str]:
    """Return the model's names with its text weights inside or outside of `text.`."""
    if "positional_embedding" in expected:
        return {f"text.{key}" for key in expected if key.startswith(_TEXT)}
    return {
        rest
        for key in expected
        if (rest := key.removeprefix("text.")) != key and rest.startswith(_TEXT)
    }


def _fit_positions(
    module: Any,
    expected: Mapping[str, Tensor],
    found: dict[str, Tensor],
    where: str,
    name: str,
    interpolate: bool,
) -> None:
    """Resize position embeddings by open_clip's functions, or refuse another size."""
    for key, wanted in expected.items():
        if key not in found or found[key].shape == wanted.shape:
            continue
        got = found[key]
        both = f"{_shape(got)} in the checkpoint, {_shape(wanted)} in the model"
        other = f'{where} does not match model "{name}": position embeddings of another size'
        if key in _POSITIONS and got.ndim == wanted.ndim == 2 and got.shape[1] == wanted.shape[1]:
            # open_clip takes one class token, and a square of patches
            if interpolate and (key != _POSITIONS[0] or isqrt(len(got) - 1) ** 2 == len(got) - 1):
                continue
            raise ConfigError(
                f"{other} ({key}: {_positions(key, module, got, wanted)}); pass the architecture "
                "it was trained with, or `interpolate_positions` to resize them"
            )
        if "trunk." in key and any(part in key for part in _TIMM_POSITIONS):
            raise ConfigError(
                f"{other} ({key}: {both}), and those of a timm tower cannot be resized: pass the "
                "architecture of the checkpoint's image size"
            )
    if interpolate:
        for key in ("positional_embedding", "text.positional_embedding"):
            if key in found and key in expected and found[key].shape[1:] == expected[key].shape[1:]:
                resize_text_pos_embed(found, module)
        key = "visual.positional_embedding"
        if key in found and found[key].shape[1:] == expected[key].shape[1:]:
            resize_pos_embed(found, module)


def _positions(key: str, module: Any, got: Tensor, wanted: Tensor) -> str:
    if key != "visual.positional_embedding":
        return f"{len(got)} tokens in the checkpoint, {len(wanted)} in the model"
    patch = module.visual.image_size[0] // module.visual.grid_size[0]
    sizes = (round((len(tensor) - 1) ** 0.5) * patch for tensor in (got, wanted))
    return "images of {0} x {0} pixels in the checkpoint, {1} x {1} in the model".format(*sizes)

"""Read a CLIP's architecture off the shapes of its weights, to say what a checkpoint is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import open_clip
from torch import Tensor

_MOST = 3
_LAYER = re.compile(r"^(.*?)(?:resblocks|layers|blocks)\.(\d+)\.")


def describe(state: Mapping[str, Tensor]) -> str:
    """Return a line on the architecture that weights belong to; empty for unknown names."""
    if any("vision_model." in key for key in state):
        return (
            "a model saved by transformers: pass the folder with its config.json as `model` "
            "local-dir:FOLDER"
        )
    found = _read(state)
    parts = [
        f"{room} tower of {', '.join(values)}"
        for room in ("image", "text")
        if (
            values := [
                f"{what} {found[key]}"
                for what in ("width", "depth", "patch", "image size", "context")
                if (key := f"{room} {what}") in found
            ]
        )
    ]
    parts += [f"embed dim {found['embed dim']}"] if "embed dim" in found else []
    return "; ".join(parts)


def nearest_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the open_clip architectures that agree best with weights; none if none does."""
    found = _read(state)
    if len(found) < _MOST:
        return []
    scores = {name: _agreement(found, name) for name in open_clip.list_models()}
    best = max(scores.values())
    return [name for name, score in scores.items() if score == best][:_MOST] if best > 1 else []


def _agreement(found: Mapping[str, int], name: str) -> int:
    config: Any = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text:
        return 0
    known = {
        "embed dim": config["embed_dim"],
        "image width": vision.get("width", 768),
        "image depth": vision.get("layers", 12),
        "image patch": vision.get("patch_size"),
        "image image size": vision.get("image_size"),
        "text width": text.get("width", 512),
        "text depth": text.get("layers", 12),
        "text context": text.get("context_length", 77),
    }
    return sum(known.get(key) == value for key, value in found.items())


def _read(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return width, depth, patch, image size and context of both towers, as far as seen."""
    found: dict[str, int] = {}
    depth = {"image": 0, "text": 0}
    for key, tensor in state.items():
        image = "visual" in key
        room = "image" if image else "text"
        if image and key.endswith("conv1.weight") and tensor.ndim == 4 and "layer" not in key:
            found |= {"image width": int(tensor.shape[0]), "image patch": int(tensor.shape[-1])}
        elif key.endswith("token_embedding.weight") and tensor.ndim == 2:
            found["text width"] = int(tensor.shape[1])
        elif key.endswith("positional_embedding") and tensor.ndim == 2 and not image:
            found["text context"] = int(tensor.shape[0])
        elif key.endswith("text_projection") and tensor.ndim == 2:
            found["embed dim"] = int(tensor.shape[1])
        if (layer := _LAYER.match(key)) and "decoder" not in layer[1]:
            depth[room] = max(depth[room], int(layer[2]) + 1)
    for key, tensor in state.items():
        if key.endswith("visual.positional_embedding") and "image patch" in found:
            side = round((len(tensor) - 1) ** 0.5)
            found["image image size"] = side * found["image patch"]
    return found | {f"{room} depth": count for room, count in depth.items() if count}

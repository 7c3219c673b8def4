"""The preprocessing of an image processor of transformers, where a bundle can do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtimes.bundle import ImageSpec
from ztune.errors import ConfigError
from ztune.io.schema import convert
from ztune.printing import reason_of
from ztune.types import F32

_KNOWN = ("CLIP", "Siglip", "ChineseCLIP", "ViT")
_FILTERS = {2: "bilinear", 3: "bicubic"}


def load_processor(folder: Path, name: str) -> Any:
    """Return the image processor of a folder, which resizes with Pillow.

    Raises: ConfigError when transformers cannot read it.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, use_fast=False, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types
        raise ConfigError(
            f'model "{name}": its image processor cannot be read ({reason_of(error)}); pass '
            "`preprocess_from=MODEL:TAG` or a JSON file"
        ) from None


def processor_spec(processor: Any, size: int, name: str) -> ImageSpec:
    """Return the preprocessing of a processor for a model with images of `size`.

    Raises: ConfigError naming the setting that a bundle cannot follow exactly.
    """
    settings = processor.to_dict()

    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f'model "{name}": its image processor {what}, which is not supported; pass the '
            "preprocessing that it was trained with: `preprocess_from=MODEL:TAG` or a JSON file"
        )

    kind = str(settings.get("image_processor_type", type(processor).__name__))
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in [f"{known}ImageProcessor" for known in _KNOWN]:
        raise refuse(f"is a {kind}")
    for step in ("do_resize", "do_rescale"):
        if not settings.get(step):
            raise refuse(f"has {step} = false")
    for step in ("do_pad", "do_reduce_labels"):
        if settings.get(step):
            raise refuse(f"has {step} = true")
    factor = settings.get("rescale_factor")
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise refuse(f"scales levels by {factor} instead of 1/255")
    filter_id = settings.get("resample")
    if filter_id not in _FILTERS:
        raise refuse(f"resamples with Pillow's filter {filter_id}, neither bilinear nor bicubic")
    normalised = bool(settings.get("do_normalize"))
    values = {
        "size": size,
        "mean": list(settings["image_mean"]) if normalised else [0.0] * 3,
        "std": list(settings["image_std"]) if normalised else [1.0] * 3,
        "interpolation": _FILTERS[filter_id],
        "resize_mode": _resize_mode(settings, size, refuse),
        "fill_color": 0,
    }
    return convert(values, ImageSpec, f'image processor of model "{name}"')


def _resize_mode(
    settings: Mapping[str, Any], size: int, refuse: Callable[[str], ConfigError]
) -> str:
    sides = {key: value for key, value in (settings.get("size") or {}).items() if value}
    cut = {key: value for key, value in (settings.get("crop_size") or {}).items() if value}
    cropped = bool(settings.get("do_center_crop"))
    square = {"height": size, "width": size}
    if cropped and cut != square:
        raise refuse(f"crops to {_shown(cut)}, where the model takes {size} x {size}")
    if sides == square:
        return "squash"
    if sides == {"shortest_edge": size} and cropped:
        return "shortest_floor"
    more = f" and crops to {_shown(cut)}" if cropped else ""
    raise refuse(f"resizes to {_shown(sides)}{more}, where the model takes {size} x {size}")


def _shown(sides: Mapping[str, Any]) -> str:
    if sides.keys() == {"height", "width"}:
        return f"{sides['height']} x {sides['width']}"
    return ", ".join(f"{key} {value}" for key, value in sides.items()) or "no size"


def processor_preprocess(processor: Any) -> Callable[[Image.Image], F32]:
    """Return the function from an image to pixels f32[3, S, S] of an image processor."""

    def of(image: Image.Image) -> F32:
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, np.float32)

    return of

"""Find the preprocessing and the activation that a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from runtimes.bundle import ImageSpec
from ztune.errors import ConfigError
from ztune.io.files import read_json
from ztune.io.schema import convert

_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


def shared_preprocess(
    name: str, tags: list[str], quick_gelu: bool, strict: bool
) -> Mapping[str, Any]:
    """Return the preprocessing that all published weights of an architecture share.

    An architecture without published weights gets open_clip's training defaults.
    """
    ways: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for tag in tags:
        published = open_clip.get_pretrained_cfg(name, tag)
        way = {key: published.get(key) for key in (*_PREPROCESS, "quick_gelu")}
        way["quick_gelu"] = bool(way["quick_gelu"])
        ways.setdefault(json.dumps(way), (published, []))[1].append(tag)
    if not ways:
        return {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    agreed = [published for published, _ in ways.values()]
    if strict and (len(ways) > 1 or bool(agreed[0].get("quick_gelu")) != quick_gelu):
        kinds = "; ".join(", ".join(like) for _, like in ways.values())
        raise ConfigError(
            f"a checkpoint file of {name} needs `preprocess_from` TAG or FILE.json: published "
            f"weights of {name} differ in mean, std, resizing or QuickGELU (groups: {kinds})"
        )
    return agreed[0]


def read_preprocess(model: str, source: str) -> tuple[Mapping[str, Any], bool | None]:
    """Return the preprocessing of a tag, MODEL:TAG or JSON file, and its QuickGELU setting."""
    name, _, tag = source.rpartition(":")
    published = open_clip.get_pretrained_cfg(name or model, tag)
    if published:
        return published, bool(published.get("quick_gelu"))
    path = Path(source)
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name or model)
        raise ConfigError(
            f'`preprocess_from` "{source}" is neither a file nor a tag of {name or model}'
            + (
                f" (tags: {', '.join(tags)})"
                if tags
                else " (MODEL:TAG selects other published weights)"
            )
        )
    values: Any = read_json(path, "`preprocess_from`")
    values = values.get("preprocess_cfg", values)
    known = (*_PREPROCESS, "quick_gelu", "size", "mode")
    if not isinstance(values, dict) or not {"mean", "std"} <= values.keys() <= set(known):
        raise ConfigError(
            f"`preprocess_from` {source}: expected an object with mean, std and optional "
            f"{', '.join(known[2:])}"
        )
    quick_gelu = values.get("quick_gelu")
    if quick_gelu is not None and not isinstance(quick_gelu, bool):
        raise ConfigError(f'`preprocess_from` {source}: "quick_gelu" must be true or false')
    return values, quick_gelu


def image_spec(module: Any, preprocess: Mapping[str, Any], model: str) -> ImageSpec:
    size = module.visual.image_size
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if sides[0] != sides[1]:
        raise ConfigError(
            f'model "{model}" takes images of {sides[0]} x {sides[1]}; only square images are '
            "supported"
        )
    values = {key: preprocess[key] for key in _PREPROCESS if preprocess.get(key) is not None}
    # Missing values are open_clip's defaults.
    spec = {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0, **values}
    spec |= {"size": int(sides[0])}
    spec |= {key: list(spec[key]) for key in ("mean", "std") if isinstance(spec[key], tuple)}
    return convert(spec, ImageSpec, f'preprocessing of model "{model}"')

"""Find the preprocessing and the activation that a checkpoint was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    name: str, tags: list[str], config: Mapping[str, Any], checkpoint: Path | None
) -> Mapping[str, Any]:
    """Return the preprocessing that all published weights of an architecture share.

    Without a checkpoint (random weights) it is that of any of them, or open_clip's default.

    Raises: ConfigError where a checkpoint's own is unknown.
    """
    quick_gelu = bool(config.get("quick_gelu"))
    ways: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for tag in tags:
        published = open_clip.get_pretrained_cfg(name, tag)
        way = {key: published.get(key) for key in (*_PREPROCESS, "quick_gelu")}
        way["quick_gelu"] = bool(way["quick_gelu"])
        ways.setdefault(json.dumps(way), (published, []))[1].append(tag)
    agreed = [published for published, _ in ways.values()]
    if checkpoint is None:
        return agreed[0] if agreed else {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    if not agreed:
        unknown = ["mean", "std", *([] if "quick_gelu" in config else ["quick_gelu"])]
        listed = f"{', '.join(unknown[:-1])} and {unknown[-1]}"
        raise ConfigError(
            f'checkpoint "{checkpoint}": {listed} of its training are unknown, '
            f"since {name} has no published weights; {_how_to_tell(unknown)}"
        )
    if len(ways) > 1 or bool(agreed[0].get("quick_gelu")) != quick_gelu:
        kinds = "; ".join(", ".join(like) for _, like in ways.values())
        raise ConfigError(
            f"a checkpoint file of {name} needs `preprocess_from` TAG or FILE.json: published "
            f"weights of {name} differ in mean, std, resizing or QuickGELU (groups: {kinds})"
        )
    return agreed[0]


def check_activation_known(name: str, tags: list[str], source: str) -> None:
    """Refuse a JSON file without "quick_gelu" where published weights do not agree on it.

    Raises: ConfigError.
    """
    known = {bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")) for tag in tags}
    if known != {False}:
        raise ConfigError(
            f'`preprocess_from` {source} has no "quick_gelu", which {name} does not determine; '
            f"{_how_to_tell(('quick_gelu',))}"
        )


def _how_to_tell(unknown: Sequence[str]) -> str:
    def listed(values: Mapping[str, str]) -> str:
        return ", ".join(f'"{key}": {values[key]}' for key in unknown)

    asked = {"mean": "[R, G, B]", "std": "[R, G, B]", "quick_gelu": "true|false"}
    usual = {
        "mean": str(list(OPENAI_DATASET_MEAN)),
        "std": str(list(OPENAI_DATASET_STD)),
        "quick_gelu": "false",
    }
    return (
        f"write {{{listed(asked)}}} to a JSON file and pass `preprocess_from=FILE.json` (open_clip "
        f"trains with {listed(usual)} unless told otherwise)"
    )


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
    missing = [key for key in ("mean", "std") if isinstance(values, dict) and key not in values]
    if missing:
        raise ConfigError(
            f"`preprocess_from` {source} has no {' and no '.join(missing)}; {_how_to_tell(missing)}"
        )
    if not isinstance(values, dict) or not values.keys() <= set(known):
        raise ConfigError(
            f"`preprocess_from` {source}: expected an object with mean, std and optional "
            f"{', '.join(known[2:])}"
        )
    quick_gelu = values.get("quick_gelu")
    if quick_gelu is not None and not isinstance(quick_gelu, bool):
        raise ConfigError(f'`preprocess_from` {source}: "quick_gelu" must be true or false')
    return values, quick_gelu


def image_spec(size: Any, preprocess: Mapping[str, Any], model: str) -> ImageSpec:
    """Return the preprocessing for images of `size`, one side or two.

    Raises: ConfigError for sides that differ; FormatError for an invalid setting.
    """
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

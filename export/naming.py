"""Find which model, weights and preprocessing the arguments of an export name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name

from export.downloads import explain_download_errors
from export.preprocessing import read_preprocess, shared_preprocess
from ztune.errors import ConfigError
from ztune.io.files import read_json

CONFIG = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Weights:
    """The source of the weights and their published configuration."""

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool
    pretrained: str | None
    """open_clip's argument: a tag, a file, or None (local-dir and hf-hub include weights)."""


def resolve(
    model: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> Weights:
    try:
        schema, identifier = parse_model_name(model)
    except ValueError as error:
        raise ConfigError(f'model "{model}": {error}') from None
    if schema is not None:
        if pretrained is not None:
            raise ConfigError(
                f'model "{model}" includes its weights: remove `pretrained` "{pretrained}"'
            )
        return _resolve_folder(model, schema, identifier, preprocess_from, random_weights)
    return _resolve_registry(
        identifier.replace("/", "-"), pretrained, preprocess_from, random_weights
    )


def _resolve_folder(
    model: str,
    schema: str,
    identifier: str,
    preprocess_from: str | None,
    random_weights: int | None,
) -> Weights:
    if schema == "local-dir":
        folder = Path(identifier)
        if not folder.is_dir():
            raise ConfigError(f'model "{model}": folder {folder} does not exist')
        described = read_json(folder / CONFIG, f'model "{model}"')
        if random_weights is None and not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
            raise ConfigError(
                f'model "{model}": no weights in {folder} '
                f"(expected open_clip_model.safetensors or another {', '.join(_WEIGHTS)} file)"
            )
    else:
        with explain_download_errors(f'model "{model}"'):
            described = dict(open_clip.factory._get_hf_config(identifier))
    config: Any = described.get("model_cfg")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")
    ):
        raise ConfigError(f'model "{model}": {CONFIG} has no "model_cfg" with both towers')
    preprocess: Any = described.get("preprocess_cfg") or {}
    quick_gelu = bool(config.get("quick_gelu"))
    if preprocess_from is not None:
        preprocess, override = read_preprocess(model, preprocess_from)
        if override is not None and "quick_gelu" not in config:
            quick_gelu = override
    elif not {"mean", "std"} <= preprocess.keys():
        raise ConfigError(
            f'model "{model}": {CONFIG} has no "preprocess_cfg" with mean and std; add it, or pass '
            "`preprocess_from=MODEL:TAG` or a JSON file"
        )
    return Weights(config, preprocess, quick_gelu, None)


def _resolve_registry(
    name: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> Weights:
    config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        lower = {model.lower(): model for model in known}
        close = [lower[hit] for hit in difflib.get_close_matches(name.lower(), lower, n=5)]
        raise ConfigError(
            f'model "{name}" is not known to open_clip {open_clip.__version__}'
            + (f"; did you mean {', '.join(close)}" if close else "")
            + " (or local-dir:PATH, hf-hub:ID)"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick_gelu = bool(config.get("quick_gelu"))
    if pretrained is None and random_weights is None:
        shown = f"tags of {name}: {', '.join(tags)}" if tags else f"{name} has no published tags"
        raise ConfigError(
            f'model "{name}" needs `pretrained` TAG or FILE ({shown}); '
            "`random_weights=SEED` is for tests"
        )
    published = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    if pretrained is not None and not published and not Path(pretrained).is_file():
        close = difflib.get_close_matches(pretrained.lower(), tags, n=3) or tags
        raise ConfigError(
            f'`pretrained` "{pretrained}" is neither a file nor a tag of {name}'
            + (f"; tags: {', '.join(close)}" if close else "; it has no published tags")
        )
    if preprocess_from is not None:
        preprocess, override = read_preprocess(name, preprocess_from)
        quick_gelu = quick_gelu if override is None else override
    elif published:
        preprocess = published
        # open_clip only warns here, and computes something other than the published model.
        quick_gelu = quick_gelu or bool(published.get("quick_gelu"))
    else:
        preprocess = shared_preprocess(name, tags, quick_gelu, strict=random_weights is None)
    return Weights(config, preprocess, quick_gelu, pretrained)


def is_tag(model: str, pretrained: str | None) -> bool:
    name = model.replace("/", "-")
    return pretrained is not None and bool(open_clip.get_pretrained_cfg(name, pretrained))


def display_name(model: str) -> str:
    """Return a model's name for the manifest, without local paths."""
    schema, identifier = parse_model_name(model)
    return f"local-dir:{Path(identifier).resolve().name}" if schema == "local-dir" else model


def display_weights(model: str, pretrained: str | None, random_weights: int | None) -> str:
    if random_weights is not None:
        return f"random weights, seed {random_weights}"
    if pretrained is None:
        return display_name(model)
    return pretrained if is_tag(model, pretrained) else Path(pretrained).name

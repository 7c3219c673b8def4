"""Find which model, weights and preprocessing the arguments of an export name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name

from export.adapter import CONFIG as ADAPTER
from export.checkpoint import SUFFIXES, file_kind
from export.downloads import explain_download_errors
from export.preprocessing import check_activation_known, read_preprocess, shared_preprocess
from ztune.errors import ConfigError
from ztune.io.files import read_json
from ztune.printing import first_few, quoted

CONFIG = "open_clip_config.json"
BIG_VISION = (".npz", ".npy")
"""Endings of the checkpoints of Google's big_vision, which open_clip reads."""
# Names that open_clip prefers in a folder with several checkpoints.
_PREFERRED = (
    *(f"open_clip_{name}" for name in ("model.safetensors", "pytorch_model.safetensors")),
    *(f"open_clip_pytorch_model{suffix}" for suffix in (".bin", ".pth")),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)


@dataclass(frozen=True)
class Weights:
    """The source of the weights and their published configuration."""

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool
    tag: str | None = None
    """A published tag."""
    checkpoint: Path | None = None
    """A file; without a tag and a file, the hub has the weights."""


def model_name(model: str) -> str:
    """Return a model's name in open_clip's spelling; the path of a folder becomes local-dir:PATH.

    Raises: ConfigError for a path that is not a folder, or an unknown name.
    """
    try:
        schema, identifier = parse_model_name(model)
        path = Path(model if schema is None else identifier).expanduser()
    except (ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise ConfigError(f'model "{model}": {error}') from None
    if schema is not None:
        return f"local-dir:{path}" if schema == "local-dir" else model
    known = open_clip.list_models()
    if (name := model.replace("/", "-")) in known:
        return name
    if model and path.is_dir():
        return f"local-dir:{path}"
    if path.is_file():
        raise ConfigError(
            f'model "{model}" is a file: pass it as `pretrained`, and the name of its architecture '
            "as `model`"
        )
    if model.startswith((".", "~", "/")):
        raise ConfigError(f'model "{model}": folder {path} does not exist')
    lower = {one.lower(): one for one in known}
    close = [lower[hit] for hit in difflib.get_close_matches(name.lower(), lower, n=5)]
    raise ConfigError(
        f'model "{model}" is not known to open_clip {open_clip.__version__}'
        + (f"; did you mean {', '.join(close)}" if close else "")
        + f" (or local-dir:PATH, hf-hub:{model if '/' in model else 'ID'})"
    )


def resolve(
    model: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> Weights:
    """Return the weights that arguments name; `model` as returned by `model_name`.

    Raises: ConfigError for arguments that name none, or do not match.
    """
    schema, identifier = parse_model_name(model)
    if schema is not None:
        if pretrained is not None:
            raise ConfigError(
                f'model "{model}" includes its weights: remove `pretrained` "{pretrained}"'
            )
        return _resolve_folder(model, schema, identifier, preprocess_from, random_weights)
    return _resolve_registry(model, pretrained, preprocess_from, random_weights)


def _resolve_folder(
    model: str,
    schema: str,
    identifier: str,
    preprocess_from: str | None,
    random_weights: int | None,
) -> Weights:
    checkpoint = None
    if schema == "local-dir":
        folder = Path(identifier)
        if not folder.is_dir():
            raise ConfigError(f'model "{model}": folder {folder} does not exist')
        described = read_json(folder / CONFIG, f'model "{model}"')
        if random_weights is None:
            checkpoint = _checkpoint_in(folder, model)
    else:
        with explain_download_errors(f'model "{model}"'):
            described = dict(open_clip.factory._get_hf_config(identifier))
    config: Any = described.get("model_cfg")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")
    ):
        raise ConfigError(f'model "{model}": {CONFIG} has no "model_cfg" with both towers')
    preprocess: Any = described.get("preprocess_cfg")
    preprocess = preprocess if isinstance(preprocess, dict) else {}
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
    return Weights(config, preprocess, quick_gelu, checkpoint=checkpoint)


def _checkpoint_in(folder: Path, model: str) -> Path:
    """Return the checkpoint of a model's folder: one of open_clip's names, or the only one."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    named = [files[name] for name in _PREFERRED if name in files]
    if not files:
        raise ConfigError(
            f'model "{model}": no weights in {folder} '
            f"(expected open_clip_model.safetensors or another {', '.join(SUFFIXES)} file)"
        )
    if not named and len(files) > 1:
        raise ConfigError(
            f'model "{model}": {folder} has several checkpoints ({first_few(list(files))}): keep '
            "one, or name it open_clip_model.safetensors"
        )
    found = named[0] if named else next(iter(files.values()))
    file_kind(found)
    return found


def _resolve_registry(
    name: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> Weights:
    config = open_clip.get_model_config(name)
    assert config is not None  # `model_name` has looked it up
    tags = open_clip.list_pretrained_tags_by_model(name)
    quick_gelu = bool(config.get("quick_gelu"))
    if pretrained is None and random_weights is None:
        shown = f"tags of {name}: {', '.join(tags)}" if tags else f"{name} has no published tags"
        raise ConfigError(
            f'model "{name}" needs `pretrained` TAG or FILE ({shown}); '
            "`random_weights=SEED` is for tests"
        )
    published = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    checkpoint = None
    if pretrained is not None and not published:
        checkpoint = _find_file(pretrained, name, tags)
    # open_clip only warns here, and computes something other than the published model.
    quick_gelu = quick_gelu or bool(published and published.get("quick_gelu"))
    if preprocess_from is not None:
        preprocess, override = read_preprocess(name, preprocess_from)
        if override is None and checkpoint is not None and "quick_gelu" not in config:
            check_activation_known(name, tags, preprocess_from)
        quick_gelu = quick_gelu if override is None else override
    elif published:
        preprocess = published
    else:
        preprocess = shared_preprocess(name, tags, config, checkpoint)
    return Weights(config, preprocess, quick_gelu, pretrained if published else None, checkpoint)


def _find_file(pretrained: str, name: str, tags: list[str]) -> Path:
    """Return the checkpoint that `pretrained` names.

    Raises: ConfigError for a folder, listing its checkpoints, or no file.
    """
    try:
        path = Path(pretrained).expanduser()
    except RuntimeError as error:
        raise ConfigError(f'`pretrained` "{pretrained}": {error}') from None
    if path.is_dir():
        raise ConfigError(f'`pretrained` "{pretrained}" is {_describe_folder(path)}')
    if not path.is_file():
        if path.suffix in SUFFIXES or len(path.parts) > 1:
            raise ConfigError(f'`pretrained` "{pretrained}": file {path} does not exist')
        close = difflib.get_close_matches(pretrained.lower(), tags, n=3) or tags
        raise ConfigError(
            f'`pretrained` "{pretrained}" is neither a file nor a tag of {name}'
            + (f"; tags: {', '.join(close)}" if close else "; it has no published tags")
        )
    if path.suffix not in BIG_VISION:
        file_kind(path)
    return path


def note_on_others(checkpoint: Path) -> list[str]:
    """Return a note on the other checkpoints in the folder of a model's weights, if any."""
    others = [
        file.name
        for file in sorted(checkpoint.parent.iterdir())
        if file.suffix in SUFFIXES and file.name != checkpoint.name
    ]
    return [f"{checkpoint.name} is used; not read: {first_few(others)}"] if others else []


def _describe_folder(path: Path) -> str:
    if (path / ADAPTER).is_file():
        return (
            "a folder with a LoRA adapter: pass it as `adapter`, and the weights that it was "
            "trained on as `pretrained`"
        )
    if any((path / config).is_file() for config in (CONFIG, "config.json")):
        return f"a folder with a whole model: pass `model` local-dir:{path} without `pretrained`"
    files = [file.name for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    if not files:
        return f"a folder without checkpoints (expected one of {', '.join(SUFFIXES)}): pass a file"
    return (
        f"a folder with the checkpoints {first_few(files)}: pass one, as `pretrained` "
        f"{quoted(path / files[0])}"
    )


def is_tag(model: str, pretrained: str | None) -> bool:
    return pretrained is not None and bool(open_clip.get_pretrained_cfg(model, pretrained))


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

"""Load an open_clip model; where open_clip only logs a likely mistake, raise an error.

open_clip initialises a model without weights at random, preprocesses images for a bare checkpoint
by OpenAI's defaults, and builds a model that was trained with QuickGELU without it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.factory import parse_model_name
from torch import nn

from export.hugging_face_files import fetch_saved_model, is_saved_model
from export.text_tower import TextTower, graph_kind, text_tower
from export.vocabulary import Vocabulary, find_vocabulary
from runtimes.bundle import ImageSpec, TextSpec
from ztune.errors import ConfigError, ZtuneError
from ztune.io.files import read_json
from ztune.io.schema import convert
from ztune.printing import reason_of
from ztune.types import Json

CONFIG = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_OFFLINE_HINT = (
    "pass a local checkpoint instead: `pretrained=FILE`, or `model` local-dir:FOLDER "
    f"with {CONFIG} and the weights"
)


@dataclass(frozen=True)
class LoadedClip:
    """A model ready for export, with the metadata of its bundle."""

    model: nn.Module
    """In float32 and evaluation mode."""
    config: Mapping[str, Json]
    """open_clip's description of the architecture."""
    tower: TextTower
    image: ImageSpec
    text: TextSpec
    tokenizer_json: str
    source: Mapping[str, str]
    notes: tuple[str, ...]
    """Choices that differ from open_clip's default."""


@dataclass(frozen=True)
class _Weights:
    """The source of the weights and their published configuration."""

    config: dict[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool
    pretrained: str | None
    """open_clip's argument: a tag, a file, or None (local-dir and hf-hub include weights)."""


def load_clip(
    model: str,
    pretrained: str | None = None,
    tokenizer_file: Path | None = None,
    preprocess_from: str | None = None,
    pad_id: int | None = None,
    random_weights: int | None = None,
    licence: str = "unknown",
) -> LoadedClip:
    """Load `model` (a registry name, local-dir:PATH or hf-hub:ID) with its weights and tokenizer.

    `pretrained` is a published tag or a checkpoint file, `preprocess_from` a tag (or MODEL:TAG) or
    a JSON file, `random_weights` a seed instead of weights (for tests), `licence` that of the
    weights, which open_clip does not record.

    Raises: ConfigError for arguments that do not match, ZtuneError when a download fails.
    """
    if pretrained is not None and random_weights is not None:
        raise ConfigError("`pretrained` and `random_weights` are mutually exclusive")
    if (saved := _find_saved_model(model)) is not None:
        from export.hugging_face import load_hugging_face

        if pretrained is not None:
            raise ConfigError(
                f'model "{model}" includes its weights: remove `pretrained` "{pretrained}"'
            )
        with _capture_logs():
            return load_hugging_face(
                saved,
                _display_name(model),
                tokenizer_file=tokenizer_file,
                preprocess_from=preprocess_from,
                pad_id=pad_id,
                random_weights=random_weights,
                licence=licence,
            )
    with _capture_logs() as messages:
        weights = _resolve(model, pretrained, preprocess_from, random_weights)
        if weights.config["text_cfg"].get("hf_model_name"):
            raise ConfigError(
                f'model "{model}" has a Hugging Face text tower '
                f"({weights.config['text_cfg']['hf_model_name']}), which is not supported: "
                "choose a model with an open_clip text tower"
            )
        module = _create_model(model, weights, random_weights)
        # A published tag matches its architecture; a file may not.
        resized = [message for message in messages if message.startswith("Resizing")]
        if resized and not _is_tag(model, weights.pretrained):
            raise ConfigError(
                f'the checkpoint does not match model "{model}": position embeddings of another '
                "size (another image size or context length); pass the architecture it was "
                "trained with"
            )
        check_finite(module)
        vocabulary = _find_tokenizer(model, weights.config, module, tokenizer_file, pad_id)
    tower = text_tower(module)
    kind = graph_kind(
        tower, vocabulary.prefix_ids, vocabulary.suffix_ids, largest_id=vocabulary.largest_id
    )
    notes = []
    if weights.quick_gelu != bool(weights.config.get("quick_gelu")):
        notes.append(
            f"built with{'' if weights.quick_gelu else 'out'} QuickGELU, as "
            f'"{preprocess_from or pretrained}" was trained; the default of "{model}" differs'
        )
    text = {
        "width": tower.width,
        "context_length": tower.context_length,
        "prefix_ids": vocabulary.prefix_ids,
        "suffix_ids": vocabulary.suffix_ids,
        "pad_id": vocabulary.pad_id,
        "cleaning": vocabulary.cleaning,
        "causal": tower.causal,
        "pooling": tower.pooling,
        "graph": kind,
    }
    return LoadedClip(
        model=module,
        config={**weights.config, "quick_gelu": weights.quick_gelu},
        tower=tower,
        image=_image_spec(module, weights.preprocess, model),
        text=convert(text, TextSpec, f'text tower of model "{model}"'),
        tokenizer_json=vocabulary.content,
        source={
            "model": _display_name(model),
            "pretrained": _display_weights(model, pretrained, random_weights),
            "licence": licence,
        },
        notes=tuple(notes),
    )


def _find_saved_model(model: str) -> Path | None:
    """Return the folder of a model that transformers saved, downloaded from the hub if needed."""
    schema, _, identifier = model.partition(":")
    if schema == "local-dir":
        return Path(identifier) if is_saved_model(Path(identifier)) else None
    if schema == "hf-hub":
        with _explain_download_errors(f'model "{model}"'):
            return fetch_saved_model(identifier)
    return None


def check_finite(module: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises: ConfigError naming the first tensor.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ConfigError(
                f'weight "{name}" {list(tensor.shape)} has {count} values that are NaN or infinite '
                "(damaged or diverged in training): use an earlier checkpoint"
            )


def _resolve(
    model: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> _Weights:
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
) -> _Weights:
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
        with _explain_download_errors(f'model "{model}"'):
            described = dict(open_clip.factory._get_hf_config(identifier))
    config: Any = described.get("model_cfg")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg")
    ):
        raise ConfigError(f'model "{model}": {CONFIG} has no "model_cfg" with both towers')
    preprocess: Any = described.get("preprocess_cfg") or {}
    quick_gelu = bool(config.get("quick_gelu"))
    if preprocess_from is not None:
        preprocess, override = _read_preprocess(model, preprocess_from)
        if override is not None and "quick_gelu" not in config:
            quick_gelu = override
    elif not {"mean", "std"} <= preprocess.keys():
        raise ConfigError(
            f'model "{model}": {CONFIG} has no "preprocess_cfg" with mean and std; add it, or pass '
            "`preprocess_from=MODEL:TAG` or a JSON file"
        )
    return _Weights(config, preprocess, quick_gelu, None)


def _resolve_registry(
    name: str, pretrained: str | None, preprocess_from: str | None, random_weights: int | None
) -> _Weights:
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
        preprocess, override = _read_preprocess(name, preprocess_from)
        quick_gelu = quick_gelu if override is None else override
    elif published:
        preprocess = published
        # open_clip only warns here, and computes something other than the published model.
        quick_gelu = quick_gelu or bool(published.get("quick_gelu"))
    else:
        preprocess = _shared_preprocess(name, tags, quick_gelu, strict=random_weights is None)
    return _Weights(config, preprocess, quick_gelu, pretrained)


def _shared_preprocess(
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


def _read_preprocess(model: str, source: str) -> tuple[Mapping[str, Any], bool | None]:
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


def _create_model(model: str, weights: _Weights, random_weights: int | None) -> nn.Module:
    schema, identifier = parse_model_name(model)
    name = model if schema else identifier.replace("/", "-")
    options: dict[str, Any] = {
        "precision": "fp32",
        "weights_only": True,
        "pretrained_image": False,
        "pretrained_text": False,
        "quick_gelu": weights.quick_gelu,
    }
    where = f'model "{model}"'
    if random_weights is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_weights)
            module = open_clip.create_model(name, load_weights=False, **options)
    elif schema == "hf-hub" or _is_tag(model, weights.pretrained):
        with _explain_download_errors(where):
            module = open_clip.create_model(
                name, weights.pretrained, require_pretrained=True, **options
            )
    else:
        if weights.pretrained is not None:
            where = f'checkpoint "{weights.pretrained}"'
        try:
            module = open_clip.create_model(
                name, weights.pretrained, require_pretrained=True, **options
            )
        except Exception as error:
            raise ConfigError(f"{where} cannot be loaded as {name}: {_reason(error)}") from None
    if hasattr(module, "text_decoder"):
        del module.text_decoder  # CoCa's captioner contributes to neither feature
    result: nn.Module = module.float().eval().requires_grad_(False)
    return result


def _find_tokenizer(
    model: str,
    config: Mapping[str, Any],
    module: nn.Module,
    tokenizer_file: Path | None,
    pad_id: int | None,
) -> Vocabulary:
    tower = text_tower(module)
    with _explain_download_errors(
        f'the tokenizer of model "{model}"', hint="pass its tokenizer.json: `tokenizer=FILE`"
    ):
        return find_vocabulary(
            model,
            config["text_cfg"],
            tokenizer_file,
            pad_id,
            pad_matters=tower.sees_padding,
            table_size=int(tower.embedding.num_embeddings),
        )


def _image_spec(module: Any, preprocess: Mapping[str, Any], model: str) -> ImageSpec:
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


def _is_tag(model: str, pretrained: str | None) -> bool:
    name = model.replace("/", "-")
    return pretrained is not None and bool(open_clip.get_pretrained_cfg(name, pretrained))


def _display_name(model: str) -> str:
    """Return a model's name for the manifest, without local paths."""
    schema, identifier = parse_model_name(model)
    return f"local-dir:{Path(identifier).resolve().name}" if schema == "local-dir" else model


def _display_weights(model: str, pretrained: str | None, random_weights: int | None) -> str:
    if random_weights is not None:
        return f"random weights, seed {random_weights}"
    if pretrained is None:
        return _display_name(model)
    return pretrained if _is_tag(model, pretrained) else Path(pretrained).name


def _reason(error: BaseException) -> str:
    """Return an error of torch, open_clip or the hub as one line."""
    text = reason_of(error, most=240)
    if "weights_only" in text:
        return (
            "it contains more than tensors and could run code; save its state_dict as safetensors"
        )
    if isinstance(error, KeyError):
        return f"it has no {text}: weights of another architecture"
    return text


@contextlib.contextmanager
def _explain_download_errors(what: str, hint: str = _OFFLINE_HINT) -> Iterator[None]:
    """Report a failed download in one line, immediately when the hub's name does not resolve."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _is_reachable(constants.ENDPOINT)
        yield
    except ZtuneError:
        raise
    except Exception as error:
        reason = "no network" if constants.HF_HUB_OFFLINE else _reason(error)
        raise ZtuneError(f"{what} cannot be fetched ({reason}); {hint}") from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def _is_reachable(endpoint: str) -> bool:
    """Return whether the hub's name resolves; a proxy may resolve it, so assume it does."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _capture_logs() -> Iterator[list[str]]:
    """Silence open_clip and the hub; yield the messages that open_clip logs."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    root = logging.getLogger()
    # open_clip logs to the root logger; the hub has handlers of its own.
    others = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "timm")]
    before = (root.handlers[:], root.level)
    levels = [other.level for other in others]
    try:
        root.handlers[:] = [Collect()]
        root.setLevel(logging.INFO)
        for other in others:
            other.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)

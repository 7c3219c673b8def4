"""Check the files of a model that transformers saved, before the model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.adapter import CONFIG as ADAPTER
from export.checkpoint import file_kind
from ztune.errors import ConfigError
from ztune.io.files import is_plain_name, read_json

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
CLASSES = {
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
    "chinese_clip": "ChineseCLIPModel",
    "altclip": "AltCLIPModel",
}
"""The supported class of each model_type."""
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In transformers' order of preference."""
_OTHER_WEIGHTS = (
    "tf_model.h5",
    "flax_model.msgpack",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.onnx",
)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# Patterns of a hub repository's files.
_DOWNLOADED = ("*.json", "*.txt", "*.model")
_SHARDS = (
    ("model.safetensors", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin"),
)


@dataclass(frozen=True)
class SavedModel:
    """A folder that transformers saved, with everything that an export needs."""

    folder: Path
    name: str
    """For messages and the manifest: without the folder's path."""
    class_name: str
    config: Mapping[str, Any]
    safe: bool
    """Whether the weights are safetensors."""
    notes: tuple[str, ...]


def is_saved_model(folder: Path) -> bool:
    """Return whether a folder has a model of transformers and none of open_clip.

    Raises: ConfigError when it has two different models.
    """
    if not (folder / CONFIG).is_file():
        return False
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return True
    theirs = read_json(folder / CONFIG, f'folder "{folder.name}"')
    ours = read_json(folder / OPEN_CLIP_CONFIG, f'folder "{folder.name}"').get("model_cfg")
    for key, first, second in _both(theirs, ours):
        if first is not None and second is not None and first != second:
            raise ConfigError(
                f'folder "{folder.name}" has two models: {key} is {second} in {OPEN_CLIP_CONFIG} '
                f"and {first} in {CONFIG}; move the files of one of them to another folder"
            )
    return False


def _both(theirs: Mapping[str, Any], ours: Any) -> list[tuple[str, Any, Any]]:
    """Return what transformers' and open_clip's description of one model both say."""

    def of(config: Any, part: str, key: str) -> Any:
        inner = config.get(part) if isinstance(config, Mapping) else None
        return inner.get(key) if isinstance(inner, Mapping) else None

    whole = ours if isinstance(ours, Mapping) else {}
    return [
        ("the size of a feature", theirs.get("projection_dim"), whole.get("embed_dim")),
        *(
            (shown, of(theirs, f"{part}_config", first), of(ours, f"{part}_cfg", second))
            for shown, part, first, second in (
                ("the image size", "vision", "image_size", "image_size"),
                ("the patch size", "vision", "patch_size", "patch_size"),
                ("the image tower's width", "vision", "hidden_size", "width"),
                ("the text tower's width", "text", "hidden_size", "width"),
            )
        ),
    ]


def fetch_saved_model(identifier: str) -> Path | None:
    """Download a hub repository that transformers saved; return None for one of open_clip.

    Exceptions of downloads pass through.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(identifier, OPEN_CLIP_CONFIG)
    except LocalEntryNotFoundError:  # offline: it says nothing about the repository
        raise
    except EntryNotFoundError:
        pass
    else:
        return None
    for weights in _SHARDS:
        patterns = [*_DOWNLOADED, *weights]
        folder = Path(snapshot_download(identifier, allow_patterns=patterns))
        if any((folder / file).is_file() for file in weights[:1]) or any(folder.glob(weights[1])):
            break
    return folder


def find_saved_model(
    folder: Path,
    name: str,
    *,
    weights: bool = True,
    tokenizer: bool = True,
    preprocessing: bool = True,
) -> SavedModel:
    """Check the files of a folder; `weights`, … say which of them are needed.

    Raises: ConfigError when the model is not supported, or a file is missing or ambiguous;
        FormatError for a config.json that is not a JSON object.
    """
    config = read_json(folder / CONFIG, f'model "{name}"')
    class_name = _find_class(config, name)
    if tokenizer and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ConfigError(
            f'model "{name}": the folder has no tokenizer ({", ".join(_TOKENIZER_FILES)}); add the '
            "files of `AutoTokenizer.save_pretrained`, or pass `tokenizer=FILE`"
        )
    if preprocessing and not any((folder / file).is_file() for file in _IMAGE_FILES):
        raise ConfigError(
            f'model "{name}": the folder has no {_IMAGE_FILES[0]}; add the file of '
            "`AutoImageProcessor.save_pretrained`, or pass `preprocess_from=MODEL:TAG` or a JSON "
            "file"
        )
    found = [file for file in _WEIGHTS if (folder / file).is_file()]
    if weights:
        _check_weights(folder, found, name)
    notes = []
    if {file.split(".")[1] for file in found} == {"safetensors", "bin"}:
        notes.append(f"{found[0]} is used, {found[-1]} is not read")
    safe = any(".safetensors" in file for file in found)
    return SavedModel(folder, name, class_name, config, safe, tuple(notes))


def _find_class(config: Mapping[str, Any], name: str) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(
            f'model "{name}": {CONFIG} has no "model_type" of transformers (a local-dir: of '
            f"open_clip has {OPEN_CLIP_CONFIG})"
        )
    saved = config.get("architectures")
    said = saved[0] if isinstance(saved, list) and saved and isinstance(saved[0], str) else None
    shown = f'"{kind}"' + (f" ({said})" if said else "")
    if kind.startswith("siglip2"):
        raise ConfigError(
            f'model "{name}" is a {shown}: NaFlex, whose images keep their own aspect ratio and '
            "have any number of patches, while a bundle has images of one size; choose a SigLIP 2 "
            'with a fixed resolution (model_type "siglip")'
        )
    if kind not in CLASSES:
        tower = " (one tower only)" if kind.endswith(("_text_model", "_vision_model")) else ""
        raise ConfigError(
            f'model "{name}" is a {shown}{tower}, expected a model of transformers with an image '
            f"and a text tower: {', '.join(CLASSES)}"
        )
    if config.get("auto_map"):
        raise ConfigError(
            f'model "{name}" is a {shown} with code of its own ("auto_map" in {CONFIG}), which is '
            f"never run; save it as a {CLASSES[kind]}"
        )
    if said is not None and said != CLASSES[kind]:
        raise ConfigError(
            f'model "{name}" was saved as {said}, expected {CLASSES[kind]}, with both towers and '
            "their projections"
        )
    return CLASSES[kind]


def _check_weights(folder: Path, found: Sequence[str], name: str) -> None:
    if (folder / ADAPTER).is_file():
        raise ConfigError(
            f'model "{name}": the folder has an adapter ({ADAPTER}), which transformers '
            "would apply unasked; move it to a folder of its own, and pass that as `adapter`"
        )
    if not found:
        others = [file for file in _OTHER_WEIGHTS if (folder / file).is_file()]
        raise ConfigError(
            f'model "{name}": the folder has no weights, expected {" or ".join(_WEIGHTS[::2])} '
            "(also in shards)" + (f"; {', '.join(others)} cannot be read" if others else "")
        )
    for single in _WEIGHTS[::2]:
        if single in found and f"{single}.index.json" in found:
            raise ConfigError(
                f'model "{name}": the folder has two checkpoints, {single} and '
                f"{single}.index.json; remove the old one"
            )
    read = _shards(folder, found[0], name) if found[0].endswith(".index.json") else found[:1]
    for file in read:
        file_kind(folder / file)  # names web pages, Git LFS pointers, empty and truncated files


def _shards(folder: Path, index: str, name: str) -> list[str]:
    """Return the files that an index names, all of them in its own folder."""
    shards = read_json(folder / index, f'model "{name}"').get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError(f'model "{name}": {index} has no "weight_map" (damaged)')
    files = sorted({str(file) for file in shards.values()})
    for shard in files:
        if not is_plain_name(shard):
            raise ConfigError(
                f'model "{name}": {index} names the file {shard!r}, expected one of its folder'
            )
        if not (folder / shard).is_file():
            raise ConfigError(
                f'model "{name}": {shard} is missing, which {index} names (incomplete download?)'
            )
    return files

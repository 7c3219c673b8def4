"""Merge a LoRA adapter, as peft saves it, into the weights that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from torch import Tensor, nn

from export.checkpoint import read_checkpoint
from ztune.errors import ConfigError
from ztune.io.files import read_json
from ztune.io.schema import convert
from ztune.types import Json

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+?)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_WRAPPED = ".base_layer.out_proj.lora_"
_NAME = re.compile(r"[\w.]+")
# Others (PiSSA, OLoRA, ...) change the weights that the adapter is added to.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")
# Options of peft that compute something other than W + scale * B A.
_OTHERS = ("use_dora", "use_qalora", "use_bdlora", "lora_bias")


@dataclass(frozen=True)
class _Settings:
    """The fields of adapter_config.json that a merge needs."""

    lora_alpha: float
    peft_type: str = "LORA"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    alpha_pattern: Mapping[str, float] | None = None
    target_parameters: Annotated[list[str], Meta(max_length=0)] | None = None


def merge_adapter(module: nn.Module, folder: Path) -> str:
    """Add scale * B A of a LoRA adapter to the weights of `module`; return a note.

    scale = alpha / r, with rsLoRA alpha / sqrt(r).

    Raises: ConfigError for an adapter of another kind, damaged, or of another model.
    """
    where = f'adapter "{folder}"'
    settings = check_adapter(folder)
    file = next(folder / name for name in _FILES if (folder / name).is_file())
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    twice = set()
    for key, tensor in read_checkpoint(file).state.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if found := _PART.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
            if _WRAPPED in key:
                # Where it wraps a whole MultiheadAttention, peft (0.21, say) adds the output
                # projection's part twice, in training as in merging.
                twice.add(found[1])
        elif "lora_" in name:
            raise ConfigError(f'{where}: "{key}" is not supported: merge it with peft first')
        else:  # modules_to_save, and biases
            whole[name.replace(".modules_to_save", "")] = tensor
    weights = module.state_dict()
    for path, pair in parts.items():
        weight = _find(weights, (f"{path}.weight", f"{path}.in_proj_weight"), where)
        if pair.keys() != {"A", "B"}:
            raise ConfigError(f'{where}: "{path}" has only one of lora_A and lora_B (damaged)')
        down, up = pair["A"], pair["B"]
        if min(down.ndim, up.ndim) < 2 or (rank := len(down)) != up.shape[1]:
            raise ConfigError(
                f"{where}: lora_A {list(down.shape)} and lora_B {list(up.shape)} of {path} do not "
                "match (damaged)"
            )
        scale = _scale(settings, path, rank) * (2 if path in twice else 1)
        delta = scale * (up.flatten(1) @ down.flatten(1))
        # peft keeps both factors of an embedding transposed.
        if settings.fan_in_fan_out or delta.shape == weight.shape[::-1] != weight.shape:
            delta = delta.T
        if delta.numel() != weight.numel() or len(delta) != len(weight):
            raise ConfigError(
                f'{where}: "{path}" adds {list(delta.shape)} to a weight {list(weight.shape)}: '
                "pass the model that it was trained on"
            )
        weight += delta.reshape(weight.shape)
    for name, tensor in whole.items():
        weight = _find(weights, (name,), where)
        if weight.shape != tensor.shape:
            raise ConfigError(
                f'{where}: "{name}" is {list(tensor.shape)}, the model has {list(weight.shape)}: '
                "pass the model that it was trained on"
            )
        weight.copy_(tensor)
    if not parts:
        raise ConfigError(f"{where}: {file.name} has no lora_A and lora_B weights")
    return f"merged the LoRA adapter of {len(parts)} modules"


def check_adapter(folder: Path) -> _Settings:
    """Return the settings of an adapter's folder.

    Raises: ConfigError for a folder without an adapter, or one of another kind; FormatError.
    """
    where = f'adapter "{folder}"'
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in _FILES):
        raise ConfigError(
            f"{where} is not a folder with {CONFIG} and {_FILES[0]}, as saved by peft"
        )
    raw = read_json(folder / CONFIG, where)
    kinds = [key for key in _OTHERS if raw.get(key)]
    if (start := raw.get("init_lora_weights", True)) not in _INITIALISATIONS:
        kinds.append(f"init_lora_weights {start}")
    if (kind := raw.get("peft_type", "LORA")) != "LORA" or kinds:
        raise ConfigError(
            f"{where} is of kind {', '.join(kinds) or kind}, expected plain LoRA: merge it with "
            "peft (merge_and_unload) and pass the merged weights"
        )
    known: dict[str, Json] = {key: raw[key] for key in _Settings.__annotations__ if key in raw}
    return convert(known, _Settings, f"{where}: {CONFIG}")


def _scale(settings: _Settings, path: str, rank: int) -> float:
    alpha = settings.lora_alpha
    for name, own in (settings.alpha_pattern or {}).items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f'alpha_pattern "{name}" of the adapter is a regular expression: merge it with peft'
            )
        if path == name or path.endswith(f".{name}"):
            alpha = own
            break
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _find(weights: Mapping[str, Tensor], names: tuple[str, ...], where: str) -> Tensor:
    """Return the weight with one of the names, alone or after a prefix."""

    def hits() -> Iterator[Tensor]:
        for name in names:
            if name in weights:
                yield weights[name]
                return
        for name in names:
            yield from (weights[key] for key in weights if key.endswith(f".{name}"))

    found = list(hits())
    if len(found) != 1:
        raise ConfigError(
            f'{where} changes "{names[0]}", which {"several parts" if found else "no part"} of the '
            "model have: pass the model that it was trained on"
        )
    return found[0]

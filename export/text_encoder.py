"""Check the Hugging Face text encoder of an open_clip model before the model is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH

from ztune.errors import ConfigError
from ztune.types import Json

# open_clip's max_pooler fails on its own mask.
_POOLERS = ("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
_FROM_PAD = ("roberta", "xlm-roberta")
"""Model types whose first position is the pad id + 1."""


def check_text_encoder(model: str, text_config: Mapping[str, Json]) -> None:
    """Read the configuration of a model's text encoder, from a folder or the hub, and check it.

    Raises: ConfigError when open_clip cannot build it. Exceptions of downloads pass through.
    """
    where = f'model "{model}": Hugging Face text tower'
    name = str(text_config["hf_model_name"])
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{where} {name} needs transformers (pip install transformers)") from None
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"{where}: folder {name} has no config.json")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ConfigError(f'{where}: folder {name} does not exist (see "hf_model_name")')
    described, _ = transformers.PretrainedConfig.get_config_dict(name)
    if described.get("auto_map"):
        raise ConfigError(
            f'{where} {name} has code of its own ("auto_map" in config.json), which is never run; '
            "save it as a model of transformers"
        )
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type not in arch_dict:
        raise ConfigError(
            f'{where} is of type "{config.model_type}", expected {", ".join(sorted(arch_dict))}: '
            "open_clip builds no other"
        )
    pooler = (
        text_config.get("hf_pooler_type", "mean_pooler") or arch_dict[config.model_type]["pooler"]
    )
    if pooler not in _POOLERS:
        raise ConfigError(f'{where}: pooler "{pooler}", expected {", ".join(_POOLERS)}')
    length = text_config.get("context_length") or DEFAULT_CONTEXT_LENGTH
    room = _positions(config)
    if room is not None and int(str(length)) > room:
        raise ConfigError(f"{where} has {room} positions, but the context length is {length}")


def _positions(config: Any) -> int | None:
    """Return the longest sequence with a position for every token; None: any length."""
    if config.model_type in _FROM_PAD:
        return int(config.max_position_embeddings) - int(config.pad_token_id) - 1
    return int(config.max_position_embeddings) if config.model_type == "bert" else None

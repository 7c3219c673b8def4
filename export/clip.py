"""Load an open_clip model; where open_clip only logs a likely mistake, raise an error.

open_clip initialises a model without weights at random, preprocesses images for a bare checkpoint
by OpenAI's defaults, and builds a model that was trained with QuickGELU without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from torch import nn

from export.downloads import capture_logs, explain_download_errors, reason
from export.naming import CONFIG, Weights, display_name, display_weights, is_tag, resolve
from export.preprocessing import image_spec
from export.reference import Reference, file_tokenize, open_clip_preprocess, open_clip_tokenize
from export.text_encoder import check_text_encoder
from export.text_tower import TextTower, graph_kind, text_tower
from export.vocabulary import Vocabulary, find_vocabulary
from runtimes.bundle import ImageSpec, TextSpec
from ztune.errors import ConfigError
from ztune.io.schema import convert
from ztune.types import I64, Json


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
    reference: Reference
    source: Mapping[str, str]
    notes: tuple[str, ...]
    """Choices that differ from open_clip's default."""


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
    with capture_logs() as messages:
        weights = resolve(model, pretrained, preprocess_from, random_weights)
        text_config = weights.config["text_cfg"]
        if text_config.get("hf_model_name"):
            with explain_download_errors(
                f'the config of the text tower {text_config["hf_model_name"]} of model "{model}"',
                hint=f'put its config.json in a folder, named by "hf_model_name" in {CONFIG}',
            ):
                check_text_encoder(model, text_config)
        module = _create_model(model, weights, random_weights)
        # A published tag matches its architecture; a file may not.
        resized = [message for message in messages if message.startswith("Resizing")]
        if resized and not is_tag(model, weights.pretrained):
            raise ConfigError(
                f'the checkpoint does not match model "{model}": position embeddings of another '
                "size (another image size or context length); pass the architecture it was "
                "trained with"
            )
        check_finite(module)
        tower = text_tower(module, text_config.get("context_length"))
        vocabulary, tokenize = _find_tokenizer(model, weights.config, tower, tokenizer_file, pad_id)
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
    image = image_spec(module, weights.preprocess, model)
    return LoadedClip(
        model=module,
        config={**weights.config, "quick_gelu": weights.quick_gelu},
        tower=tower,
        image=image,
        text=convert(text, TextSpec, f'text tower of model "{model}"'),
        tokenizer_json=vocabulary.content,
        reference=Reference(
            "open_clip", tokenize, open_clip_preprocess(weights.preprocess, image.size)
        ),
        source={
            "model": display_name(model),
            "pretrained": display_weights(model, pretrained, random_weights),
            "licence": licence,
        },
        notes=tuple(notes),
    )


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


def _create_model(model: str, weights: Weights, random_weights: int | None) -> nn.Module:
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
    elif schema == "hf-hub" or is_tag(model, weights.pretrained):
        with explain_download_errors(where):
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
            raise ConfigError(f"{where} cannot be loaded as {name}: {reason(error)}") from None
    if hasattr(module, "text_decoder"):
        del module.text_decoder  # CoCa's captioner contributes to neither feature
    result: nn.Module = module.float().eval().requires_grad_(False)
    return result


def _find_tokenizer(
    model: str,
    config: Mapping[str, Any],
    tower: TextTower,
    tokenizer_file: Path | None,
    pad_id: int | None,
) -> tuple[Vocabulary, Callable[[Sequence[str]], I64]]:
    with explain_download_errors(
        f'the tokenizer of model "{model}"', hint="pass its tokenizer.json: `tokenizer=FILE`"
    ):
        vocabulary = find_vocabulary(
            model,
            config["text_cfg"],
            tokenizer_file,
            pad_id,
            pad_matters=tower.sees_padding,
            masked_id=tower.pad_id,
            table_size=int(tower.embedding.num_embeddings),
        )
        if tokenizer_file is None:
            tokenize = open_clip_tokenize(model, vocabulary, tower.context_length)
        else:
            tokenize = file_tokenize(
                tokenizer_file, vocabulary, config["text_cfg"], tower.context_length
            )
    return vocabulary, tokenize

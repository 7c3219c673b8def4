"""Load an open_clip model; where open_clip only logs a likely mistake, raise an error.

open_clip initialises a model without weights at random, preprocesses images for a bare checkpoint
by OpenAI's defaults, and builds a model that was trained with QuickGELU without it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from export.adapter import check_adapter, merge_adapter
from export.checkpoint import read_checkpoint
from export.downloads import capture_logs, explain_download_errors, no_remote_code, reason
from export.fit import fit_weights
from export.hugging_face import load_hugging_face
from export.hugging_face_files import fetch_saved_model, is_saved_model
from export.loaded import LoadedClip, check_finite, text_spec
from export.naming import (
    BIG_VISION,
    CONFIG,
    Weights,
    display_name,
    display_weights,
    model_name,
    note_on_others,
    resolve,
)
from export.preprocessing import image_spec
from export.reference import (
    Reference,
    file_tokenize,
    open_clip_preprocess,
    open_clip_tokenize,
    open_file,
)
from export.text_encoder import check_text_encoder
from export.text_tower import text_tower
from export.vocabulary import find_vocabulary
from ztune.errors import ConfigError


def load_clip(
    model: str,
    pretrained: str | None = None,
    tokenizer_file: Path | None = None,
    preprocess_from: str | None = None,
    pad_id: int | None = None,
    random_weights: int | None = None,
    licence: str = "unknown",
    ema: bool = False,
    interpolate_positions: bool = False,
    adapter: Path | None = None,
) -> LoadedClip:
    """Load `model` (a registry name, a folder or hf-hub:ID) with its weights and tokenizer.

    `pretrained` is a published tag or a checkpoint file, `preprocess_from` a tag (or MODEL:TAG) or
    a JSON file, `random_weights` a seed instead of weights (for tests), `licence` that of the
    weights, which open_clip does not record. `ema` takes a checkpoint's moving averages,
    `interpolate_positions` resizes its position embeddings, `adapter` is a LoRA adapter's folder.

    Raises: ConfigError for arguments that do not match, ZtuneError when a download fails.
    """
    if pretrained is not None and random_weights is not None:
        raise ConfigError("`pretrained` and `random_weights` are mutually exclusive")
    model = model_name(model)
    if (saved := _find_saved_model(model)) is not None:
        if pretrained is not None or ema or interpolate_positions:
            raise ConfigError(
                f'model "{model}" was saved by transformers and includes its weights: leave out '
                "`pretrained`, `ema` and `interpolate_positions`"
            )
        with capture_logs():
            return load_hugging_face(
                saved,
                display_name(model),
                tokenizer_file=tokenizer_file,
                preprocess_from=preprocess_from,
                pad_id=pad_id,
                random_weights=random_weights,
                licence=licence,
                adapter=adapter,
            )
    with capture_logs() as messages, no_remote_code():
        weights = resolve(model, pretrained, preprocess_from, random_weights)
        text_config = weights.config["text_cfg"]
        if text_config.get("hf_model_name"):
            with explain_download_errors(
                f'the config of the text tower {text_config["hf_model_name"]} of model "{model}"',
                hint=f'pass local-dir:FOLDER with {CONFIG}, its "hf_model_name" a folder with it',
            ):
                check_text_encoder(model, text_config)
        if weights.checkpoint is None and (ema or interpolate_positions):
            raise ConfigError(
                f"`{'ema' if ema else 'interpolate_positions'}` is for a checkpoint file: leave it "
                "out, or pass `pretrained=FILE`"
            )
        # Whatever is cheap and may fail comes before the model, which takes minutes.
        if adapter is not None:
            check_adapter(adapter)
        tokenizer = _open_tokenizer(model, tokenizer_file)
        checkpoint = None
        if weights.checkpoint is not None and weights.checkpoint.suffix not in BIG_VISION:
            checkpoint = read_checkpoint(weights.checkpoint, ema)
        module = _create_model(model, weights, random_weights)
        # A published tag matches its architecture; a repository of the hub may not.
        if not weights.tag and any(message.startswith("Resizing") for message in messages):
            raise ConfigError(
                f'the weights of model "{model}" do not match its config: position embeddings of '
                "another size (another image size or context length); correct the config"
            )
        notes = list(checkpoint.notes if checkpoint else ())
        if weights.checkpoint is not None and pretrained is None:
            notes += note_on_others(weights.checkpoint)
        if checkpoint is not None:
            where = f'checkpoint "{weights.checkpoint}"'
            notes += fit_weights(module, checkpoint.state, where, model, interpolate_positions)
        if adapter is not None:
            notes.append(merge_adapter(module, adapter))
        check_finite(module)
        tower = text_tower(module, text_config.get("context_length"))
        with _explain_tokenizer_errors(model):
            vocabulary = find_vocabulary(
                model,
                text_config,
                tokenizer_file,
                pad_id,
                pad_matters=tower.sees_padding,
                masked_id=tower.pad_id,
                table_size=int(tower.embedding.num_embeddings),
            )
        if tokenizer_file is None:
            tokenize = open_clip_tokenize(tokenizer, vocabulary, tower.context_length)
        else:
            tokenize = file_tokenize(tokenizer, vocabulary, text_config, tower.context_length)
    n_ids, n_rows = vocabulary.largest_id + 1, int(tower.embedding.num_embeddings)
    if tokenizer_file is not None and n_ids != n_rows:
        notes.append(
            f"{tokenizer_file.name} has {n_ids} ids, the model's token table {n_rows} rows: check "
            "that it is this model's tokenizer"
        )
    if weights.quick_gelu != bool(weights.config.get("quick_gelu")):
        notes.append(
            f"built with{'' if weights.quick_gelu else 'out'} QuickGELU, as "
            f'"{preprocess_from or pretrained}" was trained; the default of "{model}" differs'
        )
    visual: Any = module.visual
    image = image_spec(visual.image_size, weights.preprocess, model)
    return LoadedClip(
        model=module,
        config={**weights.config, "quick_gelu": weights.quick_gelu},
        tower=tower,
        image=image,
        text=text_spec(tower, vocabulary, model),
        tokenizer_json=vocabulary.content,
        reference=Reference(
            "open_clip", tokenize, open_clip_preprocess(weights.preprocess, image.size)
        ),
        source={
            "model": display_name(model),
            "pretrained": display_weights(model, pretrained, random_weights)
            + (f" + adapter {adapter.resolve().name}" if adapter else ""),
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
        with capture_logs(), explain_download_errors(f'model "{model}"'):
            return fetch_saved_model(identifier)
    return None


def _create_model(model: str, weights: Weights, random_weights: int | None) -> nn.Module:
    """Build a model in float32, with its weights if open_clip downloads or converts them."""
    options: dict[str, Any] = {
        "precision": "fp32",
        "weights_only": True,
        "pretrained_image": False,
        "pretrained_text": False,
        "quick_gelu": weights.quick_gelu,
    }
    with torch.random.fork_rng(devices=[]):
        if random_weights is not None or weights.checkpoint is not None:
            torch.manual_seed(random_weights or 0)
            module = open_clip.create_model(model, load_weights=False, **options)
        else:
            with explain_download_errors(f'model "{model}"'):
                module = open_clip.create_model(
                    model, weights.tag, require_pretrained=True, **options
                )
    if weights.checkpoint is not None and weights.checkpoint.suffix in BIG_VISION:
        try:
            open_clip.load_checkpoint(module, str(weights.checkpoint))
        except Exception as error:  # numpy and open_clip on a damaged or other file
            raise ConfigError(
                f'checkpoint "{weights.checkpoint}" cannot be loaded as {model}: {reason(error)}'
            ) from None
    if hasattr(module, "text_decoder"):
        del module.text_decoder  # CoCa's captioner contributes to neither feature
    result: nn.Module = module.float().eval().requires_grad_(False)
    return result


def _open_tokenizer(model: str, file: Path | None) -> Any:
    """Return open_clip's tokenizer, or the one in `file` as `tokenizers` reads it."""
    if file is not None:
        return open_file(file)
    with _explain_tokenizer_errors(model):
        return open_clip.get_tokenizer(model)


def _explain_tokenizer_errors(model: str) -> AbstractContextManager[None]:
    return explain_download_errors(
        f'the tokenizer of model "{model}"', hint="pass its tokenizer.json: `tokenizer=FILE`"
    )

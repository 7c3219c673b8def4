"""Load a model that transformers saved: CLIP, SigLIP, Chinese CLIP or AltCLIP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from export.adapter import check_adapter, merge_adapter
from export.hugging_face_clip import open_clip_config, to_open_clip
from export.hugging_face_files import SavedModel, find_saved_model
from export.hugging_face_images import load_processor, processor_preprocess, processor_spec
from export.hugging_face_model import HuggingFaceModel
from export.hugging_face_tokens import load_tokenizer, tokenize, tokenizers_json
from export.loaded import LoadedClip, check_finite, text_spec
from export.preprocessing import image_spec, read_preprocess
from export.reference import Reference, file_tokenize, open_clip_preprocess, open_file
from export.text_tower import TextTower, text_tower
from export.vocabulary import Vocabulary, find_pad_id, read_tokenizer, vocabulary_of
from runtimes.bundle import ImageSpec
from ztune.errors import ConfigError, how_to_install
from ztune.printing import reason_of
from ztune.types import F32, Json

# Of the machine and the version that saved a model, not of the model.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


def load_hugging_face(
    folder: Path,
    name: str,
    *,
    tokenizer_file: Path | None = None,
    preprocess_from: str | None = None,
    pad_id: int | None = None,
    random_weights: int | None = None,
    licence: str = "unknown",
    adapter: Path | None = None,
) -> LoadedClip:
    """Load the model in `folder`, which messages call `name`; other arguments as in `load_clip`.

    Raises: ConfigError for a folder that is incomplete or not supported.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f'model "{name}" was saved by transformers, which cannot be imported ({error}); '
            f"install it with: {how_to_install('export')}"
        ) from None
    saved = find_saved_model(
        folder,
        name,
        weights=random_weights is None,
        tokenizer=tokenizer_file is None,
        preprocessing=preprocess_from is None,
    )
    config = _load_config(saved, transformers)
    described = open_clip_config(config) if saved.class_name == "CLIPModel" else None
    tokenizer = None if tokenizer_file is not None else load_tokenizer(folder, name)
    image, preprocess = _preprocessing(folder, name, preprocess_from, config.vision_config)
    if adapter is not None:
        check_adapter(adapter)
    model = _load_model(saved, transformers, config, random_weights)
    notes = list(saved.notes)
    if adapter is not None:
        notes.append(merge_adapter(model, adapter))
        check_finite(model)
    module = _as_open_clip(model, described)
    tower = text_tower(module)
    vocabulary = _vocabulary(name, tokenizer, tokenizer_file, pad_id, tower)
    return LoadedClip(
        model=module,
        config={"class": saved.class_name, **_description(saved.config)},
        tower=tower,
        image=image,
        text=text_spec(tower, vocabulary, name),
        tokenizer_json=vocabulary.content,
        reference=Reference(
            "transformers",
            file_tokenize(open_file(tokenizer_file), vocabulary, {}, tower.context_length)
            if tokenizer_file is not None
            else tokenize(tokenizer, tower.context_length),
            preprocess,
        ),
        source={
            "model": name,
            "class": saved.class_name,
            "pretrained": (
                name if random_weights is None else f"random weights, seed {random_weights}"
            )
            + (f" + adapter {adapter.resolve().name}" if adapter else ""),
            "licence": licence,
        },
        notes=tuple(notes),
    )


def _preprocessing(
    folder: Path, name: str, preprocess_from: str | None, vision: Any
) -> tuple[ImageSpec, Callable[[Image.Image], F32]]:
    """Return the preprocessing of `preprocess_from` or the folder, and its reference."""
    size = vision.image_size
    if not isinstance(size, int):
        raise ConfigError(
            f'model "{name}" takes images of {size}; only square images are supported'
        )
    if preprocess_from is not None:
        settings, _ = read_preprocess(name, preprocess_from)
        return image_spec(size, settings, name), open_clip_preprocess(settings, size)
    processor = load_processor(folder, name)
    return processor_spec(processor, size, name), processor_preprocess(processor)


def _load_config(saved: SavedModel, transformers: Any) -> Any:
    try:
        return getattr(transformers, saved.class_name).config_class.from_pretrained(saved.folder)
    except Exception as error:  # transformers raises many types
        raise ConfigError(
            f'model "{saved.name}": config.json cannot be read as that of a {saved.class_name} '
            f"({reason_of(error)})"
        ) from None


def _load_model(
    saved: SavedModel, transformers: Any, config: Any, random_weights: int | None
) -> nn.Module:
    """Return the model in float32, with every weight from its files or from a seed.

    Raises: ConfigError when the files do not have exactly the model's weights.
    """
    kind: Any = getattr(transformers, saved.class_name)
    if random_weights is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_weights)
            model = kind._from_config(config, attn_implementation="eager")
    else:
        try:
            with _without_progress_bars(transformers):
                model, report = kind.from_pretrained(
                    saved.folder,
                    config=config,
                    attn_implementation="eager",
                    use_safetensors=saved.safe,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # refused below, by name
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises many types
            raise ConfigError(
                f'model "{saved.name}": its weights cannot be loaded as {saved.class_name} '
                f"({reason_of(error)})"
            ) from None
        _check_report(report, saved)
    result: nn.Module = model.float().eval().requires_grad_(False)
    check_finite(result)
    return result


@contextlib.contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _check_report(report: Mapping[str, Any], saved: SavedModel) -> None:
    for key, what in (
        ("missing_keys", f"lack {{n}} weights of {saved.class_name}"),
        ("unexpected_keys", f"have {{n}} weights that {saved.class_name} has not"),
    ):
        names = sorted(str(one) for one in report[key] if not str(one).endswith("position_ids"))
        if names:
            raise ConfigError(
                f'model "{saved.name}": its files {what.format(n=len(names))}: '
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} (another model, or "
                "saved in part)"
            )
    if report["mismatched_keys"]:
        key, *shapes = next(iter(report["mismatched_keys"]))
        sizes = " instead of ".join(str(list(shape)) for shape in shapes)
        raise ConfigError(
            f'model "{saved.name}": weight "{key}" has the shape {sizes} (config.json is of '
            "another model)"
        )


def _as_open_clip(model: nn.Module, described: dict[str, Any] | None) -> nn.Module:
    if described is None:
        return HuggingFaceModel(model)
    return to_open_clip(model.state_dict(), described).eval().requires_grad_(False)


def _vocabulary(
    name: str, tokenizer: Any, file: Path | None, pad_id: int | None, tower: TextTower
) -> Vocabulary:
    if file is not None:
        raw, cleaning, found, where = (
            read_tokenizer(file),
            "none",
            find_pad_id(file),
            f"`tokenizer` {file}",
        )
    else:
        raw, cleaning = tokenizers_json(tokenizer, name)
        found, where = tokenizer.pad_token_id, f'model "{name}"'
    choices = (pad_id, found, tower.pad_id, None if tower.sees_padding else 0)
    chosen = next((one for one in choices if one is not None), None)
    if chosen is None:
        raise ConfigError(
            f'{where} has no padding token, and the text tower of "{name}" depends on it; pass '
            "the id it was trained with: `pad_id=N`"
        )
    if tower.pad_id not in (None, chosen):
        raise ConfigError(
            f'{where} pads with the id {chosen}, but the text tower of "{name}" masks the id '
            f"{tower.pad_id}; pass this model's tokenizer: `tokenizer=FILE`"
        )
    return vocabulary_of(raw, cleaning, chosen, int(tower.embedding.num_embeddings), where)


def _description(config: Mapping[str, Any]) -> dict[str, Json]:
    """Return config.json without what says nothing about the model."""
    return {
        key: _description(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _INCIDENTAL
    }

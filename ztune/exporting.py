"""Export of a model of open_clip or transformers to a bundle of ONNX graphs; needs torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from runtimes.bundle import Bundle, load_bundle
from ztune.errors import ConfigError, how_to_install
from ztune.io.files import check_new, new_folder
from ztune.progress import SILENCE, Progress

PRECISIONS = ("fp32", "fp16", "int8")
STORES = ("fp32", "fp16")


def list_models(word: str = "") -> dict[str, list[str]]:
    """Return open_clip's architectures and the tags of their published weights.

    `word` selects those with it in the name or in a tag, in any case.

    Raises: ConfigError if there is none, or without open_clip.

    >>> import ztune
    >>> ztune.list_models("siglip-512")
    {'ViT-B-16-SigLIP-512': ['webli']}
    """
    try:
        from export.catalogue import list_known
    except ImportError as error:
        raise _missing(error) from None
    return list_known(word)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(
        f"export needs torch and open_clip ({error}); install them with: {how_to_install('export')}"
    )


def export(
    model: str,
    out: Path | str,
    *,
    pretrained: str | None = None,
    precision: str = "fp32",
    store: str = "fp32",
    image_tokens: bool = False,
    preprocess_from: str | None = None,
    tokenizer: Path | str | None = None,
    pad_id: int | None = None,
    random_weights: int | None = None,
    licence: str = "unknown",
    ema: bool = False,
    interpolate_positions: bool = False,
    adapter: Path | str | None = None,
    progress: Progress = SILENCE,
) -> Bundle:
    """Export a model to a bundle in the new folder `out`, and return it.

    `model` is a name of open_clip's registry, a folder that open_clip or transformers saved, or
    `hf-hub:ID`; `pretrained` a published tag or a checkpoint file; `preprocess_from` a tag or JSON
    file with the preprocessing of a checkpoint without one; `ema` takes a checkpoint's moving
    averages, `interpolate_positions` resizes its position embeddings to the model's, `adapter` is
    the folder of a LoRA adapter to merge; `precision` fp32, fp16 (for GPUs) or int8 (for CPUs);
    `store` fp16 stores the weights of an fp32 bundle in half precision, and halves it;
    `image_tokens` adds the graph for visual tokens (fp32 only); `random_weights` is a seed, for
    tests. Each graph is compared with torch; a difference above 1e-4 is an error.

    Raises: ConfigError for an invalid model, weights or settings, or without torch; ZtuneError for
        a graph that differs from torch.

    >>> import ztune
    >>> bundle = ztune.export(  # doctest: +SKIP
    ...     "ViT-B-32", "bundles/vit-b-32", pretrained="laion2b_s34b_b79k"
    ... )
    """
    try:
        from export.bundle import export_bundle
        from export.clip import load_clip
    except ImportError as error:
        raise _missing(error) from None
    from export.quantize import quantize_bundle

    if precision not in PRECISIONS:
        raise ConfigError(f'unknown `precision` "{precision}", expected {", ".join(PRECISIONS)}')
    if image_tokens and precision != "fp32":
        raise ConfigError(
            f"`image_tokens` requires `precision=fp32`, got {precision}: visual prompts are tuned "
            "in 32 bits (leave one of the two out)"
        )
    if store not in STORES:
        raise ConfigError(f'unknown `store` "{store}", expected {", ".join(STORES)}')
    if store != "fp32" and precision != "fp32":
        raise ConfigError(
            f"`store={store}` requires `precision=fp32`, got {precision} (leave one of the two out)"
        )
    out = Path(out)
    check_new(out)
    progress.remark(f"loading {model}{f', {pretrained}' if pretrained else ''}")
    loaded = load_clip(
        model,
        pretrained=pretrained,
        tokenizer_file=None if tokenizer is None else Path(tokenizer),
        preprocess_from=preprocess_from,
        pad_id=pad_id,
        random_weights=random_weights,
        licence=licence,
        ema=ema,
        interpolate_positions=interpolate_positions,
        adapter=None if adapter is None else Path(adapter).expanduser(),
    )
    if precision == "fp32":
        return export_bundle(
            loaded, out, image_tokens=image_tokens, store=store, progress=progress.remark
        )
    with new_folder(out) as work:
        whole = export_bundle(loaded, work / "fp32", progress=progress.remark)
        result = quantize_bundle(whole, work / precision, precision, progress.remark)
        for file in list(result.path.iterdir()):
            file.rename(work / file.name)
        shutil.rmtree(whole.path)
        result.path.rmdir()
    return load_bundle(out)


def summary(bundle: Bundle) -> list[str]:
    """Return lines on a new bundle: its preprocessing, and how far it is from its source."""
    image, text = bundle.image, bundle.text
    manifest: Any = bundle.manifest
    source = manifest["source_parity"]
    size = sum(file.bytes for file in bundle.files.values())
    stored = []
    if bundle.rounding:
        worst = min(bundle.rounding.values())
        stored = [f"  weights stored in fp16: worst cosine {worst:.8f} to the original weights"]
    mean, std = (" ".join(f"{one:.5g}" for one in values) for values in (image.mean, image.std))
    return [
        f"{bundle.path}: {size / 1e6:.1f} MB, model {bundle.model_id[:19]}…",
        f"  images: {image.size} x {image.size}, resized by {image.resize_mode}, "
        f"{image.interpolation}; mean {mean}, std {std}",
        f"  texts: {text.context_length} tokens, cleaning {text.cleaning}; "
        f"activation {manifest['activation']}",
        f"  against {source['library']}: ids of {source['texts']} texts equal, pixels of "
        f"{source['images']} images within {source['pixels']:.2g} levels of 255, logits within "
        f"{source['logits']:.1e}",
        *stored,
        *(
            f"  {graph}.onnx against torch: worst cosine {figures['cosine']:.8f}, "
            f"largest difference {figures['max_abs']:.1e}"
            for graph, figures in bundle.parity.items()
        ),
    ]

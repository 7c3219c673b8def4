"""open_clip's architectures with few layers and narrow towers: the same code paths in seconds."""

from __future__ import annotations

import contextlib
import copy
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

from benchmarks.text_encoders import family_of, write_encoder, write_tokenizer
from export.downloads import capture_logs

_WIDTH, _HEADS = 64, 2
_STAGES = 4


def reduced_config(name: str) -> dict[str, Any]:
    """Return the config of an architecture with one layer a tower, 64 values wide.

    Image size, patches, context length, pooling, normalisation and activation are published ones;
    a timm tower keeps its name (see `reduced_timm`), a vocabulary of the hub has 500 ids.
    """
    config: dict[str, Any] = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = _WIDTH
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1] * _STAGES, "width": 16}
    elif "timm_model_name" not in vision:
        vision |= {"layers": 1, "width": _WIDTH, "head_width": _WIDTH // _HEADS}
    if vision.get("attentional_pool"):
        vision["attn_pooler_heads"] = _HEADS
    if "hf_model_name" not in text:
        text |= {"layers": 1, "width": _WIDTH, "heads": _HEADS}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = 500
    if "multimodal_cfg" in config:
        small = {"width": _WIDTH, "heads": _HEADS, "layers": 1, "attn_pooler_heads": _HEADS}
        config["multimodal_cfg"] |= small
    return config


def _timm_options(name: str) -> dict[str, Any]:
    if name.startswith("convnext"):
        return {"depths": [1] * _STAGES, "dims": [16, 32, 64, 128]}
    if name.startswith("swin"):
        return {"depths": [1] * _STAGES, "embed_dim": 32, "num_heads": [1, 2, 2, 4]}
    if name.startswith("fastvit"):
        return {"layers": [1] * _STAGES, "embed_dims": [16, 32, 64, 128]}
    if name.startswith("vitamin") or "_mci_" in name:
        return {"depth": 1}  # the width is that of a convolutional stem
    return {"depth": 1, "embed_dim": _WIDTH, "num_heads": _HEADS}


@contextlib.contextmanager
def reduced_timm() -> Iterator[None]:
    """Let timm build small towers under the published names."""
    create = timm.create_model

    def small(name: str, **given: Any) -> Any:
        return create(name, **given, **_timm_options(name))

    with mock.patch.object(timm, "create_model", small):
        yield


def write_reduced(name: str, folder: Path) -> tuple[str, list[str]]:
    """Write the small form of an architecture as open_clip's local-dir, within `reduced_timm`.

    Return its name, and which of its parts of the hub are stand-ins.
    """
    config = reduced_config(name)
    text, stand_ins = config["text_cfg"], []
    if encoder := text.get("hf_model_name"):
        write_encoder(family_of(encoder), folder)
        text["hf_model_name"] = str(folder)
        stand_ins = ["text encoder", "tokenizer"]
    elif tokenizer := text.get("hf_tokenizer_name"):
        write_tokenizer(family_of(tokenizer), folder)
        stand_ins = ["tokenizer"]
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    known = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, **published}
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: known[key] for key in keys if known.get(key) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    model = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]), capture_logs():
        module = open_clip.create_model(model, load_weights=False, pretrained_text=False)
    for key, weight in module.named_parameters():
        # By name, so that equal towers of two architectures are equal. The zeros and ones of
        # vectors would hide mistakes.
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        drawn = torch.randn(weight.shape, generator=random)
        if weight.ndim >= 2:
            weight.data = drawn * weight[0].numel() ** -0.5
        elif weight.numel() and bool((weight == weight.flatten()[0]).all()):
            weight.data = weight.data + 0.1 * drawn
        else:
            weight.data = 0.1 * drawn
    state = {key: value.contiguous().clone() for key, value in module.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model, stand_ins

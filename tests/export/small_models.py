"""Published architectures with few layers and narrow towers: the same code paths in seconds."""

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from export.clip import load_clip
from export.loaded import LoadedClip

# Arguments for timm's towers.
_TIMM: dict[str, dict[str, Any]] = {
    "fastvit_mci1": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
    "eva02_base_patch16_clip_224": {"depth": 2, "embed_dim": 64, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 64, "num_heads": 2},
}
ARCHITECTURES = (
    "ViT-B-32-quickgelu",
    "RN50",
    "ViT-B-16-SigLIP",
    "MobileCLIP-S1",
    "coca_ViT-B-32",
    "EVA02-B-16",
)


@contextlib.contextmanager
def small_timm() -> Iterator[None]:
    """Make timm build narrow towers."""
    create = timm.create_model

    def narrow(name: str, **options: Any) -> Any:
        return create(name, **options, **_TIMM.get(name, {}))

    with mock.patch.object(timm, "create_model", narrow):
        yield


def small_config(name: str) -> dict[str, Any]:
    """Return a published architecture's config with small numbers."""
    config: dict[str, Any] = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = 64
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    elif "timm_model_name" not in vision:
        vision |= {"layers": 2, "width": 64, "head_width": 32, "image_size": 64}
    if vision.get("attentional_pool"):
        vision |= {"attn_pooler_heads": 2}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 64, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    if config["text_cfg"].get("hf_tokenizer_name"):
        config["text_cfg"]["vocab_size"] = 300
        config["embed_dim"] = 64
    return config


def tiny_config(**vision: Any) -> dict[str, Any]:
    """Return the config of a ViT with one layer in either tower."""
    config = small_config("ViT-B-32")
    config["text_cfg"] |= {"layers": 1, "context_length": 20}
    config["vision_cfg"] |= {"layers": 1, **vision}
    return config


def write_model(
    folder: Path, config: dict[str, Any], seed: int = 0, preprocess: dict[str, Any] | None = None
) -> str:
    """Write a model with random weights as open_clip's local-dir; return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "model_cfg": config,
        "preprocess_cfg": preprocess or {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    name = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        for parameter in model.parameters():
            # uninitialised parameters, and biases and gains that would hide mistakes
            if parameter.ndim < 2 or not torch.isfinite(parameter).all():
                parameter.data = parameter.data.nan_to_num(0, 0, 0).clamp(-2, 2)
                parameter.data += 0.1 * torch.randn_like(parameter)
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return name


def write_tiny(folder: Path, **options: Any) -> str:
    """Write a model of `tiny_config`, with bilinear interpolation; return its name."""
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    return write_model(folder, tiny_config(), **{"preprocess": preprocess, **options})


def small_model(name: str, folder: Path, *, text_layers: int = 2) -> LoadedClip:
    """Write and load the small form of a published architecture."""
    config = small_config(name)
    config["text_cfg"]["layers"] = text_layers
    tokenizer, pad_id = None, None
    if config["text_cfg"].get("hf_tokenizer_name"):
        tokenizer, pad_id = folder / "t5.json", 1
        folder.mkdir(parents=True, exist_ok=True)
        t5_like_tokenizer().save(str(tokenizer))
    with small_timm():
        model = write_model(folder, config)
        return load_clip(model, tokenizer_file=tokenizer, pad_id=pad_id)


def t5_like_tokenizer() -> Tokenizer:
    """Return a tokenizer like SigLIP's: unigram pieces, </s> at the end, no padding token."""
    words = ("a", "photo", "of", "cat", "dog", "house", "traffic", "light", "red", "panda", "sea")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -3.0 - 0.1 * i) for i, word in enumerate(words)]
    pieces += [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer

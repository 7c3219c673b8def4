"""Small open_clip models with a Hugging Face text encoder."""

from pathlib import Path
from typing import Any

from benchmarks.text_encoders import write_encoder
from tests.export.small_models import tiny_config, write_model

_POOLERS = {"bert": "cls_last_hidden_state_pooler", "nllb": "cls_pooler"}


def write_encoder_model(family: str, folder: Path, **text: Any) -> str:
    """Write an open_clip model with a text encoder, as local-dir; return its name."""
    write_encoder(family, folder)
    config = tiny_config(width=32, head_width=16, image_size=32, patch_size=16)
    config["embed_dim"] = 24
    config["text_cfg"] = {
        "hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 24,
        "hf_pooler_type": _POOLERS.get(family, "mean_pooler"), **text,
    }  # fmt: skip
    return write_model(folder, config)

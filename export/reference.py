"""The source library's own tokenizer and image transform, which a bundle is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from export.vocabulary import Vocabulary
from ztune.errors import ConfigError
from ztune.io.files import read_bytes
from ztune.types import F32, I64


@dataclass(frozen=True)
class Reference:
    """How the source library reads texts and images."""

    library: str
    """Its name, for messages."""
    tokenize: Callable[[Sequence[str]], I64]
    """Return the padded ids i64[B, L] of texts."""
    preprocess: Callable[[Image.Image], F32]
    """Return the pixels f32[3, S, S] of an image."""


def open_clip_tokenize(
    tokenizer: Any, vocabulary: Vocabulary, context_length: int
) -> Callable[[Sequence[str]], I64]:
    """Return open_clip's tokenizer, padded as `vocabulary` says."""
    own = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", 0)

    def tokenize(texts: Sequence[str]) -> I64:
        rows: I64 = tokenizer(list(texts), context_length).numpy()
        if vocabulary.pad_id != own:
            for row in rows:
                n_ids = int(np.flatnonzero(row != own)[-1]) + 1 + vocabulary.suffix_ids.count(own)
                row[n_ids:] = vocabulary.pad_id
        return rows

    return tokenize


def open_file(file: Path) -> Any:
    """Open a tokenizer.json without padding and truncation.

    Raises: ConfigError.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_bytes(file).decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(
            f"`tokenizer` {file} cannot be read as tokenizers JSON ({error})"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def file_tokenize(
    tokenizer: Any, vocabulary: Vocabulary, text_config: Mapping[str, Any], context_length: int
) -> Callable[[Sequence[str]], I64]:
    """Return the tokenizer of `open_file`, on text that open_clip cleans."""
    separator = (
        tokenizer.token_to_id("[SEP]")
        if (text_config.get("tokenizer_kwargs") or {}).get("strip_sep_token")
        else None
    )
    clean = str if vocabulary.cleaning == "none" else get_clean_fn(vocabulary.cleaning)

    def tokenize(texts: Sequence[str]) -> I64:
        rows = np.full((len(texts), context_length), vocabulary.pad_id, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            cleaned = clean(text)
            ids = tokenizer.encode(cleaned).ids
            if ids == tokenizer.encode(cleaned, add_special_tokens=False).ids:
                ids = [*vocabulary.prefix_ids, *ids, *vocabulary.suffix_ids]
            ids = [0 if token == separator else token for token in ids][:context_length]
            row[: len(ids)] = ids
        return rows

    return tokenize


def open_clip_preprocess(settings: Mapping[str, Any], size: int) -> Callable[[Image.Image], F32]:
    """Return open_clip's evaluation transform; what `settings` lacks is open_clip's default."""
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), {**settings, "size": size})
    transform = image_transform_v2(PreprocessCfg(**merged), is_train=False)

    def preprocess(image: Image.Image) -> F32:
        pixels: F32 = transform(image).numpy()
        return pixels

    return preprocess

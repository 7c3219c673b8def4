"""The tokenizer of a model of transformers, as a tokenizers file."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import processors

from ztune.errors import ConfigError
from ztune.printing import reason_of
from ztune.types import I64


def load_tokenizer(folder: Path, name: str) -> Any:
    """Return the tokenizer of a folder: the fast one where transformers has it.

    Raises: ConfigError when transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        with readable_sentencepiece():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers and tokenizers raise many types
        raise ConfigError(
            f'model "{name}": its tokenizer cannot be read ({reason_of(error)}); pass its '
            "tokenizer.json: `tokenizer=FILE`"
        ) from None
    if tokenizer.padding_side != "right":
        raise ConfigError(
            f'model "{name}": its tokenizer pads on the left, expected "padding_side": "right" in '
            "tokenizer_config.json"
        )
    return tokenizer


def tokenizers_json(tokenizer: Any, name: str) -> tuple[dict[str, Any], str]:
    """Return a tokenizer's JSON and the cleaning of texts before it.

    Raises: ConfigError for a tokenizer that only exists in Python.
    """
    backend, cleaning = getattr(tokenizer, "backend_tokenizer", None), "none"
    if backend is None and type(tokenizer).__name__ == "SiglipTokenizer":
        if not tokenizer.do_lower_case:
            raise ConfigError(
                f'model "{name}": its SiglipTokenizer keeps upper case, which is not supported; '
                "pass `tokenizer=FILE`"
            )
        backend, cleaning = _convert_siglip(tokenizer), "siglip"
    if backend is None:
        raise ConfigError(
            f'model "{name}": its tokenizer {type(tokenizer).__name__} has no tokenizers JSON; '
            "pass `tokenizer=FILE`"
        )
    return json.loads(backend.to_str()), cleaning


def _convert_siglip(tokenizer: Any) -> Any:
    """Convert transformers' SiglipTokenizer, without its cleaning of texts."""
    from transformers.convert_slow_tokenizer import SpmConverter

    with readable_sentencepiece():
        converted = SpmConverter(tokenizer).converted()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    converted.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    return converted


@contextlib.contextmanager
def readable_sentencepiece() -> Iterator[None]:
    """Let transformers read sentencepiece files with any version of protobuf.

    The wheel of sentencepiece refuses a protobuf older than the one it was built with, which other
    packages may require. transformers has the same code for older versions.
    """
    module = "sentencepiece.sentencepiece_model_pb2"
    try:
        importlib.import_module(module)
    except ImportError:
        yield  # transformers says what is missing
    except Exception:  # VersionError, which old versions of protobuf do not have
        sys.modules[module] = importlib.import_module(
            "transformers.utils.sentencepiece_model_pb2_new"
        )
        try:
            yield
        finally:
            del sys.modules[module]
    else:
        yield


def tokenize(tokenizer: Any, length: int) -> Callable[[Sequence[str]], I64]:
    """Return the function from texts to padded ids i64[B, length] of a tokenizer."""

    def of(texts: Sequence[str]) -> I64:
        found = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        return np.asarray(found["input_ids"], np.int64)

    return of

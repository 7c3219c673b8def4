"""Convert text to token ids as the model's tokenizer in open_clip or transformers does."""

from __future__ import annotations

import html
import re
import string
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ftfy
import numpy as np
import tokenizers

from runtimes.bundle import Bundle, TextSpec
from ztune.errors import DataError, FormatError
from ztune.io.files import read_bytes
from ztune.types import I64

_PLACEHOLDER = re.compile(r"\[unused\d+\]|<extra_id_\d+>|<unused\d+>|<0x[0-9A-F]{2}>")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, kind: str) -> str:
    """Clean `text` as the source library does before tokenizing; `kind`: `TextSpec.cleaning`."""
    if kind == "none":
        return text
    if kind == "siglip":
        return " ".join(text.replace("▁", " ").lower().translate(_NO_PUNCTUATION).split())
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if kind == "whitespace" else text.lower()


class Tokenizer:
    """A bundle's tokenizer, which never truncates."""

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file("tokenizer.json")
        self._init(partial(read_bytes, path), bundle.text, str(path))

    @classmethod
    def from_json(cls, content: str, spec: TextSpec) -> Tokenizer:
        """Return the tokenizer of a JSON text that is not in a bundle."""
        tokenizer = cls.__new__(cls)
        tokenizer._init(content.encode, spec, "tokenizer")
        return tokenizer

    def _init(self, read: Callable[[], bytes], spec: TextSpec, where: str) -> None:
        self._read = read
        self._where = where
        self.spec = spec
        self._loaded: Any = None
        self._ids: dict[str, tuple[int, ...]] = {}
        self._text_ids: I64 | None = None
        self._vocabulary()  # report a corrupted file now

    def _vocabulary(self) -> Any:
        if self._loaded is None:
            try:
                self._loaded = tokenizers.Tokenizer.from_str(self._read().decode())
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # tokenizers raises Exception, and panics are above it
                raise FormatError(f"{self._where} cannot be read ({error}); export again") from None
        return self._loaded

    def text_ids(self) -> I64:
        """Return the sorted ids i64[v] of text, without special tokens and placeholders."""
        if self._text_ids is None:
            loaded = self._vocabulary()
            spec = self.spec
            special = {*spec.prefix_ids, *spec.suffix_ids, spec.pad_id}
            special |= set(loaded.get_added_tokens_decoder())
            vocabulary = loaded.get_vocab(with_added_tokens=True).items()
            ids = (i for token, i in vocabulary if not _PLACEHOLDER.fullmatch(token))
            self._text_ids = np.array(sorted(set(ids) - special), dtype=np.int64)
        return self._text_ids

    def release(self) -> None:
        """Free the vocabulary (40 MB for CLIP); encoded texts stay cached, others reload it."""
        self._loaded = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, cleaned, without prefix and suffix."""
        if text not in self._ids:
            cleaned = clean(text, self.spec.cleaning)
            ids = self._vocabulary().encode(cleaned, add_special_tokens=False).ids
            self._ids[text] = tuple(ids)
        return self._ids[text]

    def sequence(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text between prefix and suffix."""
        return (*self.spec.prefix_ids, *self.encode(text), *self.spec.suffix_ids)

    def pad(self, sequences: Sequence[tuple[int, ...]]) -> I64:
        """Return i64[B, context_length] with the pad id at the end of each sequence.

        Raises: DataError naming a text that is too long.
        """
        length = self.spec.context_length
        tokens = np.full((len(sequences), length), self.spec.pad_id, dtype=np.int64)
        for row, ids in zip(tokens, sequences, strict=True):
            if len(ids) > length:
                raise DataError(
                    f"text {self.decode(ids)!r} has {len(ids)} tokens with special tokens, "
                    f"expected at most {length}; shorten it"
                )
            row[: len(ids)] = ids
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """Return the readable text of a sequence's ids, for messages."""
        frame = {*self.spec.prefix_ids, *self.spec.suffix_ids}
        text: str = self._vocabulary().decode([token for token in ids if token not in frame])
        return text.replace("</w>", " ").strip()

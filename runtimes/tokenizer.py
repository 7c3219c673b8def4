"""Text to token ids as the model was trained to see them: open_clip's cleaning, then its BPE."""

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
    """Clean `text` as open_clip does before its tokenizer; `kind` as in `TextSpec.cleaning`."""
    if kind == "none":
        return text
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if kind == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if kind == "whitespace" else text.lower()


class Tokenizer:
    """A bundle's tokenizer; it knows where a text must end and never truncates."""

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file("tokenizer.json")
        self._take(partial(read_bytes, path), bundle.text, str(path))

    @classmethod
    def of(cls, content: str, spec: TextSpec) -> Tokenizer:
        """Return the tokenizer of a JSON text that is not (yet) part of a bundle."""
        tokenizer = cls.__new__(cls)
        tokenizer._take(content.encode, spec, "tokenizer")
        return tokenizer

    def _take(self, read: Callable[[], bytes], spec: TextSpec, where: str) -> None:
        self._read = read
        self._where = where
        self.spec = spec
        self._loaded: Any = None
        self._known: dict[str, tuple[int, ...]] = {}
        self._words: I64 | None = None
        self._vocabulary()  # a damaged file is told now

    def _vocabulary(self) -> Any:
        if self._loaded is None:
            try:
                self._loaded = tokenizers.Tokenizer.from_str(self._read().decode())
            except Exception as error:  # tokenizers raises plain Exception
                raise FormatError(f"{self._where} cannot be read ({error}); export again") from None
        return self._loaded

    def words(self) -> I64:
        """Return the ids i64[v] that stand for text, in their order.

        Not those that frame, pad or mask a text, nor the placeholders of a vocabulary.
        """
        if self._words is None:
            loaded = self._vocabulary()
            spec = self.spec
            special = {*spec.prefix_ids, *spec.suffix_ids, spec.pad_id}
            special |= set(loaded.get_added_tokens_decoder())
            vocabulary = loaded.get_vocab(with_added_tokens=True).items()
            ids = (i for token, i in vocabulary if not _PLACEHOLDER.fullmatch(token))
            self._words = np.array(sorted(set(ids) - special), dtype=np.int64)
        return self._words

    def release(self) -> None:
        """Give up the vocabulary, 40 MB for CLIP's; texts that were seen stay known.

        It is read again for any other.
        """
        self._loaded = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, cleaned, without prefix and suffix."""
        if text not in self._known:
            cleaned = clean(text, self.spec.cleaning)
            ids = self._vocabulary().encode(cleaned, add_special_tokens=False).ids
            self._known[text] = tuple(ids)
        return self._known[text]

    def sequence(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text between prefix and suffix."""
        return (*self.spec.prefix_ids, *self.encode(text), *self.spec.suffix_ids)

    def pad(self, sequences: Sequence[tuple[int, ...]]) -> I64:
        """Return i64[B, context_length] with the pad id at the end of each sequence.

        Raises: DataError naming the text that does not fit.
        """
        length = self.spec.context_length
        tokens = np.full((len(sequences), length), self.spec.pad_id, dtype=np.int64)
        for row, ids in zip(tokens, sequences, strict=True):
            if len(ids) > length:
                raise DataError(
                    f"text {self.text_of(ids)!r} has {len(ids)} tokens with its specials, "
                    f"the model takes {length}; shorten it"
                )
            row[: len(ids)] = ids
        return tokens

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the readable text of a sequence's ids, for messages."""
        frame = {*self.spec.prefix_ids, *self.spec.suffix_ids}
        text: str = self._vocabulary().decode([token for token in ids if token not in frame])
        return text.replace("</w>", " ").strip()

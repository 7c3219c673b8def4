"""Export a model's tokenizer as JSON for the `tokenizers` library, without special tokens.

Prefix, suffix and padding are in the manifest: the device assembles sequences itself and never
truncates.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import tokenizers
from open_clip.tokenizer import re as open_clip_regex
from tokenizers import Regex, decoders, models, pre_tokenizers

from ztune.errors import ConfigError
from ztune.io.files import read_bytes

_START = ("<|startoftext|>", "<start_of_text>", "<|startofsequence|>", "<s>", "<bos>", "[CLS]")
_END = ("<|endoftext|>", "<end_of_text>", "<|endofsequence|>", "</s>", "<eos>", "[SEP]")
_PROBES = ("a photo of a cat.", "x", "Zebra 42, two words")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's JSON and its entries in the manifest."""

    content: str
    cleaning: str
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int
    largest_id: int
    """The largest id in any text, special tokens included."""


def find_vocabulary(
    model: str,
    text_config: Mapping[str, Any],
    file: Path | None,
    pad_id: int | None,
    pad_matters: bool,
    table_size: int,
    masked_id: int | None = None,
) -> Vocabulary:
    """Return the tokenizer that open_clip would use for a model, or the one in `file`.

    `pad_matters` is whether the text tower's feature depends on the padding. If so, the pad id is
    never guessed. `masked_id` is the id that the tower masks as padding, if it masks one.

    Raises: ConfigError when the tokenizer is ambiguous or unsupported. Exceptions of downloads pass
        through.
    """
    options = text_config.get("tokenizer_kwargs") or {}
    named = text_config.get("hf_tokenizer_name")
    # open_clip's rule for models that do not name a tokenizer
    siglip = not named and ":" not in model and "siglip" in model.lower()
    simple = not named and not siglip
    if text_config.get("tokenizer_mode"):
        raise ConfigError(
            f'model "{model}": tokenizer mode "{text_config["tokenizer_mode"]}" is not supported'
        )
    default = "lower" if simple else "canonicalize" if siglip else "whitespace"
    cleaning = options.get("clean", default)
    if file is not None:
        raw, found_pad, where = read_tokenizer(file), find_pad_id(file), f"`tokenizer` {file}"
    elif simple:
        if {"additional_special_tokens", "bpe_path", "reduction_mask"} & options.keys():
            raise ConfigError(
                f'model "{model}": its tokenizer_kwargs are not supported; pass `tokenizer=FILE`'
            )
        return _check_ids(simple_tokenizer(cleaning), pad_id, table_size, model)
    else:
        tokenizer = open_clip.get_tokenizer(model)
        tokenizer("x")  # NLLB's sets its language token only when it reads a text
        reference = tokenizer.tokenizer
        backend = getattr(reference, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f'model "{model}": its tokenizer {type(reference).__name__} has no tokenizers JSON;'
                " pass `tokenizer=FILE`"
            )
        raw, found_pad, where = json.loads(backend.to_str()), reference.pad_token_id, model
    if pad_id is None:
        pad_id = found_pad
    if pad_id is None:
        pad_id = text_config.get("pad_id", masked_id)
    if pad_id is None and not pad_matters:
        pad_id = 0  # this tower ignores everything after the end of a text
    if pad_id is None:
        raise ConfigError(
            f'{where} has no padding token, and the text tower of "{model}" depends on it; pass '
            "the id it was trained with: `pad_id=N`"
        )
    if masked_id is not None and pad_id != masked_id:
        raise ConfigError(
            f'{where} pads with id {pad_id}, but the text tower of "{model}" masks id {masked_id}: '
            "pass the tokenizer it was trained with: `tokenizer=FILE`"
        )
    return vocabulary_of(
        raw,
        cleaning,
        pad_id,
        table_size,
        where,
        strip_separator=bool(options.get("strip_sep_token")),
    )


def vocabulary_of(
    raw: dict[str, Any],
    cleaning: str,
    pad_id: int,
    table_size: int,
    where: str,
    *,
    strip_separator: bool = False,
) -> Vocabulary:
    """Return the vocabulary of tokenizers JSON; `strip_separator` replaces [SEP] by the id 0.

    Raises: ConfigError for special tokens that are not found, or ids without a row in the table.
    """
    prefix, suffix = _find_special_ids(raw, where)
    if strip_separator:
        separator = tokenizers.Tokenizer.from_str(json.dumps(raw)).token_to_id("[SEP]")
        prefix = tuple(0 if token == separator else token for token in prefix)
        suffix = tuple(0 if token == separator else token for token in suffix)
    # Drop added tokens without a row in the model's table (T5's <extra_id_0>, ...).
    raw["added_tokens"] = [
        token
        for token in raw.get("added_tokens", [])
        if token["id"] < table_size or token["id"] in (*prefix, *suffix)
    ]
    vocabulary = Vocabulary(
        _strip_specials(raw), cleaning, prefix, suffix, pad_id, _find_largest_id(raw)
    )
    return _check_ids(vocabulary, None, table_size, where)


def _check_ids(
    vocabulary: Vocabulary, pad_id: int | None, table_size: int, where: str
) -> Vocabulary:
    if pad_id is not None:
        vocabulary = dataclasses.replace(vocabulary, pad_id=pad_id)
    largest = max(vocabulary.largest_id, vocabulary.pad_id)
    if largest >= table_size:
        raise ConfigError(
            f"{where}: the tokenizer has ids up to {largest}, but the model's token table has "
            f"{table_size} rows; pass this model's tokenizer: `tokenizer=FILE`"
        )
    return vocabulary


@functools.cache
def simple_tokenizer(cleaning: str) -> Vocabulary:
    """Rebuild open_clip's byte-level BPE, with the same ids for every text."""
    reference = open_clip.SimpleTokenizer(clean=cleaning if cleaning != "none" else "lower")
    start, end = ("<start_of_text>", "<end_of_text>")
    vocabulary = {
        piece: index for piece, index in reference.encoder.items() if piece not in (start, end)
    }
    ranked = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    merges = [tuple(pair) for pair in ranked if len(pair) == 2]
    # open_clip's pattern matches a special token in a text as one piece, and its cache maps that
    # piece to one id. Here merges do so: they rank last and start at the special token's first
    # piece, so they never change another text. Intermediate pieces get ids that no text produces.
    extra = reference.vocab_size
    for special in (start, end):
        reference.cache.pop(special)
        pieces = reference.bpe(special).split(" ")
        whole = pieces[0]
        for piece in pieces[1:]:
            merges.append((whole, piece))
            whole += piece
            vocabulary[whole] = extra
            extra += 1
        vocabulary[whole] = reference.encoder[special]
        extra -= 1
    tokens = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    )
    words = "|".join(
        _ignore_case(word) for word in (start, end, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    )
    letters, numbers, neither = (
        _character_class(c) for c in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]")
    )
    pattern = f"{words}|{letters}+|{numbers}|{neither}+"
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokens.decoder = decoders.ByteLevel()
    return Vocabulary(
        content=tokens.to_str(),
        cleaning=cleaning,
        prefix_ids=(reference.sot_token_id,),
        suffix_ids=(reference.eot_token_id,),
        pad_id=0,  # open_clip pads with zeros
        largest_id=reference.vocab_size - 1,
    )


def _character_class(pattern: str) -> str:
    """List the characters that a class of open_clip's pattern matches.

    The regular expressions of `tokenizers` use another version of Unicode, and other rules for
    ignoring case.
    """
    negated = pattern.startswith("[^")
    known = open_clip_regex.compile(pattern, open_clip_regex.IGNORECASE)
    ranges: list[list[int]] = []
    for code in range(0x110000):
        if bool(known.match(chr(code))) == negated:
            continue
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    spelled = "".join(
        rf"\x{{{first:X}}}" + (rf"-\x{{{last:X}}}" if last > first else "")
        for first, last in ranges
    )
    return f"[^{spelled}]" if negated else f"[{spelled}]"


def _ignore_case(word: str) -> str:
    """Match a word in any case, as IGNORECASE does in open_clip (including the long s)."""
    cases = {letter: f"[{letter}{letter.upper()}]" for letter in word if letter.isalpha()}
    if "s" in cases:
        cases["s"] = r"[sS\x{17F}]"
    return "".join(cases.get(letter, letter) for letter in word)


def read_tokenizer(file: Path) -> dict[str, Any]:
    try:
        content = read_bytes(file).decode()
        tokenizers.Tokenizer.from_str(content)
        raw: dict[str, Any] = json.loads(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(
            f"`tokenizer` {file} cannot be read as tokenizers JSON ({error})"
        ) from None
    return raw


def find_pad_id(file: Path) -> int | None:
    """Return the pad id in the JSON or in the folder's tokenizer_config.json."""
    raw = read_tokenizer(file)
    if raw.get("padding"):
        return int(raw["padding"]["pad_id"])
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError):
        return None
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        return None
    found: int | None = tokenizers.Tokenizer.from_str(json.dumps(raw)).token_to_id(name)
    return found


def _find_special_ids(
    raw: Mapping[str, Any], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer adds before and after a text.

    Without a post-processor these are its start and end tokens, if there is one of each.
    """
    tokens = tokenizers.Tokenizer.from_str(json.dumps({**raw, "truncation": None, "padding": None}))
    if raw.get("post_processor"):
        found = set.intersection(*(_find_frames(tokens, probe) for probe in _PROBES))
        if len(found) != 1:
            raise ConfigError(
                f"{where}: its post-processor does more than add tokens before and after a text, "
                "which is not supported; pass `tokenizer=FILE`"
            )
        (frame,) = found
        if frame != ((), ()):
            return frame
    special = {
        token["content"]: token["id"] for token in raw.get("added_tokens", []) if token["special"]
    }
    starts = [special[name] for name in _START if name in special]
    ends = [special[name] for name in _END if name in special]
    if len(starts) != 1 or len(ends) != 1:
        raise ConfigError(
            f"{where}: expected one start and one end token, got special tokens "
            f"{', '.join(special) or 'none'}; add a post-processor (TemplateProcessing)"
        )
    return (starts[0],), (ends[0],)


def _find_frames(tokens: Any, text: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return every (before, after) that turns the plain ids of a text into its full ids."""
    framed = tuple(tokens.encode(text).ids)
    plain = tuple(tokens.encode(text, add_special_tokens=False).ids)
    return {
        (framed[:start], framed[start + len(plain) :])
        for start in range(len(framed) - len(plain) + 1)
        if framed[start : start + len(plain)] == plain
    }


def _find_largest_id(raw: Mapping[str, Any]) -> int:
    vocabulary = tokenizers.Tokenizer.from_str(json.dumps(raw)).get_vocab(with_added_tokens=True)
    return max(vocabulary.values())


def _strip_specials(raw: Mapping[str, Any]) -> str:
    """Return the JSON without post-processor, truncation and padding."""
    return json.dumps(
        {**raw, "post_processor": None, "truncation": None, "padding": None}, ensure_ascii=False
    )

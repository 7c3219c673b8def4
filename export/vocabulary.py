"""A model's tokenizer as one JSON text for the `tokenizers` library, without its specials.

What stands before and after a text (prefix, suffix, padding) lives in the manifest, so that the
device puts sequences together itself and never truncates.
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
    """A tokenizer's JSON and what the manifest says of it."""

    content: str
    cleaning: str
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    pad_id: int
    largest_id: int
    """The largest id that a text can have, its specials included."""


def find_vocabulary(
    model: str,
    text_config: Mapping[str, Any],
    file: Path | None,
    pad_id: int | None,
    pad_matters: bool,
    table_size: int,
) -> Vocabulary:
    """Return the tokenizer that open_clip would use for a model, or the one in `file`.

    `pad_matters` says whether the text tower's feature depends on the padding; where it does, the
    pad id is never guessed.

    Raises: ConfigError when something about it is unclear. Whatever a download raises passes.
    """
    options = text_config.get("tokenizer_kwargs") or {}
    named = text_config.get("hf_tokenizer_name")
    # open_clip's own rule, for models that name no tokenizer
    siglip = not named and ":" not in model and "siglip" in model.lower()
    simple = not named and not siglip
    if text_config.get("tokenizer_mode"):
        raise ConfigError(
            f'model "{model}": tokenizer mode "{text_config["tokenizer_mode"]}" is not supported'
        )
    default = "lower" if simple else "canonicalize" if siglip else "whitespace"
    cleaning = options.get("clean", default)
    if file is not None:
        raw, found_pad, where = _read(file), _pad_of(file), f"`tokenizer` {file}"
    elif simple:
        if {"additional_special_tokens", "bpe_path", "reduction_mask"} & options.keys():
            raise ConfigError(
                f'model "{model}": its tokenizer_kwargs are not supported; pass `tokenizer=FILE`'
            )
        return _checked(simple_tokenizer(cleaning), pad_id, table_size, model)
    else:
        reference = open_clip.get_tokenizer(model).tokenizer
        backend = getattr(reference, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f'model "{model}": its tokenizer {type(reference).__name__} cannot be had as '
                "tokenizers JSON; pass `tokenizer=FILE`"
            )
        raw, found_pad, where = json.loads(backend.to_str()), reference.pad_token_id, model
    if pad_id is None:
        pad_id = found_pad
    if pad_id is None:
        pad_id = text_config.get("pad_id")
    if pad_id is None and not pad_matters:
        pad_id = 0  # nothing that stands after the end of a text changes this tower's feature
    if pad_id is None:
        raise ConfigError(
            f'{where} names no padding token, and the text tower of "{model}" sees the padding; '
            "say which id it was trained with: `pad_id=N`"
        )
    prefix, suffix = _specials(raw, where)
    if options.get("strip_sep_token"):
        separator = tokenizers.Tokenizer.from_str(json.dumps(raw)).token_to_id("[SEP]")
        prefix = tuple(0 if token == separator else token for token in prefix)
        suffix = tuple(0 if token == separator else token for token in suffix)
    # Added tokens that the model has no row for (T5's <extra_id_0>, ...) can stand in no text.
    raw["added_tokens"] = [
        token
        for token in raw.get("added_tokens", [])
        if token["id"] < table_size or token["id"] in (*prefix, *suffix)
    ]
    vocabulary = Vocabulary(_bare(raw), cleaning, prefix, suffix, pad_id, _largest(raw))
    return _checked(vocabulary, None, table_size, where)


def _checked(vocabulary: Vocabulary, pad_id: int | None, table_size: int, where: str) -> Vocabulary:
    if pad_id is not None:
        vocabulary = dataclasses.replace(vocabulary, pad_id=pad_id)
    largest = max(vocabulary.largest_id, vocabulary.pad_id)
    if largest >= table_size:
        raise ConfigError(
            f"{where}: the tokenizer has ids up to {largest}, the model's token table has "
            f"{table_size} rows: it is not this model's tokenizer; pass the right one: "
            "`tokenizer=FILE`"
        )
    return vocabulary


@functools.cache
def simple_tokenizer(cleaning: str) -> Vocabulary:
    """Rebuild open_clip's own byte-level BPE so that it gives the same ids for every text."""
    reference = open_clip.SimpleTokenizer(clean=cleaning if cleaning != "none" else "lower")
    start, end = ("<start_of_text>", "<end_of_text>")
    vocabulary = {
        piece: index for piece, index in reference.encoder.items() if piece not in (start, end)
    }
    ranked = sorted(reference.bpe_ranks, key=reference.bpe_ranks.__getitem__)
    merges = [tuple(pair) for pair in ranked if len(pair) == 2]
    # open_clip's pattern takes a special in a text as one piece and its cache gives that piece one
    # id. Here merges do: last in rank and only from the special's first piece on, so that they
    # never touch another text. What they pass through gets ids that no text ends with.
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
        _any_case(word) for word in (start, end, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    )
    letters, numbers, neither = (_class(c) for c in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
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


def _class(pattern: str) -> str:
    """Spell out which characters a class of open_clip's pattern matches.

    The expressions inside `tokenizers` follow another version of Unicode, and other rules where
    case is ignored.
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


def _any_case(word: str) -> str:
    """Match a word in any case, as open_clip's IGNORECASE does (the long s included)."""
    cases = {letter: f"[{letter}{letter.upper()}]" for letter in word if letter.isalpha()}
    if "s" in cases:
        cases["s"] = r"[sS\x{17F}]"
    return "".join(cases.get(letter, letter) for letter in word)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_bytes(file).decode()
        tokenizers.Tokenizer.from_str(content)
        raw: dict[str, Any] = json.loads(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(
            f"`tokenizer` {file} cannot be read as a tokenizers JSON ({error})"
        ) from None
    return raw


def _pad_of(file: Path) -> int | None:
    """Return the pad id that the JSON, or the tokenizer_config.json beside it, names."""
    raw = _read(file)
    if raw.get("padding"):
        return int(raw["padding"]["pad_id"])
    beside = file.with_name("tokenizer_config.json")
    if not beside.is_file():
        return None
    try:
        token = json.loads(beside.read_text(encoding="utf-8")).get("pad_token")
    except (ValueError, AttributeError):
        return None
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        return None
    found: int | None = tokenizers.Tokenizer.from_str(json.dumps(raw)).token_to_id(name)
    return found


def _specials(raw: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the tokenizer puts before and after a text.

    Without a post-processor it is what its special tokens say, when there is just one way.
    """
    tokens = tokenizers.Tokenizer.from_str(json.dumps({**raw, "truncation": None, "padding": None}))
    if raw.get("post_processor"):
        found = set.intersection(*(_frames(tokens, probe) for probe in _PROBES))
        if len(found) != 1:
            raise ConfigError(f"{where}: its post-processor does not just frame a text")
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
            f"{where}: unclear which tokens frame a text; its special tokens are "
            f"{', '.join(special) or 'none'}; give it a post-processor (TemplateProcessing)"
        )
    return (starts[0],), (ends[0],)


def _frames(tokens: Any, text: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return every (before, after) that makes the framed ids of a text from its plain ones."""
    framed = tuple(tokens.encode(text).ids)
    plain = tuple(tokens.encode(text, add_special_tokens=False).ids)
    return {
        (framed[:start], framed[start + len(plain) :])
        for start in range(len(framed) - len(plain) + 1)
        if framed[start : start + len(plain)] == plain
    }


def _largest(raw: Mapping[str, Any]) -> int:
    vocabulary = tokenizers.Tokenizer.from_str(json.dumps(raw)).get_vocab(with_added_tokens=True)
    return max(vocabulary.values())


def _bare(raw: Mapping[str, Any]) -> str:
    """Return the JSON without what the manifest says: frame, truncation and padding."""
    return json.dumps(
        {**raw, "post_processor": None, "truncation": None, "padding": None}, ensure_ascii=False
    )

"""Inputs of the prompt graph besides contexts: class names as rows of the token table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, TextSpec
from runtimes.tokenizer import Tokenizer
from ztune.errors import ConfigError, DataError, FormatError
from ztune.printing import reason_of
from ztune.types import F32, I64, PromptEncoder, TokenRows


def token_table(bundle: Bundle) -> TokenRows:
    """Return the token embeddings [vocabulary, d], memory-mapped.

    They are f16 in a bundle that stores weights in half precision: widen what you use (`embed`).
    """
    table = bundle.map_table()
    if table is None:
        table = _load_table(bundle)
    specials = (*bundle.text.prefix_ids, *bundle.text.suffix_ids, bundle.text.pad_id)
    require_rows(table, np.array(specials, np.int64))
    return table


def _load_table(bundle: Bundle) -> F32:
    """Return the token table of a bundle of version 1."""
    path = bundle.file("token_table.npy")
    try:
        table: F32 = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many types for a damaged header
        raise FormatError(f"{path} cannot be read ({reason_of(error)}); export again") from None
    if table.ndim != 2 or table.dtype != np.float32 or table.shape[1] != bundle.text.width:
        raise FormatError(
            f"{path} is {table.dtype}{list(table.shape)}, expected float32[*, {bundle.text.width}]"
        )
    return table


def require_rows(table: TokenRows, ids: I64) -> None:
    """Check that all ids are rows of the token table.

    Raises: FormatError naming the largest.
    """
    if ids.size and ids.max() >= len(table):
        raise FormatError(
            f"the token table has {len(table)} rows, expected more than {ids.max()}, the id of a "
            "token (file damaged; export again)"
        )


def embed(table: TokenRows, ids: I64) -> F32:
    """Return the embeddings f32[n, d] of token ids i64[n].

    Raises: FormatError for a table that is too short.
    """
    require_rows(table, ids)
    return np.asarray(table[ids], dtype=np.float32)


def name_tokens(
    spec: TextSpec, tokenizer: Tokenizer, class_names: Sequence[str], n_context: int
) -> list[tuple[int, ...]]:
    """Return the checked ids of each class name and a full stop, without prefix and suffix."""
    if n_context < 1:
        raise ConfigError(f"`n_context` is {n_context}, expected at least 1")
    n_specials = len(spec.prefix_ids) + len(spec.suffix_ids)
    names = distinct_names(spec, tokenizer, class_names)
    for name, ids in zip(class_names, names, strict=True):
        total = n_context + len(ids) + n_specials
        if total > spec.context_length:
            raise DataError(
                f"class {name!r} is too long: context {n_context} + name {len(ids)} + special "
                f"{n_specials} = {total} tokens, expected at most {spec.context_length}; "
                "shorten the context or the name"
            )
    return names


def distinct_names(
    spec: TextSpec, tokenizer: Tokenizer, class_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return the distinct ids of each class name and a full stop.

    Raises: DataError naming a class without tokens or with a special token, or two classes with the
        same tokens.
    """
    if not class_names:
        raise DataError("no class names")
    specials = {*spec.prefix_ids, *spec.suffix_ids}
    seen: dict[tuple[int, ...], str] = {}
    for name in class_names:
        ids = tokenizer.encode(f"{name}.")
        if not ids or not name.strip():
            raise DataError(f"class {name!r} has no tokens after cleaning; rename it")
        if specials & set(ids):
            raise DataError(f"class {name!r} contains one of the model's special tokens; rename it")
        if ids in seen:
            raise DataError(
                f"classes {seen[ids]!r} and {name!r} have the same tokens, so the model cannot "
                "distinguish them; rename one"
            )
        seen[ids] = name
    return list(seen)


def name_lengths(spec: TextSpec, names: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the number of tokens that the prompt graph computes for each class."""
    if spec.graph == "prefix":
        return [len(ids) + len(spec.suffix_ids) for ids in names]
    return [spec.context_length] * len(names)


def feeds(
    spec: TextSpec,
    table: TokenRows,
    names: Sequence[tuple[int, ...]],
    n_context: int,
    width: int | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Return a prompt graph's inputs except `contexts`, for checked ids; see export/graphs.py.

    `width` is the length of the padded grid of names; None: that of the longest (`name_lengths`).
    """
    if spec.graph == "prefix":
        return _prefix_feeds(spec, table, names, width)
    return _sequence_feeds(spec, table, names, n_context)


def _prefix_feeds(
    spec: TextSpec, table: TokenRows, names: Sequence[tuple[int, ...]], width: int | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the real tokens packed in sequence, and indices to and from the grid [C, n]."""
    rows = [(*ids, *spec.suffix_ids) for ids in names]
    lengths = np.array([len(row) for row in rows])
    starts = np.cumsum(lengths) - lengths
    steps = np.arange(width or lengths.max())
    real = steps < lengths[:, None]  # [C, n]
    packed = np.array([token for row in rows for token in row])
    return {
        "name_embeddings": embed(table, packed),
        "name_positions": np.concatenate([steps[:length] for length in lengths]).astype(np.int64),
        # Padding of the grid may be any row, since it is masked.
        "pad_index": np.where(real, starts[:, None] + steps, 0).astype(np.int64),
        "unpad_index": np.flatnonzero(real).astype(np.int64),
        "eot_index": (starts + lengths - 1).astype(np.int64),
    }


def _sequence_feeds(
    spec: TextSpec, table: TokenRows, names: Sequence[tuple[int, ...]], n_context: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Return whole sequences: rows of [contexts; name embeddings], and ids."""
    tokens = np.full((len(names), spec.context_length), spec.pad_id, dtype=np.int64)
    placeholder = placeholder_id(spec)
    for row, ids in zip(tokens, names, strict=True):
        sequence = [*spec.prefix_ids, *[placeholder] * n_context, *ids, *spec.suffix_ids]
        row[: len(sequence)] = sequence
    used, index = np.unique(tokens, return_inverse=True)
    index = index.reshape(tokens.shape) + n_context
    first = len(spec.prefix_ids)
    index[:, first : first + n_context] = np.arange(n_context)
    return {
        "name_embeddings": embed(table, used),
        "sequence_index": index.astype(np.int64),
        "tokens": tokens,
    }


def placeholder_id(spec: TextSpec) -> int:
    """Return the id of context tokens for open_clip's masks and pooling.

    It is the smallest that is not special, so not padding, end-of-text or the largest.
    """
    specials = {*spec.prefix_ids, *spec.suffix_ids, spec.pad_id}
    return next(token for token in range(len(specials) + 1) if token not in specials)


def template_tokens(
    bundle: Bundle, tokenizer: Tokenizer, template: str, class_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return the ids of a template ("a photo of a {}.") for each name, without special tokens.

    Raises: ConfigError for a template without exactly one {}, DataError for a text too long.
    """
    if template.count("{}") != 1:
        raise ConfigError(f'template "{template}" has {template.count("{}")} {{}}, expected one')
    distinct_names(bundle.text, tokenizer, class_names)
    texts = [tokenizer.encode(template.replace("{}", name)) for name in class_names]
    tokenizer.pad([(*bundle.text.prefix_ids, *s, *bundle.text.suffix_ids) for s in texts])
    return texts


def group_by_prefix(
    texts: Sequence[tuple[int, ...]],
) -> Iterator[tuple[list[int], tuple[int, ...], list[tuple[int, ...]]]]:
    """Yield groups of texts with a common prefix: their indices, the prefix and each remainder.

    The prefix serves as context, so that the prompt graph encodes templates too.
    """
    groups: dict[int, list[int]] = {}
    for index, ids in enumerate(texts):
        groups.setdefault(ids[0], []).append(index)
    for indices in groups.values():
        given = [texts[index] for index in indices]
        columns = zip(*given, strict=False)  # up to the shortest
        differing = (n for n, column in enumerate(columns) if len(set(column)) > 1)
        n_shared = next(differing, min(len(ids) for ids in given))
        yield indices, given[0][:n_shared], [ids[n_shared:] for ids in given]


def encode_template(
    bundle: Bundle,
    tokenizer: Tokenizer,
    template: str,
    class_names: Sequence[str],
    encoder_of: Callable[[Sequence[tuple[int, ...]], int], PromptEncoder],
) -> F32:
    """Return the unit features f32[C, e] of a template filled with the class names.

    `encoder_of` returns the encoder for names of given ids and a context length; the common prefix
    of the texts is encoded as a context.

    Raises: ConfigError for the template, DataError for a name.
    """
    features = np.empty((len(class_names), bundle.embed_dim), dtype=np.float32)
    texts = template_tokens(bundle, tokenizer, template, class_names)
    table = token_table(bundle)
    for indices, prefix, rests in group_by_prefix(texts):
        context = embed(table, np.array(prefix, np.int64))
        features[indices] = encoder_of(rests, len(prefix)).encode(context[None])[0]
    return features


def tokenize_words(tokenizer: Tokenizer, words: str) -> I64:
    """Return the token ids i64[m] of `words`."""
    ids = tokenizer.encode(words)
    if not ids:
        raise ConfigError(f'initial context "{words}" has no tokens')
    return np.array(ids, dtype=np.int64)


def embed_words(bundle: Bundle, tokenizer: Tokenizer, words: str) -> F32:
    """Return the token embeddings f32[m, d] of `words`, as an initial context."""
    return embed(token_table(bundle), tokenize_words(tokenizer, words))

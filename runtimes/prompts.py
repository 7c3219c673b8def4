"""What the prompt graph is fed besides the contexts: class names as rows of the token table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, TextSpec
from runtimes.tokenizer import Tokenizer
from ztune.errors import ConfigError, DataError, FormatError
from ztune.types import F32, I64, PromptEncoder


def token_table(bundle: Bundle) -> F32:
    """Return the token embeddings f32[vocabulary, d], memory-mapped."""
    path = bundle.file("token_table.npy")
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(f"{path} cannot be read ({error}); export again") from None
    if table.ndim != 2 or table.dtype != np.float32 or table.shape[1] != bundle.text.width:
        raise FormatError(
            f"{path} is {table.dtype}{list(table.shape)}, expected float32[*, {bundle.text.width}]"
        )
    return table


def name_tokens(
    spec: TextSpec, tokenizer: Tokenizer, class_names: Sequence[str], n_context: int
) -> list[tuple[int, ...]]:
    """Return the checked ids of each class name with its full stop, without prefix and suffix."""
    if n_context < 1:
        raise ConfigError(f"a context has at least 1 token, got {n_context}")
    n_specials = len(spec.prefix_ids) + len(spec.suffix_ids)
    names = distinct_names(spec, tokenizer, class_names)
    for name, ids in zip(class_names, names, strict=True):
        total = n_context + len(ids) + n_specials
        if total > spec.context_length:
            raise DataError(
                f"class {name!r} does not fit: context {n_context} + name {len(ids)} + specials "
                f"{n_specials} = {total} tokens, the model takes {spec.context_length}; "
                "shorten the context or the name"
            )
    return names


def distinct_names(
    spec: TextSpec, tokenizer: Tokenizer, class_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return the ids of each class name with its full stop, all different.

    Raises: DataError naming a class without tokens or with a special one, or two classes that the
        model cannot tell apart.
    """
    if not class_names:
        raise DataError("no class names")
    specials = {*spec.prefix_ids, *spec.suffix_ids}
    seen: dict[tuple[int, ...], str] = {}
    for name in class_names:
        ids = tokenizer.encode(f"{name}.")
        if not ids or not name.strip():
            raise DataError(f"class {name!r} has no tokens: nothing of the name is left to read")
        if specials & set(ids):
            raise DataError(f"class {name!r} contains one of the model's special tokens; rename it")
        if ids in seen:
            raise DataError(
                f"classes {seen[ids]!r} and {name!r} have the same tokens, "
                "so the model cannot tell them apart; rename one"
            )
        seen[ids] = name
    return list(seen)


def name_lengths(spec: TextSpec, names: Sequence[tuple[int, ...]]) -> list[int]:
    """Return how many tokens of each class the prompt graph computes."""
    if spec.graph == "prefix":
        return [len(ids) + len(spec.suffix_ids) for ids in names]
    return [spec.context_length] * len(names)


def feeds(
    spec: TextSpec, table: F32, names: Sequence[tuple[int, ...]], n_context: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Return all inputs of a prompt graph but `contexts`, for checked ids; see export/graphs.py."""
    if spec.graph == "prefix":
        return _prefix_feeds(spec, table, names)
    return _sequence_feeds(spec, table, names, n_context)


def _prefix_feeds(
    spec: TextSpec, table: F32, names: Sequence[tuple[int, ...]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Real tokens packed row behind row, and the way to the grid [C, n] and back."""
    rows = [(*ids, *spec.suffix_ids) for ids in names]
    lengths = np.array([len(row) for row in rows])
    starts = np.cumsum(lengths) - lengths
    steps = np.arange(lengths.max())
    real = steps < lengths[:, None]  # [C, n]
    packed = np.array([token for row in rows for token in row])
    return {
        "name_embeddings": np.asarray(table[packed], dtype=np.float32),
        "name_positions": np.concatenate([steps[:length] for length in lengths]).astype(np.int64),
        # Where the grid has no token any row will do: nothing looks at it.
        "pad_index": np.where(real, starts[:, None] + steps, 0).astype(np.int64),
        "unpad_index": np.flatnonzero(real).astype(np.int64),
        "eot_index": (starts + lengths - 1).astype(np.int64),
    }


def _sequence_feeds(
    spec: TextSpec, table: F32, names: Sequence[tuple[int, ...]], n_context: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Whole sequences: which row of [contexts; name embeddings] stands where, and as which id."""
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
        "name_embeddings": np.asarray(table[used], dtype=np.float32),
        "sequence_index": index.astype(np.int64),
        "tokens": tokens,
    }


def placeholder_id(spec: TextSpec) -> int:
    """Return the id that open_clip's masks and pooling see in the context's place.

    The smallest that is no special: neither padding nor an end, and never the largest.
    """
    specials = {*spec.prefix_ids, *spec.suffix_ids, spec.pad_id}
    return next(token for token in range(len(specials) + 1) if token not in specials)


def template_sentences(
    bundle: Bundle, tokenizer: Tokenizer, template: str, class_names: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return the ids of a template such as "a photo of a {}." filled with each name, no specials.

    Raises: ConfigError for a template without exactly one {}, DataError for a text too long.
    """
    if template.count("{}") != 1:
        raise ConfigError(f'template "{template}" has {template.count("{}")} {{}}, expected one')
    distinct_names(bundle.text, tokenizer, class_names)
    sentences = [tokenizer.encode(template.replace("{}", name)) for name in class_names]
    tokenizer.pad([(*bundle.text.prefix_ids, *s, *bundle.text.suffix_ids) for s in sentences])
    return sentences


def shared_starts(
    sentences: Sequence[tuple[int, ...]],
) -> Iterator[tuple[list[int], tuple[int, ...], list[tuple[int, ...]]]]:
    """Yield sentences that begin alike: which, the ids they all begin with, and each one's rest.

    The start serves as their context, so that the prompt graph encodes hand-written prompts too.
    """
    alike: dict[int, list[int]] = {}
    for index, ids in enumerate(sentences):
        alike.setdefault(ids[0], []).append(index)
    for indices in alike.values():
        given = [sentences[index] for index in indices]
        columns = zip(*given, strict=False)  # as far as the shortest
        differing = (n for n, column in enumerate(columns) if len(set(column)) > 1)
        n_shared = next(differing, min(len(ids) for ids in given))
        yield indices, given[0][:n_shared], [ids[n_shared:] for ids in given]


def encoded_sentences(
    bundle: Bundle,
    tokenizer: Tokenizer,
    template: str,
    class_names: Sequence[str],
    encoder_of: Callable[[Sequence[tuple[int, ...]], int], PromptEncoder],
) -> F32:
    """Return the unit features f32[C, e] of a hand-written template filled with the classes.

    `encoder_of` makes the encoder of contexts of some tokens before names of these ids: what the
    sentences begin with is encoded as a context.

    Raises: ConfigError for the template, DataError for a name.
    """
    features = np.empty((len(class_names), bundle.embed_dim), dtype=np.float32)
    sentences = template_sentences(bundle, tokenizer, template, class_names)
    table = token_table(bundle)
    for indices, start, rests in shared_starts(sentences):
        context = np.asarray(table[list(start)], dtype=np.float32)
        features[indices] = encoder_of(rests, len(start)).encode(context[None])[0]
    return features


def ids_of_words(tokenizer: Tokenizer, words: str) -> I64:
    """Return the token ids i64[m] of `words`."""
    ids = tokenizer.encode(words)
    if not ids:
        raise ConfigError(f'initial context "{words}" has no tokens')
    return np.array(ids, dtype=np.int64)


def context_of_words(bundle: Bundle, tokenizer: Tokenizer, words: str) -> F32:
    """Return f32[m, d], the token embeddings of `words`: a context to start from."""
    return np.array(token_table(bundle)[ids_of_words(tokenizer, words)], dtype=np.float32)

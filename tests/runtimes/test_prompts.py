"""Inputs of the prompt graphs: tokens of class names, never truncated."""

import numpy as np
import pytest

from runtimes.bundle import TextSpec, load_bundle
from runtimes.prompts import (
    embed_words,
    feeds,
    group_by_prefix,
    name_tokens,
    placeholder_id,
    template_tokens,
)
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from tests.runtimes.test_tokenizer import make
from ztune.errors import ConfigError, DataError

NAMES = ("cat", "traffic light", "red panda")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make(context_length=12)


def table(spec: TextSpec) -> np.ndarray:
    """Return a table whose rows contain their id."""
    return np.repeat(np.arange(49408, dtype=np.float32)[:, None], spec.width, axis=1)


def test_prefix_feeds_are_the_names_packed(tokenizer: Tokenizer) -> None:
    spec = tokenizer.spec
    names = name_tokens(spec, tokenizer, NAMES, 4)
    assert names == [tokenizer.encode(f"{name}.") for name in NAMES]
    given = feeds(spec, table(spec), names, 4)
    grid = given["name_embeddings"][given["pad_index"]][:, :, 0]
    for row, end, ids in zip(grid, given["eot_index"], names, strict=True):
        assert row[: len(ids) + 1].tolist() == [*ids, 49407]
        assert given["name_embeddings"][end, 0] == 49407
        assert given["name_positions"][end] == len(ids)
    flat = given["name_embeddings"][given["pad_index"]].reshape(-1, spec.width)
    np.testing.assert_array_equal(flat[given["unpad_index"]], given["name_embeddings"])
    assert {v.dtype.name for k, v in given.items()} == {"float32", "int64"}


def test_sequence_feeds_are_whole_sequences(tokenizer: Tokenizer) -> None:
    spec = TextSpec(**{**vars(tokenizer.spec), "graph": "sequence"})
    names = name_tokens(spec, tokenizer, NAMES, 3)
    given = feeds(spec, table(spec), names, 3)
    contexts = np.full((3, spec.width), -1, dtype=np.float32)
    rows = np.concatenate([contexts, given["name_embeddings"]])[given["sequence_index"]][:, :, 0]
    for row, tokens, ids in zip(rows, given["tokens"], names, strict=True):
        after = [*ids, 49407]
        padding = [0] * (12 - 4 - len(after))
        assert row.tolist() == [49406, -1, -1, -1, *after, *padding]
        assert tokens.tolist() == [49406, 1, 1, 1, *after, *padding]


def test_the_placeholder_is_not_special(tokenizer: Tokenizer) -> None:
    spec = tokenizer.spec
    assert placeholder_id(spec) == 1
    assert placeholder_id(TextSpec(**{**vars(spec), "suffix_ids": (1,), "pad_id": 2})) == 0


def test_a_name_that_is_too_long_is_an_error(tokenizer: Tokenizer) -> None:
    spec = tokenizer.spec
    assert len(name_tokens(spec, tokenizer, NAMES, 7)) == 3
    message = (
        r"class 'traffic light' is too long: context 8 \+ name 3 \+ special 2 = 13 tokens, "
        "expected at most 12; shorten the context or the name"
    )
    with pytest.raises(DataError, match=message):
        name_tokens(spec, tokenizer, NAMES, 8)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Cat", "dog", "  CAT "), "classes 'Cat' and '  CAT ' have the same tokens"),
        (("caf\u00e9", "cafe\u0301"), "have the same tokens"),
        (("cat", ""), "class '' has no tokens"),
        (("cat", "  "), "has no tokens"),
        (("cat", "<end_of_text>"), "special tokens; rename it"),
        ((), "no class names"),
    ],
)
def test_names_the_model_cannot_use(
    tokenizer: Tokenizer, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        name_tokens(tokenizer.spec, tokenizer, names, 4)


def test_a_context_has_a_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="`n_context` is 0, expected at least 1"):
        name_tokens(tokenizer.spec, tokenizer, NAMES, 0)


def test_canonical_cleaning_drops_the_full_stop() -> None:
    tokenizer = make("canonicalize", context_length=12)
    ((ids),) = name_tokens(tokenizer.spec, tokenizer, ("cat",), 4)
    assert ids == tokenizer.encode("cat")
    with pytest.raises(DataError, match="class '!!' has no tokens"):
        name_tokens(tokenizer.spec, tokenizer, ("!!",), 4)


def test_a_template_has_one_place() -> None:
    bundle = load_bundle(MINI)
    tokenizer = Tokenizer(bundle)
    texts = template_tokens(bundle, tokenizer, "a photo of a {}.", ("cat", "dog"))
    assert texts[0] == tokenizer.encode("a photo of a cat.")
    for template in ("a photo", "{} and {}"):
        with pytest.raises(ConfigError, match="expected one"):
            template_tokens(bundle, tokenizer, template, ("cat",))
    with pytest.raises(DataError, match="shorten it"):
        template_tokens(bundle, tokenizer, f"{'a long ' * 80}{{}}", ("cat",))
    context = embed_words(bundle, tokenizer, "a photo of a")
    assert context.shape == (len(tokenizer.encode("a photo of a")), bundle.text.width)
    assert context.flags.writeable
    with pytest.raises(ConfigError, match="has no tokens"):
        embed_words(bundle, tokenizer, "  ")


def test_texts_are_grouped_by_common_prefix() -> None:
    texts = [(5, 6, 7), (8, 9), (5, 6), (5, 6, 7, 4)]
    assert list(group_by_prefix(texts)) == [
        ([0, 2, 3], (5, 6), [(7,), (), (7, 4)]),
        ([1], (8, 9), [()]),
    ]

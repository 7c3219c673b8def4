"""Compare the device's tokenizer with open_clip's on adversarial text."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from export.vocabulary import simple_tokenizer
from runtimes.bundle import TextSpec, load_bundle
from runtimes.tokenizer import Tokenizer, clean
from tests.conftest import MINI
from ztune.errors import DataError, FormatError

REFERENCE = open_clip.SimpleTokenizer()
PIECES = [
    "<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<ſtart_of_text>", "<start_of_text",
    "'s", "'S", "'ſ", "'ll", "'RE", "don't", "we'LL", "’ll", "!", "!!", "!?", "...", "<", "_",
    "&amp;", "&amp;lt;", "&#39;s", "&nbsp;", "&lt;end_of_text&gt;", "&notanentity;", "%20",
    "Ã©", "â€™s", "schÃ¶n", "ï¬\x81", "é", "e\u0301", "ß", "ẞ", "ﬆ", "ﬁ", "İ", "ı", "K", "Å",
    "42", "3.14", "٣", "Ⅷ", "½", "²", "漢字", "한국어", "ไทย", "हिन्दी", "עברית", "العربية", "ﷺ",
    "👩‍👩‍👧", "🇩🇪", "😀😀", "\u200b", "\u200d", "\ufeff", "\x00", "\x07", "\x1f", "\x7f", "\x85",
    "\n\t", "\r\n", "\u2028", "\u3000", "\xa0", "</w>", "Ġ", "Ċ", "cat", "DOG's", "a", "Z", " ",
    "\U00031350", "\u0558", "\U00016ff4", "\ua7ce", "\ue000", "\ufffd", "\U0010ffff", "\u0378",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make()


def make(cleaning: Any = "lower", context_length: int = 77) -> Tokenizer:
    found = simple_tokenizer(cleaning)
    spec = TextSpec(
        width=8,
        context_length=context_length,
        prefix_ids=found.prefix_ids,
        suffix_ids=found.suffix_ids,
        pad_id=found.pad_id,
        cleaning=cleaning,
        causal=True,
        pooling="argmax",
        graph="prefix",
    )
    return Tokenizer.from_json(found.content, spec)


TOKENIZER = make()


def test_adversarial_strings_have_open_clips_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = list(PIECES)
    for _ in range(3000):
        pieces = rng.choices(PIECES, k=rng.randrange(1, 9))
        # any code point at all, but no lone surrogates: no encoding has them
        pieces += [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))]
        rng.shuffle(pieces)
        texts.append("".join(pieces))
    wrong = [text for text in texts if tokenizer.encode(text) != tuple(REFERENCE.encode(text))]
    assert wrong == []


def test_every_character_is_split_as_open_clip_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # The regex libraries follow different versions of Unicode: 17,000 letters differ.
    monkeypatch.setattr(REFERENCE, "clean_fn", str)
    tokenizer = make("none")
    points = [*range(0x3000), *range(0x3000, 0xD800, 29), *range(0xE000, 0x110000, 29)]
    for start in range(0, len(points), 500):
        text = "!".join(f"a{chr(point)}1" for point in points[start : start + 500])
        assert tokenizer.encode(text) == tuple(REFERENCE.encode(text))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_open_clips_ids(text: str) -> None:
    assert TOKENIZER.encode(text) == tuple(REFERENCE.encode(text))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_cleaning_is_open_clips(pieces: list[str]) -> None:
    text = "".join(pieces)
    for kind in ("lower", "whitespace", "canonicalize"):
        assert clean(text, kind) == open_clip.tokenizer.get_clean_fn(kind)(text)
    assert clean(text, "none") == text


def test_other_cleaning_of_the_same_vocabulary() -> None:
    reference = open_clip.SimpleTokenizer(clean="canonicalize")
    tokenizer = make("canonicalize")
    for text in ("a Photo_of, a cat.", "<start_of_text>!", "it's"):
        assert tokenizer.encode(text) == tuple(reference.encode(text))


def test_whole_sequences_are_open_clips(tokenizer: Tokenizer) -> None:
    texts = ["a photo of a cat.", "", "it's 42!"]
    expected = REFERENCE(texts).numpy()
    assert (tokenizer.pad([tokenizer.sequence(text) for text in texts]) == expected).all()


def test_a_text_that_is_too_long_is_never_truncated() -> None:
    tokenizer = make(context_length=6)
    assert tokenizer.pad([tokenizer.sequence("one two three four")]).shape == (1, 6)
    with pytest.raises(DataError, match=r"'one two three four five' has 7 tokens .* at most 6"):
        tokenizer.pad([tokenizer.sequence("one two three four five")])


def test_decoded_ids_are_readable(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.sequence("Traffic light.")) == "traffic light ."


def test_a_broken_file_is_named() -> None:
    with pytest.raises(FormatError, match="tokenizer cannot be read"):
        Tokenizer.from_json("{", TOKENIZER.spec)


def test_after_release_encoded_texts_stay_cached() -> None:
    tokenizer = Tokenizer(load_bundle(MINI))
    seen = tokenizer.encode("a photo of a cat.")
    tokenizer.release()
    assert tokenizer._loaded is None
    assert tokenizer.encode("a photo of a cat.") == seen
    assert tokenizer._loaded is None
    assert tokenizer.encode("a dog") == Tokenizer(load_bundle(MINI)).encode("a dog")


def test_text_ids_exclude_special_tokens() -> None:
    bundle = load_bundle(MINI)
    tokenizer, spec = Tokenizer(bundle), bundle.text
    ids = tokenizer.text_ids()
    assert ids.dtype == np.int64
    frame = {*spec.prefix_ids, *spec.suffix_ids, spec.pad_id}
    added = tokenizers.Tokenizer.from_file(str(MINI / "tokenizer.json")).get_added_tokens_decoder()
    n_tokens = len(np.load(MINI / "token_table.npy", mmap_mode="r"))
    expected = set(range(n_tokens)) - frame - set(added)
    assert ids.tolist() == sorted(expected)
    assert set(tokenizer.encode("a photo of a cat, it's 42!")) <= set(ids.tolist())
    # Cached without the vocabulary.
    tokenizer.release()
    assert tokenizer.text_ids() is ids
    assert tokenizer._loaded is None


def test_text_ids_exclude_placeholders_and_added_tokens() -> None:
    # Sorted neither by id nor by name.
    vocabulary = {
        "zebra": 12, "[PAD]": 0, "[unused1]": 1, "[CLS]": 2, "cat": 11, "[SEP]": 3, "[UNK]": 4,
        "<extra_id_17>": 5, "<unused99>": 6, "<0x0A>": 7, "unused1": 8, "[unused]": 9, "dog": 10,
        "[unused1]a": 13, "end": 16,
    }  # fmt: skip
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.add_special_tokens(["[UNK]", "[MASK]"])
    built.add_tokens(["<image>"])
    spec = replace(TOKENIZER.spec, prefix_ids=(2,), suffix_ids=(3, 16), pad_id=0)
    ids = Tokenizer.from_json(built.to_str(), spec).text_ids()
    assert ids.dtype == np.int64
    assert ids.tolist() == [8, 9, 10, 11, 12, 13]

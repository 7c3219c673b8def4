"""The model's tokenizer: CLIP's layout, with merges learnt from the caption grammar."""

import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from examples.mini_clip.captions import COLOUR_NAMES, COUNTS, describe
from examples.mini_clip.images import draw

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH: Final = 24
_WORD_END: Final = "</w>"
_PIECES: Final = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def build_tokenizer(n_captions: int = 20_000) -> Tokenizer:
    """Learn merges from generated captions until every word of the grammar is one token."""
    rng = np.random.default_rng(0)  # the vocabulary is the same for every training seed
    texts = [*COLOUR_NAMES, *COUNTS]
    while len(texts) < n_captions:
        texts += [describe(image, rng).text for image in draw(1000, rng)[1]]
    learner = _pipeline(Tokenizer(BPE(end_of_word_suffix=_WORD_END)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=4096,
            initial_alphabet=alphabet,
            end_of_word_suffix=_WORD_END,
            show_progress=False,
        ),
    )
    learnt: list[Any] = json.loads(learner.to_str())["model"]["merges"]
    merges = [(str(left), str(right)) for left, right in learnt]
    # Every byte inside a word and at its end, even if unused by the grammar.
    pieces = [*alphabet, *(letter + _WORD_END for letter in alphabet)]
    pieces += dict.fromkeys(left + right for left, right in merges)
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = _pipeline(Tokenizer(BPE(vocabulary, merges, end_of_word_suffix=_WORD_END)))
    tokenizer.add_special_tokens([START, END])  # the two highest ids: the text tower pools at END
    ends = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=ends
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int64]:
    """Return token ids i64[N, 24], padded with 0.

    Raises: ValueError for a text longer than the context.
    """
    ids = np.zeros((len(texts), CONTEXT_LENGTH), np.int64)
    for row, encoding in zip(ids, tokenizer.encode_batch(texts), strict=True):
        if len(encoding.ids) > CONTEXT_LENGTH:
            raise ValueError(
                f"caption of {len(encoding.ids)} tokens, expected at most {CONTEXT_LENGTH}"
            )
        row[: len(encoding.ids)] = encoding.ids
    return ids


def _pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Set up lower-casing, single spaces, CLIP's pieces and bytes, for training and use."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

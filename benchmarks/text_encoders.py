"""Small Hugging Face text encoders and tokenizers, one of each family that open_clip can build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = (
    "a photo of a cat. the old house by the sea! red panda 42, traffic light",
    "ein Foto einer Katze. une photo d'un chat. 一张猫的照片。 фотография кота",
    "boats and dogs; a sketch of a very large traffic light in the rain",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,;:!?'-_&<>/#()",
)
FAMILIES = ("roberta", "xlm-roberta", "bert", "mt5", "nllb")


def family_of(name: str) -> str:
    """Return the family of a published text encoder or tokenizer."""
    known = {
        "nllb": "nllb", "mt5": "mt5", "SigLIP": "mt5", "xlm": "xlm-roberta", "roberta": "roberta",
        "bert": "bert",
    }  # fmt: skip
    return next(family for word, family in known.items() if word in name)


def write_encoder(family: str, folder: Path, **changes: Any) -> None:
    """Write a text encoder's config.json and its tokenizer."""
    tokenizer = write_tokenizer(family, folder)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    _config(family, sizes | changes).save_pretrained(folder)


def _config(family: str, given: dict[str, Any]) -> Any:
    if family == "mt5":
        small = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        return transformers.MT5Config(**small, **given)
    if family == "nllb":
        small = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
        small |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
        return transformers.M2M100Config(d_model=32, max_position_embeddings=128, **small, **given)
    kind = {
        "roberta": transformers.RobertaConfig,
        "xlm-roberta": transformers.XLMRobertaConfig,
        "bert": transformers.BertConfig,
    }[family]
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(**small, intermediate_size=64, max_position_embeddings=128, **given)


def write_tokenizer(family: str, folder: Path) -> Any:
    """Write a tokenizer with the steps of the family's published tokenizer.json; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, names = {
        "bert": _word_pieces,
        "roberta": _byte_pairs,
        "xlm-roberta": _unigrams,
        "mt5": _t5_unigrams,
        "nllb": _language_pairs,
    }[family]()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mt5": "T5"}
    described = {"tokenizer_class": f"{kind.get(family, 'Nllb')}TokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(folder)
    return loaded


def _framed(tokenizer: Tokenizer, before: list[str], after: list[str]) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (*before, *after)],
    )
    return tokenizer


def _word_pieces() -> tuple[Tokenizer, dict[str, str]]:
    letters = sorted({letter for text in CORPUS for letter in text.lower()} - {" "})
    words = ["a", "photo", "of", "cat", "house", "light", "panda", "traffic", "red", "##s", "##ing"]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*names, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return _framed(tokenizer, ["[CLS]"], ["[SEP]"]), dict(zip(roles, names, strict=True))


_NAMES = {
    "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
    "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>",
}  # fmt: skip


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_pairs() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )  # fmt: skip
    return _framed(_train(tokenizer, trainer), ["<s>"], ["</s>"]), _NAMES


def _pieces(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=special, unk_token="<unk>"
    )
    return _train(tokenizer, trainer)


def _unigrams() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = _pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return _framed(tokenizer, ["<s>"], ["</s>"]), _NAMES


def _t5_unigrams() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = _pieces(["<pad>", "</s>", "<unk>"])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _framed(tokenizer, [], ["</s>"]), names


def _language_pairs() -> tuple[Tokenizer, dict[str, str]]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=special)
    _train(tokenizer, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True) for name in ("eng_Latn", "fra_Latn", "<mask>")]
    )
    return _framed(tokenizer, ["eng_Latn"], ["</s>"]), {**_NAMES, "src_lang": "eng_Latn"}

"""Small models of transformers with random weights, saved by the library itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from export.hugging_face_tokens import readable_sentencepiece

CORPUS = (
    "a photo of a cat.",
    "a photo of the dog, it is a sketch of a very large traffic light!",
    "red panda old wooden house by the sea boats 42",
    "x y z 7 hello world café naïve",
    "你好 世界 一张猫的照片 狗",
    "привет мир",
)
SIDE = 32
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
SQUASH = {"size": {"height": SIDE, "width": SIDE}}


def save(
    kind: str,
    folder: Path,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Any:
    """Save a model of a kind with its tokenizer and image processor; return the model.

    `text` and `vision` have settings of the towers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = TOKENIZERS[kind](folder)
    tokenizer.save_pretrained(folder)
    processor = PROCESSORS[kind]
    processor.save_pretrained(folder)
    model = make_model(kind, tokenizer, text or {}, vision or {})
    model.save_pretrained(folder)
    return model


def make_model(kind: str, tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Return a small model in evaluation mode, without weights of zero that would hide mistakes."""
    size = {"vocab_size": len(tokenizer), **TEXT}
    of_masked = {
        "pad_token_id": tokenizer.pad_token_id,
        "type_vocab_size": 1,
        "max_position_embeddings": 24,
    }
    configs: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
        "clip": (
            transformers.CLIPModel,
            transformers.CLIPConfig,
            {
                "max_position_embeddings": 24,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "num_hidden_layers": 2,  # the prompt graph has a first layer that is not the last
            },
            {"projection_dim": 24},
        ),
        "siglip": (
            transformers.SiglipModel,
            transformers.SiglipConfig,
            {"max_position_embeddings": 24},
            {},
        ),
        "chinese_clip": (
            transformers.ChineseCLIPModel,
            transformers.ChineseCLIPConfig,
            of_masked,
            {"projection_dim": 24},
        ),
        "altclip": (
            transformers.AltCLIPModel,
            transformers.AltCLIPConfig,
            {**of_masked, "project_dim": 28},
            {"projection_dim": 24},
        ),
    }
    configs["siglip2"] = configs["siglip"]
    model_class, config_class, own, whole = configs[kind]
    config = config_class(
        text_config={**size, **own, **text}, vision_config={**VISION, **vision}, **whole
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def clip_tokenizer(folder: Path) -> Any:
    """Write vocab.json and merges.txt of byte-level pieces; return the tokenizer."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        [line.lower() for line in CORPUS] * 3,
        trainers.BpeTrainer(
            vocab_size=700, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    pieces = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *learned["vocab"]])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in learned["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def bert_tokenizer(folder: Path) -> Any:
    """Write vocab.txt; return the tokenizer."""
    letters = sorted({letter for line in CORPUS for letter in line.lower() if letter != " "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "photo", "cat", "##ing", *letters]
    pieces += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return transformers.BertTokenizer.from_pretrained(folder)


def sentencepiece_model(file: Path, **options: Any) -> Path:
    """Train a sentencepiece model on the corpus."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=written,
        vocab_size=150,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    file.write_bytes(written.getvalue())
    return file


def siglip_tokenizer(folder: Path) -> Any:
    file = sentencepiece_model(
        folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>"
    )
    return transformers.SiglipTokenizer(str(file))


def xlm_roberta_tokenizer(folder: Path) -> Any:
    sentencepiece_model(folder / "sentencepiece.bpe.model")
    with readable_sentencepiece():
        return transformers.XLMRobertaTokenizer.from_pretrained(folder)


def gemma_tokenizer(folder: Path) -> Any:
    """Return a tokenizer of SigLIP 2: lower case, byte fallback, an end and no start."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted({letter for line in CORPUS for letter in line.lower() if letter != " "})
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁a", "ca", "cat", "▁cat"])}
    merges = [("▁", "a"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    return transformers.Siglip2Tokenizer(
        vocab=vocab, merges=merges, add_bos_token=False, add_eos_token=True, padding_side="right"
    )


TOKENIZERS = {
    "clip": clip_tokenizer,
    "siglip": siglip_tokenizer,
    "siglip2": gemma_tokenizer,
    "chinese_clip": bert_tokenizer,
    "altclip": xlm_roberta_tokenizer,
}
PROCESSORS = {
    "clip": transformers.CLIPImageProcessor(**CROP),
    "siglip": transformers.SiglipImageProcessor(**SQUASH),
    "siglip2": transformers.SiglipImageProcessor(**SQUASH, resample=2),
    "chinese_clip": transformers.ChineseCLIPImageProcessor(**SQUASH, do_center_crop=False),
    "altclip": transformers.CLIPImageProcessor(**CROP),
}
KINDS = tuple(TOKENIZERS)

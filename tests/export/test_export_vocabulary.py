"""Tokenizers: which one a model gets, its special tokens, and what is never guessed."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from export.clip import load_clip
from export.vocabulary import find_vocabulary
from runtimes.tokenizer import Tokenizer as Device
from tests.export.small_models import small_config, t5_like_tokenizer, write_model
from ztune.errors import ConfigError

TEXTS = ["a photo of a cat.", "The OLD house_by the sea!", "  red\n panda 42 ", "", "é x"]


def own_bpe(post_processor: bool, end: str = "<|endoftext|>") -> Tokenizer:
    """Return a small byte-level BPE whose end-of-text token has the largest id."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat", "a red panda by the sea"], trainer)
    tokenizer.add_special_tokens([AddedToken("<|startoftext|>", special=True)])
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"<|startoftext|> $A {end}",
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<|startoftext|>", end)],
        )
    return tokenizer


def find(file: Path | None, config: dict[str, Any] | None = None, **options: Any) -> Any:
    given = {"pad_id": None, "pad_matters": True, "table_size": 1000, **options}
    return find_vocabulary("local-dir:x", config or {}, file, **given)


@pytest.mark.parametrize("post_processor", [True, False])
def test_a_custom_bpe(tmp_path: Path, post_processor: bool) -> None:
    tokenizer = own_bpe(post_processor)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    config = small_config("ViT-B-32")
    config["text_cfg"] |= {"vocab_size": tokenizer.get_vocab_size(), "context_length": 24}
    loaded = load_clip(write_model(tmp_path / "model", config), tokenizer_file=file)
    spec = loaded.text
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end == tokenizer.get_vocab_size() - 1
    assert (spec.prefix_ids, spec.suffix_ids) == ((end - 1,), (end,))
    assert (spec.cleaning, spec.pad_id, spec.graph) == ("lower", 0, "prefix")
    device = Device.from_json(loaded.tokenizer_json, spec)
    assert device.sequence("A  photo") == (
        end - 1, *tokenizer.encode("a photo", add_special_tokens=False).ids, end,
    )  # fmt: skip
    stored = json.loads(loaded.tokenizer_json)
    assert [stored[key] for key in ("post_processor", "truncation", "padding")] == [None] * 3


def test_a_vocabulary_larger_than_the_token_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    own_bpe(True).save(str(file))
    with pytest.raises(
        ConfigError, match=r"ids up to \d+, but the model's token table has 40 rows"
    ):
        find(file, table_size=40, pad_id=0)


def test_added_tokens_without_a_row_are_plain_text(tmp_path: Path) -> None:
    tokenizer = t5_like_tokenizer()
    size = tokenizer.get_vocab_size()
    file = tmp_path / "tokenizer.json"
    tokenizer.add_special_tokens([AddedToken("<extra_id_0>", special=True)])
    tokenizer.save(str(file))
    assert find(file, pad_id=1, table_size=size + 1).largest_id == size
    found = find(file, pad_id=1, table_size=size)
    assert found.largest_id == size - 1
    assert max(Tokenizer.from_str(found.content).encode("a <extra_id_0>").ids) < size


def test_padding_is_never_guessed(tmp_path: Path) -> None:
    tokenizer = t5_like_tokenizer()
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    with pytest.raises(ConfigError, match=r"no padding token.*`pad_id=N`"):
        find(file)
    assert find(file, pad_id=1).pad_id == 1
    assert find(file, {"pad_id": 2}).pad_id == 2
    assert find(file, pad_matters=False).pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>"}))
    assert find(file).pad_id == 1
    tokenizer.enable_padding(pad_id=2, pad_token="<unk>", length=8)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(file))
    assert find(file).pad_id == 2
    assert find(file, pad_id=0).pad_id == 0
    assert find(file).suffix_ids == (1,)


def test_ambiguous_special_tokens_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    own_bpe(False, end="<|stop|>").save(str(file))
    with pytest.raises(
        ConfigError, match=r"expected one start and one end token, got .*<\|stop\|>"
    ):
        find(file, pad_id=0)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as tokenizers JSON"):
        find(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        find(tmp_path / "none.json")


def test_cleaning_follows_the_config(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    own_bpe(True).save(str(file))
    named = {"hf_tokenizer_name": "some/where"}
    for config, cleaning in (
        ({}, "lower"),
        ({"tokenizer_kwargs": {"clean": "whitespace"}}, "whitespace"),
        (named, "whitespace"),
        (named | {"tokenizer_kwargs": {"clean": "canonicalize"}}, "canonicalize"),
    ):
        assert find(file, config, pad_id=0).cleaning == cleaning
    with pytest.raises(ConfigError, match='tokenizer mode "clips" is not supported'):
        find(file, named | {"tokenizer_mode": "clips"})


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_a_hugging_face_tokenizer_in_the_models_folder_equals_open_clips(
    tmp_path: Path, clean: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = small_config("ViT-B-16-SigLIP")
    config["vision_cfg"] = small_config("ViT-B-32")["vision_cfg"]
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    folder = tmp_path / "model"
    model = write_model(folder, config)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=t5_like_tokenizer(), eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    loaded = load_clip(model)
    assert (loaded.text.pad_id, loaded.text.suffix_ids, loaded.text.prefix_ids) == (1, (1,), ())
    assert loaded.text.cleaning == clean
    device = Device.from_json(loaded.tokenizer_json, loaded.text)
    reference = open_clip.get_tokenizer(model)
    expected = reference(TEXTS).numpy()
    assert (device.pad([device.sequence(text) for text in TEXTS]) == expected).all()

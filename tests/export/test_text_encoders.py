"""open_clip's models with a Hugging Face text encoder, from their weights to a tuned classifier."""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants

import ztune
from benchmarks.text_encoders import FAMILIES
from export.bundle import export_bundle
from export.clip import load_clip
from export.graphs import SequenceGraph
from runtimes.tokenizer import Tokenizer
from tests.conftest import DIGIT_NAMES, FEW_DIGITS, Once
from tests.export.small_models import t5_like_tokenizer
from tests.export.text_encoders import write_encoder_model
from ztune.errors import ConfigError, ZtuneError

TEXTS = (
    "a photo of a cat.", "The OLD house_by the sea!", "  red\n panda 42 ", "", "x", "é ẞ ﬁ ①",
    "一张猫的照片", "🐈‍⬛ black cat", "fish &amp; chips &lt;3", "a</s>b", "[SEP] <pad>",
    "naïve CAFÉ",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    @functools.cache
    def write(family: str) -> str:
        return write_encoder_model(family, tmp_path_factory.mktemp(family))

    return write


def source(name: str) -> Any:
    """Return open_clip's own model."""
    return open_clip.create_model(name, require_pretrained=True).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_open_clips(written: Callable[[str], str], family: str) -> None:
    loaded = load_clip(written(family))
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    expected = open_clip.get_tokenizer(written(family))(list(TEXTS)).numpy()
    rows = [tokenizer.sequence(text) for text in TEXTS]
    fits = [number for number, row in enumerate(rows) if len(row) <= 24]
    assert len(fits) >= 10
    got = tokenizer.pad([rows[number] for number in fits])
    np.testing.assert_array_equal(got, expected[fits])


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_open_clips_and_a_run_goes_to_its_end(
    written: Callable[[str], str], once: Once, tmp_path: Path, family: str
) -> None:
    name = written(family)
    folder = once(f"encoder-{family}", lambda out: export_bundle(load_clip(name), out))
    reference = source(name)
    texts = ["x", "é ẞ ﬁ ①", "一张猫的照片", "fish &amp; chips", "naïve CAFÉ"]
    tokens = open_clip.get_tokenizer(name)(texts)
    with torch.no_grad():
        expected = reference.encode_text(tokens, normalize=True).numpy()
    with ztune.load(folder) as model:
        np.testing.assert_allclose(model.encode_texts(texts), expected, rtol=0, atol=1e-5)
        # The prompt graph, with embeddings of real tokens as its context.
        templates = model.encode_templates(["a photo of {}."], ("a cat", "dog 42"))
        same = model.encode_texts(["a photo of a cat.", "a photo of dog 42."])
        np.testing.assert_allclose(templates, same, rtol=0, atol=1e-5)
        train, test = ztune.Dataset.from_folder(FEW_DIGITS).split(shots=1, seed=1)
        fitted = ztune.FewShotClassifier(model, method="zip", queries=20, seed=1).fit(train)
        fitted.save(tmp_path / "prompt.safetensors")
        fitted.export_onnx(tmp_path / "classifier.onnx")
        images = [path for path, _ in test.items[:3]]
        expected_classes = fitted.predict(images)
    assert set(expected_classes) <= set(DIGIT_NAMES)
    packed = ztune.load_classifier(tmp_path / "classifier.onnx")
    assert list(packed.predict(images)) == list(expected_classes)


POOLED = [
    ("bert", {"hf_pooler_type": "cls_pooler"}),
    ("bert", {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}),
    ("nllb", {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}),
    ("mt5", {"hf_pooler_type": "cls_last_hidden_state_pooler"}),
    ("roberta", {"hf_pooler_type": "cls_pooler"}),
]


@pytest.mark.parametrize(("family", "text"), POOLED)
def test_poolers_and_projections(tmp_path: Path, family: str, text: dict[str, Any]) -> None:
    loaded = load_clip(write_encoder_model(family, tmp_path, **text))
    assert loaded.text.pooling == ("mean" if "mean" in text["hf_pooler_type"] else "first")
    ids = torch.tensor(loaded.reference.tokenize(["a photo of a cat", "dog"]))
    rows = torch.from_numpy(loaded.tower.table())
    graph = SequenceGraph(loaded.model, loaded.tower).eval()
    contexts = rows[ids[:1, 1:4]]
    index = ids + 3
    index[0, 1:4] = torch.arange(3)
    with torch.no_grad():
        features = graph(contexts, rows, index, ids)
        model: Any = loaded.model
        torch.testing.assert_close(features[0], model.encode_text(ids, normalize=True))


def test_the_language_of_a_text_is_open_clips(tmp_path: Path) -> None:
    french = {"tokenizer_kwargs": {"src_lang": "fra_Latn"}}
    # open_clip's own option for it has no effect, and so has none here
    ignored = {"tokenizer_kwargs": {"language": "fra_Latn"}}
    english = load_clip(write_encoder_model("nllb", tmp_path / "english"))
    for text, expected in ((french, 1), (ignored, 0)):
        name = write_encoder_model("nllb", tmp_path / str(expected), **text)
        loaded = load_clip(name)
        assert loaded.text.prefix_ids[0] - english.text.prefix_ids[0] == expected
        tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
        own = open_clip.get_tokenizer(name)(["un chat"]).numpy()
        np.testing.assert_array_equal(tokenizer.pad([tokenizer.sequence("un chat")]), own)


def test_a_separator_may_be_stripped(tmp_path: Path) -> None:
    name = write_encoder_model("bert", tmp_path, tokenizer_kwargs={"strip_sep_token": True})
    loaded = load_clip(name)
    assert loaded.text.suffix_ids == (0,)
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    own = open_clip.get_tokenizer(name)(["a cat"]).numpy()
    np.testing.assert_array_equal(tokenizer.pad([tokenizer.sequence("a cat")]), own)


def test_what_open_clip_cannot_build_is_refused(tmp_path: Path) -> None:
    def changed(**text: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        name = write_encoder_model("bert", folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= text
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return name

    empty = tmp_path / "empty"
    empty.mkdir()
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    (gpt / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    own = tmp_path / "own"
    own.mkdir()
    coded = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (own / "config.json").write_text(json.dumps(coded))
    (own / "code.py").write_text("raise SystemExit(3)")
    for text, message in (
        ({"hf_pooler_type": "max_pooler"}, 'pooler "max_pooler", expected mean_pooler'),
        ({"context_length": 129}, "has 128 positions, but the context length is 129"),
        ({"hf_model_name": str(empty)}, "has no config.json"),
        ({"hf_model_name": str(tmp_path / "none")}, "none does not exist"),
        ({"hf_model_name": str(gpt)}, 'is of type "gpt2", expected bert, m2m_100, mt5'),
        ({"hf_model_name": str(own)}, "code of its own .* which is never run"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_clip(changed(**text))


def test_code_of_a_tokenizer_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_encoder_model("bert", tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    coded = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}}
    settings.write_text(json.dumps(coded))
    (tmp_path / "model" / "code.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(ZtuneError):  # some versions of transformers take another class
        load_clip(name)
    assert sys.stdin.read() == "y\n" * 9


def test_a_tokenizer_that_pads_with_another_id_is_refused(tmp_path: Path) -> None:
    name = write_encoder_model("xlm-roberta", tmp_path / "model")
    file = tmp_path / "tokenizer.json"
    t5_like_tokenizer().save(str(file))
    with pytest.raises(ConfigError, match=r"pads with id 0, but the text tower .* masks id 1"):
        load_clip(name, tokenizer_file=file, pad_id=0)
    assert load_clip(name, tokenizer_file=file).text.pad_id == 1


def test_an_encoder_of_the_hub_is_looked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(
        ZtuneError, match=r"text tower roberta-base .*\(no network\); pass local-dir"
    ):
        load_clip("roberta-ViT-B-32", random_weights=0)


def test_scaled_embeddings_are_stored_scaled(written: Callable[[str], str]) -> None:
    tower = load_clip(written("nllb")).tower
    np.testing.assert_allclose(tower.table(), tower.embedding.weight.numpy() * 32**0.5, rtol=1e-6)

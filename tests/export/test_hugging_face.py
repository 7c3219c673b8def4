"""Models of transformers from their folder to predictions, against transformers itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import ztune as face
from export.parity import open_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import embed, feeds, token_table
from runtimes.tokenizer import Tokenizer
from tests.conftest import FEW_DIGITS, Command, Once
from tests.export.hugging_face_models import SIDE, save

KINDS = ("clip", "siglip", "chinese_clip", "altclip")
TEXTS = ("a photo of a cat", "a photo of the dog", "boats 42", "x", "猫")
NAMES = ("cat.", "dog.", "x.")


@dataclass(frozen=True)
class Source:
    """A saved model and its bundle."""

    model: Any
    folder: Path
    bundle: Bundle

    @property
    def tokens(self) -> Any:
        """What the source's own tokenizer makes of TEXTS."""
        return AutoTokenizer.from_pretrained(self.folder)(
            list(TEXTS),
            padding="max_length",
            max_length=self.bundle.text.context_length,
            return_tensors="pt",
        )

    def run(self, graph: str, **given: Any) -> Any:
        return open_graph(self.bundle.file(graph)).run(["features"], given)[0]


Get = Callable[[str], Source]


@pytest.fixture(scope="module")
def source(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return a function that saves a small model of a kind and exports it."""

    @functools.cache
    def get(kind: str) -> Source:
        folder = tmp_path_factory.mktemp("saved") / kind
        model = save(kind, folder)
        bundle = once(f"hf-{kind}", lambda out: face.export(f"local-dir:{folder}", out))
        return Source(model, folder, load_bundle(bundle))

    return get


def as_unit(features: Any) -> Any:
    found = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(found, dim=-1).numpy()


def own_pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def without_mask(kind: str, tokens: Any) -> dict[str, Any]:
    """Leave out the mask for SigLIP, whose models were trained on unmasked padding."""
    left_out = ("token_type_ids", *(["attention_mask"] if kind == "siglip" else []))
    return {key: value for key, value in tokens.items() if key not in left_out}


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_logits_are_those_of_transformers(kind: str, source: Get) -> None:
    found = source(kind)
    pixels, given = own_pixels(3), without_mask(kind, found.tokens)
    with torch.no_grad():
        whole = found.model(pixel_values=pixels, **given)
        images = as_unit(found.model.get_image_features(pixel_values=pixels))
        texts = as_unit(found.model.get_text_features(**given))
    ours = found.run("image.onnx", pixels=pixels.numpy())
    tokenizer = Tokenizer(found.bundle)
    ids = tokenizer.pad([tokenizer.sequence(text) for text in TEXTS])
    np.testing.assert_array_equal(ids, found.tokens["input_ids"])
    our_texts = found.run("text.onnx", tokens=ids)
    np.testing.assert_allclose(ours, images, atol=1e-5)
    np.testing.assert_allclose(our_texts, texts, atol=1e-5)
    logits = found.bundle.logit_scale * ours @ our_texts.T + found.bundle.logit_bias
    np.testing.assert_allclose(logits, whole.logits_per_image, atol=3e-4)
    # The features tell texts and images apart, so that equal ones mean something.
    assert np.abs(texts[:, None] - texts).max(-1)[~np.eye(len(texts), dtype=bool)].min() > 1e-3
    assert np.abs(images[0] - images[1]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_graph_with_real_token_embeddings_gives_the_text_feature(
    kind: str, source: Get
) -> None:
    bundle = source(kind).bundle
    tokenizer, table, spec = Tokenizer(bundle), token_table(bundle), bundle.text
    words = tokenizer.encode("a photo")
    names = [tokenizer.encode(name) for name in NAMES]
    whole = [(*spec.prefix_ids, *words, *ids, *spec.suffix_ids) for ids in names]
    expected = source(kind).run("text.onnx", tokens=tokenizer.pad(whole))
    context = embed(table, np.array(words))
    given = feeds(spec, table, names, len(words))
    contexts = np.stack([context, np.zeros_like(context)])
    found = source(kind).run("prompt.onnx", contexts=contexts, **given)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert np.abs(found[1] - expected).max() > 1e-3


def test_the_manifest_says_what_the_model_was(source: Get) -> None:
    found = source("altclip")
    assert found.bundle.source == {
        "model": "local-dir:altclip",
        "class": "AltCLIPModel",
        "pretrained": "local-dir:altclip",
        "licence": "unknown",
    }
    assert str(found.folder) not in (found.bundle.path / "bundle.json").read_text()
    assert found.bundle.text.graph == "sequence"
    assert source("clip").bundle.text.graph == "prefix"
    parity: Any = found.bundle.manifest["source_parity"]
    assert parity["library"] == "transformers"
    ids = {source(kind).bundle.model_id for kind in KINDS}
    assert len(ids) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_tune_pack_predict(kind: str, source: Get, ztune: Command, tmp_path: Path) -> None:
    bundle, run, packed = source(kind).bundle.path, tmp_path / "run", tmp_path / "one.onnx"
    done = ztune(
        "tune", bundle, "--data", FEW_DIGITS, "--method", "zip", "--shots", 1, "--val", 0,
        "--queries", 20, "--set", "n_context=2", "--template", "a {}.", "--out", run, "--quiet",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["queries"] == 20
    packing = ztune("pack", bundle, "--prompt", run, "--out", packed)
    assert packing.code == 0, packing.err
    images = sorted((FEW_DIGITS / "two").iterdir())[:2]
    predicted = ztune("predict", packed, *images, "--json")
    assert predicted.code == 0, predicted.err
    assert len(predicted.json["predictions"]) == 2

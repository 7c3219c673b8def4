"""Compare packed visual prompts with runtimes/visual.py on the same images."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.classifier import pack
from export.weights import read_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.classifier import Classifier, open_classifier
from runtimes.decoder import Decoder, initial_values
from runtimes.ort import OrtImageEncoder
from runtimes.preprocess import crop
from runtimes.providers import Execution, open_session
from runtimes.visual import BorderPrompts, DecoderPrompts, TokenPrompts
from tests.conftest import MINI
from tests.export.conftest import Exported
from ztune.artifact import Provenance, VisualArtifact
from ztune.errors import FormatError
from ztune.io.files import sha256
from ztune.types import F32, U8

CPU = Execution()
K = 10  # of the extractor below
CLASSES = ("cat", "dog", "red panda", "boat")


@pytest.fixture(scope="module", params=["mini", "tiny"])
def bundle(request: pytest.FixtureRequest, tiny: Exported) -> Bundle:
    return load_bundle(MINI) if request.param == "mini" else tiny[1]


def images(bundle: Bundle, n: int = 5) -> U8:
    """Return u8[n, S, S, 3] with the gradients of photographs."""
    coarse = np.random.default_rng(0).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
    side = (bundle.image.size, bundle.image.size)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BICUBIC)) for one in coarse]
    )


def values_of(program: str, bundle: Bundle, k: int) -> F32:
    rng = np.random.default_rng(1)
    if program == "decoder":
        return initial_values(k, bundle.image.size, rng).astype(np.float32)
    assert bundle.visual is not None
    size = bundle.image.size
    shape = (3, size, size) if program == "border" else (3, bundle.visual.width)
    return rng.standard_normal(shape).astype(np.float32)


def artifact_of(program: str, bundle: Bundle, k: int = 0) -> VisualArtifact:
    """Return a visual prompt; the decoder's extractor has k values (0: the bundle's own)."""
    k = k or bundle.embed_dim
    rng = np.random.default_rng(2)
    texts = rng.standard_normal((len(CLASSES), bundle.embed_dim)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    values, statistics = values_of(program, bundle, k), None
    if program == "decoder":
        features = rng.standard_normal((6, k)).astype(np.float32)
        statistics = Decoder(k, bundle.image.size, CPU).statistics(values, features)
    p = Provenance(bundle.model_id, bundle.digest, program, 1, 0, "budget")
    return VisualArtifact(
        CLASSES, p, program, values, texts, 10.0, 0.5, None, ("a photo of a {}.",), statistics
    )


def expected(bundle: Bundle, artifact: VisualArtifact, pixels: U8, features: F32) -> F32:
    """Return logits f32[N, C] as computed during tuning."""
    prompts: Any
    if artifact.program == "border":
        prompts = BorderPrompts(bundle, CPU)
    elif artifact.program == "tokens":
        prompts = TokenPrompts(bundle, CPU)
    else:
        prompts = DecoderPrompts(bundle, CPU, features.shape[1], artifact.statistics)
    encoded = prompts.encode(artifact.visual[None], pixels, features)[0]
    return artifact.classifier().logits(encoded)


def packed(bundle: Bundle, artifact: VisualArtifact, out: Path, **options: Any) -> Classifier:
    pack(bundle, artifact, out, **options)
    model = onnx.load(str(out))
    onnx.checker.check_model(model, full_check=True)
    names = [w.name for w in model.graph.initializer]
    assert len(set(names)) == len(names)
    return open_classifier(out, CPU)


@pytest.mark.parametrize("program", ["border", "tokens", "decoder"])
def test_a_classifier_changes_images_as_the_tuning_did(
    program: str, bundle: Bundle, tmp_path: Path
) -> None:
    artifact = artifact_of(program, bundle)
    pixels = images(bundle)
    plain = OrtImageEncoder(bundle, CPU).encode(pixels)
    logits = expected(bundle, artifact, pixels, plain)
    assert np.abs(logits - artifact.classifier().logits(plain)).max() > 0.01
    assert np.abs(logits[0] - logits[1]).max() > 0.01
    classifier = packed(bundle, artifact, tmp_path / "c.onnx")
    assert (classifier.classes, classifier.method) == (CLASSES, program)
    got, probabilities, _ = classifier.classify(pixels)
    np.testing.assert_allclose(got, logits, atol=1e-3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(classifier.classify(pixels[:1])[0], got[:1], atol=1e-4)
    # The decoder's plain image goes through the same weights, kept once.
    n_bytes = (tmp_path / "c.onnx").stat().st_size
    tower = read_graph(bundle.file("image.onnx")).ByteSize()
    assert n_bytes < 1.1 * tower + 250_000


@pytest.mark.parametrize("program", ["border", "tokens", "decoder"])
def test_a_classifier_that_resizes(program: str, bundle: Bundle, tmp_path: Path) -> None:
    artifact = artifact_of(program, bundle)
    classifier = packed(bundle, artifact, tmp_path / "c.onnx", resize=True)
    coarse = np.random.default_rng(3).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    size = (3 * bundle.image.size, 2 * bundle.image.size)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    pixels = crop(image, bundle.image)[None]
    plain = OrtImageEncoder(bundle, CPU).encode(pixels)
    logits = expected(bundle, artifact, pixels, plain)
    got = classifier.classify(np.asarray(image)[None]).logits
    # Single pixels of the crop may differ by one level.
    np.testing.assert_allclose(got, logits, atol=0.05)


def extractor(path: Path, size: int, opset: int = 20, n_outputs: int = K) -> Path:
    """Write a random projection of pixels, with the names of a bundle's tower."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((3 * size * size, n_outputs)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["view"]),
        helper.make_node("MatMul", ["view", "model.weight"], ["product"]),
        helper.make_node("Tanh", ["product"], ["features"]),
    ]
    f32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "extractor",
        [helper.make_tensor_value_info("pixels", f32, ["N", 3, size, size])],
        [helper.make_tensor_value_info("features", f32, ["N", n_outputs or "k"])],
        [numpy_helper.from_array(weight, "model.weight")],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


@pytest.mark.parametrize("opset", [20, 13])
def test_a_separate_extractor(opset: int, bundle: Bundle, tmp_path: Path) -> None:
    size = bundle.image.size
    path = extractor(tmp_path / "extractor.onnx", size, opset)
    own = dataclasses.replace(artifact_of("decoder", bundle, K), extractor=sha256(path))
    pixels = images(bundle)
    mean, std = np.array(bundle.image.mean), np.array(bundle.image.std)
    planes = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    (features,) = open_session(path, CPU).run(None, {"pixels": planes})
    logits = expected(bundle, own, pixels, features)
    classifier = packed(bundle, own, tmp_path / "c.onnx", extractor=path)
    np.testing.assert_allclose(classifier.classify(pixels)[0], logits, atol=1e-3)


def test_an_extractor_with_weights_in_another_file_is_refused(tmp_path: Path) -> None:
    # The artifact's SHA-256 would not notice that the weights have changed.
    mini, path = load_bundle(MINI), tmp_path / "e.onnx"
    model = onnx.load(str(extractor(path, mini.image.size)))
    onnx.save(model, str(path), save_as_external_data=True, location="e.onnx.data")
    own = dataclasses.replace(artifact_of("decoder", mini, K), extractor=sha256(path))
    with pytest.raises(FormatError, match=r"stores tensors in 'e.onnx.data', expected all in one"):
        pack(mini, own, tmp_path / "c.onnx", extractor=path)
    assert not (tmp_path / "c.onnx").exists()


def test_mismatches_are_refused(tmp_path: Path) -> None:
    mini, out = load_bundle(MINI), tmp_path / "c.onnx"
    size = mini.image.size
    border, decoder, tokens = (artifact_of(p, mini) for p in ("border", "decoder", "tokens"))

    def refused(artifact: VisualArtifact, message: str, **options: Any) -> None:
        with pytest.raises(FormatError, match=message):
            pack(mini, artifact, out, **options)
        assert not out.exists()

    cut = dataclasses.replace(border, visual=border.visual[:, 1:])
    refused(cut, r"the border prompt is f32\[3, 23, 24\], but the bundle takes f32\[3, 24, 24\]")
    cut = dataclasses.replace(tokens, visual=tokens.visual[:, 1:])
    refused(cut, r"the tokens prompt is f32\[3, 127\], but the bundle takes f32\[n, 128\]")
    cut = dataclasses.replace(decoder, visual=decoder.visual[1:])
    refused(cut, r"the decoder prompt is f32\[8895\], but the bundle takes f32\[8896\]")
    refused(
        dataclasses.replace(decoder, statistics=None), r"no normalisation statistics f32\[2, 144\]"
    )

    path = extractor(tmp_path / "e.onnx", size)
    own = dataclasses.replace(artifact_of("decoder", mini, K), extractor=sha256(path))
    refused(own, "tuned with a separate extractor.*pass its ONNX file")
    refused(decoder, "tuned without an extractor", extractor=path)
    refused(border, "tuned without an extractor", extractor=path)
    other = extractor(tmp_path / "other.onnx", size, n_outputs=K + 1)
    refused(own, "is not the file that the decoder was tuned with", extractor=other)
    refused(own, "is not the file", extractor=tmp_path / "none.onnx")
    resized = dataclasses.replace(own, extractor=sha256(other))
    refused(resized, "the decoder prompt is f32", extractor=other)
    for name in ("text.onnx", "image_prompted.onnx"):
        foreign = dataclasses.replace(own, extractor=sha256(MINI / name))
        refused(
            foreign,
            "is not a graph with one input",
            extractor=MINI / name,
        )
    without = msgspec.structs.replace(mini, visual=None, files={
        name: entry for name, entry in mini.files.items() if name != "image_prompted.onnx"
    })  # fmt: skip
    with pytest.raises(FormatError, match=r"has no image_prompted\.onnx"):
        pack(without, tokens, out)

"""Compare the packed classifier with the numpy path, with an image tower that returns its input."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from export.classifier import _classifier_nodes, _graph_bytes, pack
from runtimes.bundle import FORMAT, Bundle, ImageSpec, load_bundle
from runtimes.classifier import open_classifier, seal
from runtimes.preprocess import crop, normalise
from runtimes.providers import Execution
from tests.conftest import Command
from ztune.artifact import HeadArtifact, Provenance
from ztune.cli.main import main
from ztune.deployed import load_classifier
from ztune.errors import DataError, FormatError, ZtuneWarning
from ztune.io.files import sha256
from ztune.logits import FeatureClassifier, InlierTest, Kernel
from ztune.types import Json

S = 12
E = 3 * S * S


def transparent_bundle(folder: Path, **image: Json) -> Bundle:
    """Return a bundle whose image features are its normalised input pixels."""
    folder.mkdir()
    nodes = [helper.make_node("Flatten", ["pixels"], ["features"])]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, S, S])]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", E])]
    graph = helper.make_graph(nodes, "image", inputs, outputs)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=9), str(folder / "image.onnx")
    )
    spec: dict[str, Json] = {
        "size": S,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    path = folder / "image.onnx"
    manifest = {
        "format": FORMAT,
        "version": 1,
        "model_id": "sha256:test",
        "source": {},
        "image": {**spec, **image},
        "text": {
            "width": 4,
            "context_length": 8,
            "prefix_ids": [1],
            "suffix_ids": [2],
            "pad_id": 0,
            "cleaning": "lower",
            "causal": True,
            "pooling": "argmax",
            "graph": "prefix",
        },
        "embed_dim": E,
        "logit_scale": 1.0,
        "logit_bias": 0.0,
        "precision": "fp32",
        "files": {"image.onnx": {"sha256": sha256(path), "bytes": path.stat().st_size}},
        "parity": {},
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return load_bundle(folder)


def identity_head(n: int = E) -> HeadArtifact:
    """Return a head whose logits are the features themselves."""
    return HeadArtifact(
        tuple(f"value {i:04}" for i in range(n)),
        Provenance("sha256:test", "digest", "gda", 1, 0, "closed form"),
        np.eye(n, dtype=np.float32),
        np.zeros(n, dtype=np.float32),
        np.array([7, 2**63 + 5], dtype=np.uint64),
    )


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def kernel_head(n_classes: int, n_keys: int) -> HeadArtifact:
    """Return a head with a kernel."""
    rng = np.random.default_rng(6)
    return HeadArtifact(
        tuple(f"class {i:04}" for i in range(n_classes)),
        Provenance("sha256:test", "digest", "proker", 1, 0, "closed form"),
        10 * unit_rows(n_classes, E, 7),
        rng.standard_normal(n_classes).astype(np.float32),
        kernel=Kernel(
            unit_rows(n_keys, E, 8),
            rng.standard_normal((n_keys, n_classes)).astype(np.float32),
            3.5,
        ),
    )


def as_pixels(logits: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Undo the normalisation: f32[N, 3, S, S] in 0…255."""
    planes = logits.reshape(-1, 3, S, S).astype(np.float64)
    mean, std = (np.reshape(v, (1, 3, 1, 1)) for v in (spec.mean, spec.std))
    return np.asarray((planes * std + mean) * 255)


def test_square_pixels_are_normalised_as_on_the_device(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    pack(bundle, identity_head(), tmp_path / "c.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, S, S, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    logits, probabilities = session.run(None, {"pixels": pixels})
    expected = normalise(pixels, bundle.image).reshape(3, -1)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    exponentials = np.exp(expected.astype(np.float64))
    np.testing.assert_allclose(
        probabilities, exponentials / exponentials.sum(1, keepdims=True), atol=1e-6
    )


@pytest.mark.parametrize(("n_classes", "n_keys"), [(2, 1), (7, 50)])
def test_the_kernel_in_the_graph_equals_numpy(n_classes: int, n_keys: int, tmp_path: Path) -> None:
    head = kernel_head(n_classes, n_keys)
    features = unit_rows(9, E, 9)
    # Only these nodes, since the kernel expects unit features and this tower returns pixels.
    logits, probabilities = run_nodes(_classifier_nodes(head.classifier(), "f"), features)
    expected = head.classifier().logits(features)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    affine = FeatureClassifier(head.weight, head.bias).logits(features)
    assert np.abs(expected - affine).max() > 0.01  # the kernel has an effect


def test_a_third_output_tells_images_of_none_of_the_classes(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b", mean=[0.0] * 3, std=[100.0] * 3)
    pixels = np.random.default_rng(1).integers(0, 256, (4, S, S, 3), dtype=np.uint8)
    features = normalise(pixels, bundle.image).reshape(4, -1)
    prototypes = unit_rows(5, E, 3)
    middle = float(np.median((features @ prototypes.T).max(axis=1)))
    test = InlierTest(prototypes, middle, 0.05)
    pack(bundle, replace(kernel_head(5, 30), inliers=test), tmp_path / "c.onnx")
    onnx.checker.check_model(onnx.load(str(tmp_path / "c.onnx")), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    outputs = [(value.name, value.shape) for value in session.get_outputs()]
    assert outputs == [("logits", ["N", 5]), ("probabilities", ["N", 5]), ("inlier_score", ["N"])]
    expected = test(features)
    assert (expected < 0).sum() == 2
    np.testing.assert_allclose(session.run(None, {"pixels": pixels})[2], expected, atol=1e-5)
    classifier = open_classifier(tmp_path / "c.onnx", Execution())
    assert classifier.reject == 0.05
    found = classifier.classify(pixels)
    np.testing.assert_array_equal(found.unknown, expected < 0)
    pack(bundle, kernel_head(5, 30), tmp_path / "plain.onnx")
    plain = open_classifier(tmp_path / "plain.onnx", Execution()).classify(pixels)
    assert plain.inlier_scores is None
    assert not plain.unknown.any()
    np.testing.assert_array_equal(plain.logits, found.logits)


def test_a_packed_kernel_runs(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b", mean=[0.0] * 3, std=[100.0] * 3)
    head = kernel_head(5, 30)
    pack(bundle, head, tmp_path / "c.onnx")
    onnx.checker.check_model(onnx.load(str(tmp_path / "c.onnx")), full_check=True)
    pixels = np.random.default_rng(1).integers(0, 256, (4, S, S, 3), dtype=np.uint8)
    got = open_classifier(tmp_path / "c.onnx", Execution()).classify(pixels)[0]
    features = normalise(pixels, bundle.image).reshape(4, -1)
    np.testing.assert_allclose(got, head.classifier().logits(features), rtol=1e-4, atol=1e-4)


def run_nodes(part: Any, features: np.ndarray) -> list[np.ndarray]:
    """Run the nodes of one part of the graph, from its input `f`."""
    inputs = [helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", features.shape[1]])]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in ("logits", "probabilities")
    ]
    graph = helper.make_graph(part.nodes, "part", inputs, outputs, part.constants)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(session.run(None, {"f": features}))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_graph_has_the_pixels_of_preprocessing(
    mode: str, interpolation: str, tmp_path: Path
) -> None:
    bundle = transparent_bundle(
        tmp_path / "b", resize_mode=mode, interpolation=interpolation, fill_color=9
    )
    pack(bundle, identity_head(), tmp_path / "c.onnx", resize=True)
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(0, np.log(700), (40, 2))).astype(int).tolist()
    edges = [(1, 1), (12, 12), (12, 5), (99, 1), (1, 100), (4000, 1), (1, 4000), (4000, 11)]
    for width, height in [*edges, *drawn]:
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if height % 2:  # the filter overshoots at edges
            levels = levels // 128 * np.uint8(255)
        logits = session.run(["logits"], {"pixels": levels[None]})[0]
        got = as_pixels(logits, bundle.image)[0].transpose(1, 2, 0)
        expected = crop(Image.fromarray(levels), bundle.image)
        np.testing.assert_allclose(got, expected, atol=0.01, err_msg=f"{width} x {height}")


def test_images_of_one_call_are_resized_independently(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    pack(bundle, identity_head(), tmp_path / "c.onnx", resize=True)
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), dtype=np.uint8)
    together = session.run(["logits"], {"pixels": pixels})[0]
    alone = [session.run(["logits"], {"pixels": one[None]})[0][0] for one in pixels]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_classifier_has_metadata(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    pack(bundle, identity_head(), tmp_path / "c.onnx", resize=True)
    classifier = open_classifier(tmp_path / "c.onnx", Execution())
    assert classifier.classes[:2] == ("value 0000", "value 0001")
    assert classifier.image == bundle.image
    assert classifier.resize
    assert classifier.method == "gda"
    assert classifier.tuning_images == (7, 2**63 + 5)
    packed = onnx.load(str(tmp_path / "c.onnx"))
    onnx.checker.check_model(packed, full_check=True)
    assert {p.key for p in packed.metadata_props} == {"ztune", "class_names", "sha256"}


def test_large_towers_have_external_weights(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    out = tmp_path / "c.onnx"
    pack(bundle, identity_head(), out, external_threshold=1000)
    assert out.stat().st_size < 100_000
    assert (tmp_path / "c.onnx.data").stat().st_size >= E * E * 4
    classifier = open_classifier(out, Execution())
    pixels = np.full((1, S, S, 3), 128, dtype=np.uint8)
    expected = normalise(pixels, bundle.image).reshape(1, -1)
    np.testing.assert_allclose(classifier.classify(pixels)[0], expected, atol=1e-6)
    moved = tmp_path / "elsewhere.onnx"
    moved.write_bytes(out.read_bytes())
    with pytest.raises(FormatError, match=r"stores tensors in 'c\.onnx\.data'"):
        open_classifier(moved, Execution())


def test_a_failure_keeps_the_old_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    out = tmp_path / "c.onnx"
    pack(bundle, identity_head(), out, external_threshold=1000)
    before = [out.read_bytes(), Path(f"{out}.data").read_bytes()]

    def save(model: onnx.ModelProto, path: str, location: str, **_: object) -> None:
        Path(path).with_name(location).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", save)
    with pytest.raises(DataError, match="cannot be written: No space left"):
        pack(bundle, identity_head(), out, external_threshold=1000)
    assert [out.read_bytes(), Path(f"{out}.data").read_bytes()] == before
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c.onnx", "c.onnx.data"}


def test_the_size_of_a_graph_beyond_2_gb_is_known() -> None:
    constant = SimpleNamespace(raw_data=range(3 << 30))
    assert _graph_bytes(SimpleNamespace(initializer=[constant], node=[])) == 3 << 30


def test_mismatches_are_refused(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    with pytest.raises(FormatError, match=f"features of 5 values.*returns {E}"):
        pack(bundle, identity_head(5), tmp_path / "c.onnx")
    with pytest.raises(DataError, match="cannot be written"):
        pack(bundle, identity_head(), tmp_path / "no" / "c.onnx")


def test_a_classifier_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    bundle = transparent_bundle(tmp_path / "b")
    out = tmp_path / "c.onnx"
    pack(bundle, identity_head(), out)
    model = onnx.load(str(out))
    document = json.loads(model.metadata_props[0].value)
    assert document["format"] == "ztune-classifier"
    model.metadata_props[0].value = json.dumps({**document, "version": 5})
    save_sealed(model, out)
    with pytest.raises(FormatError, match="format version 5 is newer"):
        open_classifier(out, Execution())


def save_sealed(model: onnx.ModelProto, out: Path) -> None:
    """Save a changed classifier as if it had been packed so."""
    assert model.metadata_props.pop().key == "sha256"
    onnx.save(model, str(out))
    seal(out)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(transparent_bundle(tmp_path / "b"), identity_head(), tmp_path / "c.onnx")
    return tmp_path / "c.onnx"


def opens(path: Path) -> list[str]:
    """Open a classifier with every face that takes one; return the errors."""
    said = []
    for use in (
        lambda: open_classifier(path, Execution()),
        lambda: load_classifier(path, provider="cpu"),
    ):
        try:
            use()
        except FormatError as error:
            said.append(str(error))
    for words in (["predict", path, path.parent], ["eval", path, "--data", path.parent]):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            assert main([*map(str, words), "--quiet"]) == 1
        said.append(errors.getvalue())
    return said


@pytest.mark.parametrize("count", [1, 100, 20_000])
@pytest.mark.parametrize("place", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_damaged_classifier_is_refused_everywhere(place: float, count: int, packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    start = min(int(place * len(content)), len(content) - count)
    content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
    packed.write_bytes(content)
    said = opens(packed)
    assert len(said) == 4
    for line in said:
        assert str(packed) in line
        assert len(line.splitlines()) == 1


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0), bits=st.integers(1, 255))
def test_no_changed_byte_is_overlooked(place: int, bits: int, packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    content[place % len(content)] ^= bits
    changed = packed.with_name("changed.onnx")
    changed.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_classifier(changed, Execution())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [b"", b"\0" * 76, b"\x72\x02\x0a\x00"])
def test_a_digest_that_is_cut_off_or_followed_is_missed(change: bytes, packed: Path) -> None:
    content = packed.read_bytes()
    for damaged in (content[:-76] + change, content + change):
        if damaged != content:
            packed.write_bytes(damaged)
            with pytest.raises(FormatError):
                open_classifier(packed, Execution())


def test_damaged_external_weights_are_found(tmp_path: Path) -> None:
    out, weights = tmp_path / "c.onnx", tmp_path / "c.onnx.data"
    pack(transparent_bundle(tmp_path / "b"), identity_head(), out, external_threshold=1000)
    open_classifier(out, Execution())
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FormatError, match=r"c\.onnx\.data differs from its SHA-256"):
        open_classifier(out, Execution())


def test_another_file_of_weights_nearby_changes_nothing(packed: Path) -> None:
    Path(f"{packed}.data").write_bytes(b"left by an earlier classifier")
    open_classifier(packed, Execution())


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_classifier_without_a_digest_works_and_says_so_once(
    version: int, packed: Path
) -> None:
    model = onnx.load(str(packed))
    document = json.loads(model.metadata_props[0].value)
    if version == 1:
        document["tuning_pictures"] = document.pop("tuning_images")
    model.metadata_props[0].value = json.dumps({**document, "version": version})
    del model.metadata_props[-1]
    onnx.save(model, str(packed))
    with pytest.warns(ZtuneWarning, match="has no digest, so damage is not found") as said:
        classifier = open_classifier(packed, Execution())
    assert len(said) == 1
    assert classifier.tuning_images == (7, 2**63 + 5)


def of_type(dtype: int) -> Callable[[Any, dict[str, Any]], None]:
    """Return a change of the graph's input type."""

    def change(graph: Any, _: dict[str, Any]) -> None:
        graph.input[0].type.tensor_type.elem_type = dtype
        graph.node[0].op_type, graph.node[0].input[0] = "Transpose", graph.input[0].name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, d: d.update(classes=d["classes"][:-1]), f"of {E - 1} classes"),
        (lambda _, d: d.update(classes=["same"] * E), "at least two different classes"),
        (lambda _, d: d.update(classes=["one"]), "at least two different classes"),
        (lambda g, _: g.output.pop(), "and logits and probabilities"),
        (lambda g, _: g.output[0].type.tensor_type.ClearField("shape"), None),
        (of_type(TensorProto.FLOAT), "expected pixels u8"),
    ],
)
def test_metadata_that_do_not_fit_the_graph(
    change: Callable[[Any, dict[str, Any]], object], message: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "c.onnx"
    pack(transparent_bundle(tmp_path / "b"), identity_head(), out)
    model = onnx.load(str(out))
    document = json.loads(model.metadata_props[0].value)
    change(model.graph, document)
    model.metadata_props[0].value = json.dumps(document)
    save_sealed(model, out)
    if message is None:  # ONNX Runtime infers a missing shape
        assert open_classifier(out, Execution()).classes == tuple(document["classes"])
        return
    with pytest.raises(FormatError, match=message) as caught:
        open_classifier(out, Execution())
    assert "\n" not in str(caught.value)


def test_metadata_nested_without_end(tmp_path: Path) -> None:
    out = tmp_path / "c.onnx"
    pack(transparent_bundle(tmp_path / "b"), identity_head(), out)
    model = onnx.load(str(out))
    model.metadata_props[0].value = "[" * 100_000
    save_sealed(model, out)
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        open_classifier(out, Execution())


def test_predictions_follow_the_logits_where_probabilities_are_equal(
    ztune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "c.onnx"
    head = identity_head()
    bias = np.zeros(E, dtype=np.float32)
    bias[[5, 9]] = 1e-9, 2e-9
    close = HeadArtifact(head.classes, head.provenance, 0 * head.weight, bias)
    pack(transparent_bundle(tmp_path / "b"), close, out)
    for name in ("value 0000", "value 0009"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (S, S)).save(tmp_path / "data" / name / "x.png")
    predicted = ztune("predict", out, tmp_path / "data", "--json").json["predictions"]
    for prediction in predicted:
        assert prediction["class"] == "value 0009"
        assert [entry["class"] for entry in prediction["top"]] == [
            "value 0009", "value 0005", "value 0000",
        ]  # fmt: skip
    scored = ztune("eval", out, "--data", tmp_path / "data", "--split", "all", "--json").json
    assert scored["per_class"]["value 0009"]["accuracy"] == 1.0
    assert scored["candidates"] == E

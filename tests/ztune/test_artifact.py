"""Artifacts: golden content, equal bytes, and hostile files."""

import json
import struct
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ztune.artifact import (
    Artifact,
    ContextArtifact,
    EnsembleArtifact,
    HeadArtifact,
    MixtureArtifact,
    Provenance,
    VisualArtifact,
    inliers_of,
    read_artifact,
    require_same_model,
    write_artifact,
)
from ztune.errors import FormatError
from ztune.io.schema import plain
from ztune.io.tensors import read_tensors, write_tensors
from ztune.logits import FeatureClassifier, InlierTest, Kernel, Whitening

PROVENANCE = Provenance("sha256:aa", "bb", "zip", 1, 5000, "budget", {"rank": 5, "init": "random"})
CONTEXT = ContextArtifact(
    ("crab", "Ünïcode"),
    PROVENANCE,
    context=np.arange(6, dtype=np.float32).reshape(2, 3),
    text_features=np.eye(2, 4, dtype=np.float32),
    logit_scale=12.5,
    logit_bias=-1.0,
)
MIXTURE = MixtureArtifact(
    ("crab", "Ünïcode"),
    PROVENANCE,
    tokens=np.array([[0, 7], [49407, 2], [3, 3]], np.int32),
    weights=np.array([1.5, -0.25, 0.0], np.float32),
    text_features=np.array([[0.5, 0, -2], [3, 4, 0]], np.float32),
    logit_scale=12.5,
    logit_bias=-1.0,
    at_once=10,
    tuning_images=np.array([5], np.uint64),
)
HEAD = HeadArtifact(
    ("a", "b", "c"), PROVENANCE, np.ones((3, 4), np.float32), np.zeros(3, np.float32)
)
KERNEL = replace(
    HEAD,
    kernel=Kernel(
        np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]],
        np.arange(15, dtype=np.float32).reshape(5, 3),
        5.5,
    ),
)
ENSEMBLE = EnsembleArtifact(
    MIXTURE.classes,
    PROVENANCE,
    FeatureClassifier(
        np.array([[1, 2, 3], [4, 5, -6]], np.float32),
        np.array([0.5, -0.5], np.float32),
        Kernel(
            np.eye(3, dtype=np.float32)[[2, 0, 1, 1]],
            np.arange(8, dtype=np.float32).reshape(4, 2),
            2.0,
            Whitening(np.array([0.1, 0, 0.2], np.float32), 2 * np.eye(3, dtype=np.float32)),
        ),
    ),
    MIXTURE,
    ("a photo of a {}.", "{}"),
    {"beta": 2.0, "members": [{"kind": "gda", "alpha": 1.0}]},
    MIXTURE.tuning_images,
)
BORDER = VisualArtifact(
    ("crab", "Ünïcode"),
    PROVENANCE,
    "border",
    np.arange(48, dtype=np.float32).reshape(3, 4, 4),
    np.eye(2, 4, dtype=np.float32),
    12.5,
    -1.0,
    templates=("a photo of a {}.", "{}"),
)
DECODER = replace(
    BORDER,
    program="decoder",
    visual=np.ones(7, np.float32),
    statistics=np.ones((2, 144), np.float32),
    extractor="ff" * 32,
)
TOKENS = replace(
    BORDER,
    program="tokens",
    visual=np.ones((2, 6), np.float32),
    context=np.ones((3, 5), np.float32),
    templates=(),
    tuning_images=np.array([1, 2**63], np.uint64),
)
EVERY_KIND: dict[str, Artifact] = {
    "context": CONTEXT,
    "mixture": MIXTURE,
    "ensemble": ENSEMBLE,
    "ensemble without kernel": replace(ENSEMBLE, head=replace(ENSEMBLE.head, kernel=None)),
    "head": HEAD,
    "kernel": KERNEL,
    "border": BORDER,
    "decoder": DECODER,
    "tokens": TOKENS,
}


def assert_same(got: object, expected: object) -> None:
    """Compare field by field, arrays by value and type."""
    assert type(got) is type(expected)
    if is_dataclass(expected):
        for part in fields(expected):
            assert_same(getattr(got, part.name), getattr(expected, part.name))
    elif isinstance(expected, np.ndarray):
        assert isinstance(got, np.ndarray)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    else:
        assert got == expected


@pytest.mark.parametrize("artifact", EVERY_KIND.values(), ids=EVERY_KIND)
def test_what_is_written_is_read_back(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_artifact(path, artifact)
    back = read_artifact(path)
    assert_same(back, artifact)
    assert_same(back.classifier(), artifact.classifier())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("artifact", "name"),
    [
        (replace(HEAD, weight=np.full((3, 4), np.inf, np.float32)), "weight"),
        (replace(CONTEXT, context=np.full((2, 3), np.nan, np.float32)), "context"),
        (replace(CONTEXT, logit_scale=np.inf), "logit_scale"),
        (replace(MIXTURE, weights=np.array([1, np.nan, 0], np.float32)), "weights"),
        (replace(BORDER, visual=np.full((3, 4, 4), -np.inf, np.float32)), "visual"),
    ],
)
def test_what_is_not_finite_is_not_written(artifact: Artifact, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FormatError, match=f"tensor {name} has values that are not finite"):
        write_artifact(path, artifact)
    assert not path.exists()


def test_an_ensemble_drops_and_reorders_classes() -> None:
    features = np.eye(3, dtype=np.float32)
    whole = ENSEMBLE.classifier().logits(features)
    turned = ENSEMBLE.restricted(("Ünïcode", "crab"))
    np.testing.assert_array_equal(turned.classifier().logits(features), whole[:, ::-1])
    np.testing.assert_array_equal(turned.mixture.text_features, MIXTURE.text_features[::-1])
    assert turned.classes == turned.mixture.classes == ("Ünïcode", "crab")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"centre": None}, "tensor centre is missing"),
        ({"matrix": np.eye(2, dtype=np.float32)}, "tensor matrix is"),
        ({"keys": None}, "unknown tensors"),
        ({"keys": 2 * np.eye(3, dtype=np.float32)}, "row of length 2"),
        ({"text_features": np.ones((2, 4), np.float32)}, "has 4 columns"),
        ({"tokens": None}, "tensor tokens is missing"),
    ],
)
def test_a_damaged_ensemble_is_refused(
    change: dict[str, np.ndarray | None], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    arrays, document = document_of(path, ENSEMBLE)
    kept = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    write_tensors(path, kept, plain(document))
    with pytest.raises(FormatError, match=words):
        read_artifact(path)


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"]])
def test_an_ensemble_has_templates(templates: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    arrays, document = document_of(path, ENSEMBLE)
    write_tensors(path, arrays, plain({**document, "templates": templates}))
    with pytest.raises(FormatError, match="expected templates with one"):
        read_artifact(path)


def test_values_at_their_limits_are_read(tmp_path: Path) -> None:
    for artifact in (
        replace(DECODER, statistics=np.zeros((2, 144), np.float32)),
        replace(TOKENS, visual=np.ones((4096, 6), np.float32)),
        replace(MIXTURE, at_once=1),
        replace(MIXTURE, at_once=65_536),
        *(replace(one, temperature=1.25) for one in (CONTEXT, MIXTURE, HEAD, ENSEMBLE, BORDER)),
    ):
        write_artifact(tmp_path / "x", artifact)
        assert_same(read_artifact(tmp_path / "x"), artifact)


def test_the_header_is_as_specified(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_artifact(path, CONTEXT)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header["__metadata__"]["ztune"])
    assert document == {
        "format": "ztune-artifact",
        "version": 3,
        "kind": "context",
        "classes": ["crab", "Ünïcode"],
        "model_id": "sha256:aa",
        "bundle_digest": "bb",
        "method": "zip",
        "config": {"rank": 5, "init": "random"},
        "seed": 1,
        "queries": 5000,
        "stop_reason": "budget",
        "temperature": None,
        "reject": None,
    }
    assert header["context"]["dtype"] == "F32"
    assert header["context"]["shape"] == [2, 3]


def test_a_mixtures_header_is_as_specified(tmp_path: Path) -> None:
    arrays, document = document_of(tmp_path / "x", MIXTURE)
    assert document["kind"] == "mixture"
    assert document["at_once"] == 10
    raw = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert {name: (one["dtype"], one["shape"]) for name, one in header.items()} == {
        "tokens": ("I32", [3, 2]),
        "weights": ("F32", [3]),
        "text_features": ("F32", [2, 3]),
        "logit_scale": ("F32", [1]),
        "logit_bias": ("F32", [1]),
        "tuning_images": ("U64", [1]),
    }
    assert set(arrays) == set(header)


def test_a_mixtures_rows_of_any_length_are_its_classifier() -> None:
    classifier = MIXTURE.classifier()
    np.testing.assert_array_equal(classifier.weight, [[6.25, 0, -25], [37.5, 50, 0]])
    np.testing.assert_array_equal(classifier.bias, [-1, -1])


Refusing = ContextArtifact | MixtureArtifact | HeadArtifact | EnsembleArtifact


def refusing(artifact: Refusing) -> Refusing:
    """Return an artifact with prototypes of its classes."""
    shape = artifact.classifier().weight.shape
    return replace(artifact, inliers=InlierTest(np.eye(*shape, dtype=np.float32), 0.75, 0.05))


@pytest.mark.parametrize("plain", [CONTEXT, MIXTURE, HEAD, KERNEL, ENSEMBLE])
def test_the_test_for_none_of_the_classes_is_stored(plain: Refusing, tmp_path: Path) -> None:
    artifact = refusing(plain)
    write_artifact(tmp_path / "x", artifact)
    found = read_artifact(tmp_path / "x")
    assert_same(found, artifact)
    reordered, test = inliers_of(found, artifact.classes[::-1]), inliers_of(found)
    assert reordered is not None
    assert test is not None
    np.testing.assert_array_equal(reordered.prototypes, test.prototypes[::-1])
    assert reordered.threshold == test.threshold == 0.75
    assert inliers_of(found, (artifact.classes[0], "another")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prototypes": np.eye(3, 4, dtype=np.float32)},
            r"prototypes is \(3, 4\), expected \(2, 4\)",
        ),
        ({"prototypes": np.ones((2, 4), np.float32)}, "expected unit rows"),
        ({"prototypes": None}, "tensor prototypes is missing"),
        ({"inlier_threshold": None}, "tensor inlier_threshold is missing"),
        ({"inlier_threshold": np.array([np.nan], np.float32)}, "not finite"),
        ({"reject": None}, "unknown tensors .'inlier_threshold', 'prototypes'."),
        ({"reject": 0.0}, r"\$\.reject"),
        ({"reject": 1.0}, r"\$\.reject"),
        ({"reject": "0.05"}, r"\$\.reject"),
    ],
)
def test_a_damaged_test_for_none_of_the_classes_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    write_artifact(path, refusing(CONTEXT))
    arrays, document = read_tensors(path, "test")
    for name, value in change.items():
        if name == "reject":
            document[name] = value
        elif value is None:
            del arrays[name]
        else:
            arrays[name] = value
    write_tensors(path, arrays, document)
    with pytest.raises(FormatError, match=message):
        read_artifact(path)


def test_a_visual_prompt_refuses_no_images(tmp_path: Path) -> None:
    write_artifact(tmp_path / "x", BORDER)
    arrays, document = read_tensors(tmp_path / "x", "test")
    write_tensors(tmp_path / "x", arrays, {**document, "reject": 0.05})
    with pytest.raises(FormatError, match=r"reject is 0\.05, but it changes images"):
        read_artifact(tmp_path / "x")


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path;"
        "from ztune.io.tensors import write_tensors;"
        "write_tensors(Path(sys.argv[1]), {'b': np.ones(3), 'a': np.zeros(2)},"
        " {k: k for k in 'zyxwvutsrq'})"
    )
    for name in ("1", "2", "3"):
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True)
    assert len({(tmp_path / name).read_bytes() for name in ("1", "2", "3")}) == 1


def test_a_truncated_artifact_is_refused_at_every_length(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_artifact(whole, CONTEXT)
    raw = whole.read_bytes()
    cut = tmp_path / "cut"
    for length in range(0, len(raw), 7):
        cut.write_bytes(raw[:length])
        with pytest.raises(FormatError, match="damaged or not written"):
            read_artifact(cut)


def document_of(
    path: Path, artifact: Artifact = CONTEXT
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    write_artifact(path, artifact)
    arrays, document = read_tensors(path, "test")
    return arrays, dict(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"\$\.format: expected .ztune-artifact., got .other."),
        ({"version": 4}, "newer than this ztune reads"),
        ({"version": "1"}, r"\$\.version: expected int, got str"),
        ({"kind": "pickle"}, r"\$\.kind: expected context or mixture or .*, got .pickle."),
        ({"classes": ["crab"]}, "at least two different class names"),
        ({"classes": ["crab", "crab"]}, "at least two different class names"),
        ({"classes": ["a", "b", "c"]}, r"tensor text_features is \(2, 4\), expected \(3, None\)"),
        ({"seed": -1}, r"\$\.seed: expected int >= 0, got -1"),
        ({"kind": "head"}, "tensor weight is missing"),
        ({"sed": 1}, r"unknown key .sed. \(did you mean seed\?\); known: classes, model_id, "),
        ({"config": 3}, r"\$\.config: expected object, got int"),
    ],
)
def test_a_changed_document_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    arrays, document = document_of(path)
    write_tensors(path, arrays, {**document, **change})  # type: ignore[dict-item]
    with pytest.raises(FormatError, match=message):
        read_artifact(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("context", np.full((2, 3), np.nan, np.float32), "not finite"),
        ("context", np.ones((2, 3)), "missing or not float32"),
        ("context", np.ones((0, 3), np.float32), "empty"),
        ("text_features", np.ones((3, 4), np.float32), r"expected \(2, None\)"),
        ("text_features", 1.002 * np.eye(2, 4, dtype=np.float32), "row of length 1.002, expected"),
        ("text_features", np.zeros((2, 4), np.float32), "row of length 0, expected unit rows"),
        ("logit_scale", np.zeros(1, np.float32), "logit_scale is 0, expected more than 0$"),
        ("logit_scale", np.full(1, -3, np.float32), "logit_scale is -3, expected more than 0$"),
        ("more", np.ones(1, np.float32), r"unknown tensors \['more'\]"),
    ],
)
def test_changed_tensors_are_refused(
    name: str, value: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    arrays, document = document_of(path)
    write_tensors(path, {**arrays, name: value}, document)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        read_artifact(path)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("kernel", "keys", None, "tensor keys is missing"),
        ("kernel", "values", None, "tensor values is missing"),
        ("kernel", "sharpness", None, "tensor sharpness is missing"),
        ("kernel", "bias", None, "tensor bias is missing"),
        ("kernel", "keys", np.ones((5, 3), np.float32), r"keys is \(5, 3\), expected \(None, 4\)"),
        ("kernel", "keys", np.eye(4, dtype=np.float32), r"values is \(5, 3\), expected \(4, 3\)"),
        ("kernel", "keys", np.ones((0, 4), np.float32), "keys is empty"),
        ("kernel", "values", np.ones((5, 2), np.float32), r"expected \(5, 3\)"),
        ("kernel", "values", np.ones((5, 3)), "not float32"),
        ("kernel", "sharpness", np.ones(2, np.float32), r"sharpness is \(2,\), expected \(1,\)"),
        ("kernel", "sharpness", np.full(1, np.inf, np.float32), "not finite"),
        ("kernel", "sharpness", np.zeros(1, np.float32), "sharpness is 0, expected more than 0"),
        ("kernel", "sharpness", np.full(1, -1, np.float32), "sharpness is -1, expected more"),
        ("kernel", "sharpness", np.full(1, 2e6, np.float32), "sharpness is 2e.06, .*at most 1e.06"),
        ("kernel", "keys", np.ones((5, 4), np.float32), "keys has a row of length 2, expected"),
        ("border", "text_features", np.ones((2, 4), np.float32), "text_features has a row of"),
        ("kernel", "visual", np.ones(1, np.float32), r"unknown tensors \['visual'\]"),
        ("head", "keys", np.ones((5, 4), np.float32), r"unknown tensors \['keys'\]"),
        ("mixture", "tokens", None, "tensor tokens is missing"),
        ("mixture", "tokens", np.ones((3, 2), np.int64), "tokens is missing, empty or not int32"),
        ("mixture", "tokens", np.ones((3, 2), np.float32), "tokens is missing, empty or not int32"),
        ("mixture", "tokens", np.ones(3, np.int32), r"not int32 of \(K, m\)"),
        ("mixture", "tokens", np.ones((0, 2), np.int32), "tokens is missing, empty or"),
        ("mixture", "tokens", np.ones((3, 0), np.int32), "tokens is missing, empty or"),
        ("mixture", "tokens", np.array([[1], [-3], [2]], np.int32), "has -3, expected ids of"),
        ("mixture", "tokens", np.ones((4, 2), np.int32), r"weights is \(3,\), expected \(4,\)"),
        ("mixture", "weights", None, "tensor weights is missing"),
        ("mixture", "weights", np.ones(2, np.float32), r"weights is \(2,\), expected \(3,\)"),
        ("mixture", "weights", np.ones((3, 1), np.float32), "weights is missing or not float32"),
        ("mixture", "weights", np.ones(3), "weights is missing or not float32"),
        ("mixture", "weights", np.array([1, np.inf, 0], np.float32), "not finite"),
        ("mixture", "text_features", np.ones((3, 4), np.float32), r"expected \(2, None\)"),
        ("mixture", "text_features", None, "tensor text_features is missing"),
        ("mixture", "logit_scale", np.zeros(1, np.float32), "logit_scale is 0, expected more"),
        ("mixture", "context", np.ones((2, 3), np.float32), r"unknown tensors \['context'\]"),
        ("context", "tokens", np.ones((3, 2), np.int32), r"unknown tensors \['tokens'\]"),
        ("border", "visual", None, "tensor visual is missing"),
        ("border", "visual", np.ones((4, 4), np.float32), "visual is missing or not float32"),
        ("border", "visual", np.ones((1, 4, 4), np.float32), r"visual is \(1, 4, 4\)"),
        ("border", "visual", np.full((3, 4, 4), np.nan, np.float32), "not finite"),
        ("border", "statistics", np.ones((2, 3), np.float32), r"unknown tensors \['statistics'\]"),
        ("border", "text_features", None, "tensor text_features is missing"),
        ("decoder", "statistics", None, "tensor statistics is missing"),
        ("decoder", "statistics", np.ones((3, 2), np.float32), r"expected \(2, 144\)"),
        ("decoder", "statistics", np.full((2, 144), -1, np.float32), "has a variance of -1"),
        ("decoder", "visual", np.ones((7, 1), np.float32), "visual is missing or not float32"),
        ("tokens", "visual", np.ones((0, 6), np.float32), "visual is empty"),
        ("tokens", "visual", np.ones((4097, 6), np.float32), "visual has 4097 tokens, expected"),
        ("tokens", "context", np.ones(5, np.float32), "context is missing or not float32"),
        ("tokens", "weight", np.ones(1, np.float32), r"unknown tensors \['weight'\]"),
    ],
)
def test_changed_tensors_of_other_kinds_are_refused(
    kind: str, name: str, value: np.ndarray | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    arrays, document = document_of(path, EVERY_KIND[kind])
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    write_tensors(path, arrays, document)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        read_artifact(path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "border",
            {"program": "pickle"},
            r"\$\.program: expected border or decoder or tokens, got .pickle.",
        ),
        ("border", {"program": None}, r"\$\.program: expected border or .*, got nothing"),
        ("border", {"program": "tokens"}, "tensor visual is missing or not float32"),
        ("border", {"program": "decoder"}, "tensor visual is missing or not float32"),
        ("border", {"templates": "a {}"}, r"\$\.templates: expected array, got str"),
        ("border", {"templates": [1]}, r"\$\.templates\[0\]: expected str, got int"),
        ("border", {"kind": "kernel"}, "unknown key .extractor.; known: classes"),
        ("kernel", {"kind": "head"}, "unknown tensors"),
        ("kernel", {"kind": "visual"}, "missing required field program"),
        ("head", {"kind": "kernel"}, "tensor keys is missing"),
        ("context", {"kind": "mixture"}, "missing required field at_once"),
        ("mixture", {"kind": "context"}, "unknown key .at_once.; known: classes"),
        ("mixture", {"kind": "head"}, "unknown key .at_once.; known: classes"),
        ("mixture", {"at_once": 0}, r"\$\.at_once: expected int >= 1, got 0"),
        ("mixture", {"at_once": 65_537}, r"\$\.at_once: expected int <= 65536, got 65537"),
        ("mixture", {"at_once": 10**30}, r"\$\.at_once: expected int <= 65536, got 10{30}"),
        ("mixture", {"at_once": -1}, r"\$\.at_once: expected int >= 1, got -1"),
        ("mixture", {"at_once": 1.5}, r"\$\.at_once: expected int, got float"),
        ("mixture", {"at_once": "10"}, r"\$\.at_once: expected int, got str"),
        ("mixture", {"at_once": True}, r"\$\.at_once: expected int, got bool"),
        ("mixture", {"at_once": None}, r"\$\.at_once: expected int, got null"),
    ],
)
def test_changed_documents_of_other_kinds_are_refused(
    kind: str, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    arrays, document = document_of(path, EVERY_KIND[kind])
    write_tensors(path, arrays, {**document, **change})  # type: ignore[dict-item]
    with pytest.raises(FormatError, match=message):
        read_artifact(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(save({"a": np.ones(2)}))
    with pytest.raises(FormatError, match="not written by ztune"):
        read_artifact(path)
    path.write_text("a text file, and a long one at that: longer than a header's length")
    with pytest.raises(FormatError, match="not written by ztune"):
        read_artifact(path)
    with pytest.raises(FormatError, match="does not exist"):
        read_artifact(tmp_path / "nowhere")


def test_an_artifact_of_another_model_is_refused() -> None:
    require_same_model(CONTEXT, "sha256:aa", Path("p"), Path("b"))
    other = replace(CONTEXT, provenance=replace(PROVENANCE, model_id="sha256:cc"))
    with pytest.raises(FormatError, match=r'"p" was made for model sha256:cc.*bundle "b" is'):
        require_same_model(other, "sha256:aa", Path("p"), Path("b"))


def test_a_mixture_too_large_for_a_classifier_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    huge = np.full_like(MIXTURE.text_features, 3e38)
    write_artifact(path, replace(MIXTURE, text_features=huge))
    with pytest.raises(FormatError, match="too large for a classifier"):
        read_artifact(path)

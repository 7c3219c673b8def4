"""Artifacts: golden content, equal bytes, and hostile files."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from ztune.artifact import (
    Artifact,
    ContextArtifact,
    HeadArtifact,
    Provenance,
    read_artifact,
    require_same_model,
    write_artifact,
)
from ztune.errors import FormatError
from ztune.tensors import read_tensors, write_tensors

PROVENANCE = Provenance("sha256:aa", "bb", "zip", 1, 5000, "budget", {"rank": 5, "init": "random"})
CONTEXT = ContextArtifact(
    ("crab", "Ünïcode"),
    PROVENANCE,
    context=np.arange(6, dtype=np.float32).reshape(2, 3),
    text_features=np.eye(2, 4, dtype=np.float32),
    logit_scale=12.5,
    logit_bias=-1.0,
)
HEAD = HeadArtifact(
    ("a", "b", "c"), PROVENANCE, np.ones((3, 4), np.float32), np.zeros(3, np.float32)
)


@pytest.mark.parametrize("artifact", [CONTEXT, HEAD], ids=["context", "head"])
def test_what_is_written_is_read_back(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_artifact(path, artifact)
    back = read_artifact(path)
    assert back.classes == artifact.classes
    assert back.provenance == artifact.provenance
    for got, expected in zip(back.classifier(), artifact.classifier(), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_header_is_as_specified(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_artifact(path, CONTEXT)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header["__metadata__"]["ztune"])
    assert document == {
        "format": "ztune-artifact",
        "version": 1,
        "kind": "context",
        "classes": ["crab", "Ünïcode"],
        "model_id": "sha256:aa",
        "bundle_digest": "bb",
        "method": "zip",
        "config": {"rank": 5, "init": "random"},
        "seed": 1,
        "queries": 5000,
        "stop_reason": "budget",
    }
    assert header["context"]["dtype"] == "F32"
    assert header["context"]["shape"] == [2, 3]


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path;"
        "from ztune.tensors import write_tensors;"
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
        with pytest.raises(FormatError, match="damaged or no file"):
            read_artifact(cut)


def document_of(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    write_artifact(path, CONTEXT)
    arrays, document = read_tensors(path, "test")
    return arrays, dict(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no ztune artifact"),
        ({"version": 2}, "newer than this ztune reads"),
        ({"version": "1"}, "\"version\" is '1', expected a whole number"),
        ({"kind": "pickle"}, "\"kind\" is 'pickle', expected context or head"),
        ({"classes": ["crab"]}, "at least two different class names"),
        ({"classes": ["crab", "crab"]}, "at least two different class names"),
        ({"classes": ["a", "b", "c"]}, r"tensor text_features is \(2, 4\), expected \(3, None\)"),
        ({"seed": -1}, '"seed" is -1'),
        ({"kind": "head"}, "tensor weight is missing"),
        ({"config": 3}, '"config" is 3, expected an object'),
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


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(save({"a": np.ones(2)}))
    with pytest.raises(FormatError, match="no file of ztune's"):
        read_artifact(path)
    path.write_text("a text file, and a long one at that: longer than a header's length")
    with pytest.raises(FormatError, match="no file of ztune's"):
        read_artifact(path)
    with pytest.raises(FormatError, match="does not exist"):
        read_artifact(tmp_path / "nowhere")


def test_an_artifact_of_another_model_is_refused() -> None:
    require_same_model(CONTEXT, "sha256:aa", Path("p"), Path("b"))
    other = replace(CONTEXT, provenance=replace(PROVENANCE, model_id="sha256:cc"))
    with pytest.raises(FormatError, match=r'"p" was made for model sha256:cc.*bundle "b" is'):
        require_same_model(other, "sha256:aa", Path("p"), Path("b"))

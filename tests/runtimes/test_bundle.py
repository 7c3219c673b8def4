"""Bundles that are damaged, swapped, too new, or that reach outside their folder."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import token_table
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import FormatError
from ztune.io import files


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json as an attacker or an accident would."""
    manifest = json.loads((folder / "bundle.json").read_text())
    change(manifest)
    (folder / "bundle.json").write_text(json.dumps(manifest))


def vouch(folder: Path, name: str) -> None:
    """Make the manifest vouch for whatever a file holds now."""
    content = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_the_embedded_bundle_is_whole() -> None:
    bundle = load_bundle(MINI)
    for name in bundle.files:
        assert bundle.file(name) == MINI / name


@pytest.mark.parametrize("name", ["prompt.onnx", "token_table.npy", "tokenizer.json"])
def test_damaged_files_are_found_when_used(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(FormatError, match=rf"{name} has {len(content) - 10} bytes, expected"):
        load_bundle(copy).file(name)
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    with pytest.raises(FormatError, match=f"{name}: SHA-256 differs from bundle.json"):
        load_bundle(copy).file(name)
    file.write_bytes(b"")
    with pytest.raises(FormatError, match="has 0 bytes"):
        load_bundle(copy).file(name)
    file.unlink()
    with pytest.raises(FormatError, match=f"{name} is missing"):
        load_bundle(copy).file(name)
    with pytest.raises(FormatError, match=r"has no other\.onnx"):
        load_bundle(copy).file("other.onnx")


def test_what_is_no_bundle(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(FormatError, match=r"does not exist, .* \(make one with: ztune export"):
        load_bundle(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"is a folder without bundle\.json"):
        load_bundle(tmp_path / "empty")
    for content in (b"", b"[1]", b"\xff\xfe", b'{"format": ', b"null"):
        (copy / "bundle.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"bundle\.json"):
            load_bundle(copy)


@pytest.mark.parametrize("name", ["bundle.json", "prompt.onnx"])
def test_files_that_may_not_be_read(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sha256(path: Path) -> str:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return files.sha256(path)

    monkeypatch.setattr("runtimes.bundle.sha256", sha256)
    with pytest.raises(FormatError, match=r"cannot be read: Permission denied$"):
        load_bundle(copy).file(name)


def set_field(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        target = manifest
        for key in path[:-1]:
            target = target[key]
        if value is ...:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("version", value=3), "format version 3 is newer than this ztune reads"),
        (set_field("version", value="1"), r"\$\.version: expected int, got str"),
        (set_field("format", value="onnx"), r"\$\.format: expected .ztune-bundle., got .onnx."),
        (set_field("model_id", value=...), "missing required field model_id"),
        (set_field("logit_scale", value=float("nan")), "cannot be read as JSON"),
        (set_field("logit_scale", value=-1), r"\$\.logit_scale: expected float > 0.*, got -1"),
        (set_field("embed_dim", value=0), r"\$\.embed_dim: expected int >= 1, got 0"),
        (set_field("embed_dim", value=65537), r"\$\.embed_dim: expected int <= 65536, got 65537"),
        (
            set_field("text", "width", value=10**9),
            r"\$\.text\.width: expected int <= 65536, got 10",
        ),
        (
            set_field("text", "context_length", value=10**9),
            r"\$\.text\.context_length: expected int <= 65536",
        ),
        (set_field("precision", value="fp8"), r"\$\.precision: expected .*, got .fp8."),
        (set_field("text", "graph", value="fast"), "prefix or sequence"),
        (set_field("text", "pooling", value="max"), r"\$\.text\.pooling: expected .*, got .max."),
        (
            set_field("text", "prefix_ids", value=[-1]),
            r"\$\.text\.prefix_ids\[0\]: expected int >= 0, got -1",
        ),
        (set_field("text", "cleaning", value="rot13"), r"\$\.text\.cleaning: expected"),
        (set_field("image", "size", value=10**9), r"\$\.image\.size: expected int <= 4096"),
        (set_field("image", "std", value=[0, 1, 1]), r"\$\.image\.std\[0\]: expected float > 0"),
        (
            set_field("image", "mean", value=[0, 1]),
            r"\$\.image\.mean: expected array of length >= 3",
        ),
        (set_field("image", "resize_mode", value="stretch"), r"\$\.image\.resize_mode: expected"),
        (set_field("files", "prompt.onnx", value="x"), r"\$\.files\[\.\.\.\]: expected"),
        (set_field("files", "../secret", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "/etc/passwd", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "..", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "a\\b", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "a\nb", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "", value={"sha256": "0", "bytes": 1}), "not a plain name"),
        (set_field("files", "a\0b", value={"sha256": "0", "bytes": 1}), "NUL character"),
        (set_field("files", ".hidden", value={"sha256": "0", "bytes": 1}), "not a plain name"),
    ],
)
def test_wrong_manifests_are_named(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(FormatError, match=message) as error:
        load_bundle(copy)
    assert "\n" not in str(error.value)


def test_a_file_name_longer_than_any_is_no_file(copy: Path) -> None:
    name = "x" * 300 + ".onnx"
    rewrite(copy, set_field("files", name, value={"sha256": "0" * 64, "bytes": 1}))
    (copy / "prompt.onnx").unlink()
    for one in (name, "prompt.onnx"):
        with pytest.raises(FormatError):
            load_bundle(copy).file(one)


def graph_with_location(location: str) -> bytes:
    """A graph that keeps a tensor in another file."""
    tensor = TensorProto(
        name="weight", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    out = helper.make_tensor_value_info("features", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["weight"], ["features"])], "g", [], [out], [tensor]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "location",
    ["../x", "/etc/passwd", "a/b", "other.onnx.data", "", ".", "token_table.npy", "x" * 200, "ü"],
)
def test_a_graph_that_reads_another_file_is_refused(copy: Path, location: str) -> None:
    (copy / "prompt.onnx").write_bytes(graph_with_location(location))
    vouch(copy, "prompt.onnx")
    with pytest.raises(FormatError, match=r"prompt\.onnx stores tensors in .*all in one file"):
        load_bundle(copy).file("prompt.onnx")
    # with a file of its own it may read that one only
    (copy / "prompt.onnx.data").write_bytes(np.arange(4, dtype="<f4").tobytes())
    vouch(copy, "prompt.onnx.data")
    with pytest.raises(FormatError, match=r"expected prompt\.onnx\.data"):
        load_bundle(copy).file("prompt.onnx")


def test_the_order_of_an_entrys_fields_hides_nothing(copy: Path) -> None:
    plain = graph_with_location("secret.data")
    key, value = b"\x0a\x08location", b"\x12\x0bsecret.data"
    assert key + value in plain
    (copy / "prompt.onnx").write_bytes(plain.replace(key + value, value + key))
    vouch(copy, "prompt.onnx")
    with pytest.raises(FormatError, match=r"stores tensors in 'secret\.data'"):
        load_bundle(copy).file("prompt.onnx")


def test_the_word_location_alone_is_no_offence(copy: Path) -> None:
    model = onnx.load(copy / "prompt.onnx")
    model.doc_string = "a class may be called location"
    onnx.save(model, copy / "prompt.onnx")
    vouch(copy, "prompt.onnx")
    assert load_bundle(copy).file("prompt.onnx").is_file()


def test_a_graph_may_keep_its_tensors_beside_it(copy: Path) -> None:
    (copy / "prompt.onnx").write_bytes(graph_with_location("prompt.onnx.data"))
    vouch(copy, "prompt.onnx")
    with pytest.raises(FormatError, match=r"stores tensors in 'prompt\.onnx\.data'"):
        load_bundle(copy).file("prompt.onnx")  # not listed, so nothing vouches for it
    (copy / "prompt.onnx.data").write_bytes(np.arange(4, dtype="<f4").tobytes())
    vouch(copy, "prompt.onnx.data")
    path = load_bundle(copy).file("prompt.onnx")
    ((weight,),) = [[onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]]
    assert weight.tolist() == [0, 1, 2, 3]
    (copy / "prompt.onnx.data").write_bytes(bytes(16))
    with pytest.raises(FormatError, match=r"prompt\.onnx\.data: SHA-256 differs"):
        load_bundle(copy).file("prompt.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': ()}",
    ],
)
def test_a_token_table_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "token_table.npy").write_bytes(content)
    vouch(copy, "token_table.npy")
    with pytest.raises(FormatError, match=r"token_table\.npy"):
        token_table(load_bundle(copy))


def test_a_token_table_of_another_shape_or_with_objects(copy: Path) -> None:
    for table in (np.zeros((3, 5), np.float32), np.zeros((3, 128)), np.array([{}], dtype=object)):
        np.save(copy / "token_table.npy", table, allow_pickle=True)
        vouch(copy, "token_table.npy")
        with pytest.raises(FormatError, match=r"token_table\.npy"):
            token_table(load_bundle(copy))


def test_a_tokenizer_that_is_none(copy: Path) -> None:
    for content in (b"{}", b"\xff\xfe\x00", b""):
        (copy / "tokenizer.json").write_bytes(content)
        vouch(copy, "tokenizer.json")
        with pytest.raises(FormatError, match=r"tokenizer\.json"):
            Tokenizer(load_bundle(copy))


def test_the_digest_is_of_the_manifest(copy: Path) -> None:
    before: Bundle = load_bundle(copy)
    assert before.digest == load_bundle(MINI).digest
    rewrite(copy, set_field("created_by", value="another"))
    assert load_bundle(copy).digest != before.digest
    assert load_bundle(copy).model_id == before.model_id

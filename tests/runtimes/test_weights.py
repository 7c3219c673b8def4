"""`weights.bin`: one file for all graphs and the token table, checked before it is used."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.client import export_client
from runtimes import weights
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import Graph, parity_inputs
from runtimes.prompts import token_table
from runtimes.providers import Execution
from runtimes.reference import _open
from runtimes.weights import TABLE, WEIGHTS
from tests.conftest import MINI
from tests.shared_bundle import share_weights
from ztune.errors import FormatError

BLOCK = 1 << 16
GRAPHS = ("image.onnx", "image_prompted.onnx", "text.onnx", "prompt.onnx")
Manifest = dict[str, Any]


@pytest.fixture
def shared(tmp_path: Path) -> Bundle:
    return share_weights(load_bundle(MINI), tmp_path / "shared")


def rewrite(bundle: Bundle, change: Callable[[Manifest], object]) -> None:
    path = bundle.path / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(path: Path, place: int) -> None:
    """Change one byte of a file, and its time stamps as a later change would."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length of a graph's weights in the shared file."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == WEIGHTS
            found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_equal_weights_are_stored_once(shared: Bundle) -> None:
    every = {span for name in GRAPHS for span in spans(shared.path / name).values()}
    assert all(offset % 4096 == 0 for offset, _ in every)
    assert shared.token_table is not None
    assert shared.token_table.span in every
    # Nothing overlaps, and nothing else is in the file.
    ends = 0
    for offset, length in sorted(every):
        assert ends <= offset < ends + 4096
        ends = offset + length
    assert ends == (shared.path / WEIGHTS).stat().st_size
    assert set(spans(shared.path / "image.onnx").values()) == set(
        spans(shared.path / "image_prompted.onnx").values()
    )


def test_graphs_and_table_are_those_of_the_older_layout(shared: Bundle) -> None:
    mini = load_bundle(MINI)
    for name in GRAPHS:
        one, other = onnx.load(shared.file(name)).graph, onnx.load(mini.file(name)).graph
        assert list(one.node) == list(other.node)
        for first, second in zip(one.initializer, other.initializer, strict=True):
            assert onnx.numpy_helper.to_array(first).tobytes() == (
                onnx.numpy_helper.to_array(second).tobytes()
            )
    table = token_table(shared)
    assert isinstance(table, np.memmap)
    np.testing.assert_array_equal(table, token_table(mini))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("token_table"), "only one of .token_table. and weights.bin"),
        (lambda m: m["files"].pop(WEIGHTS), "only one of .token_table. and weights.bin"),
        (lambda m: m.pop("weight_blocks"), r"weight_blocks: expected 3 digests .*, got 0"),
        (lambda m: m["weight_blocks"].append("0" * 64), "weight_blocks: expected 3 digests"),
        (lambda m: m["weight_blocks"].__setitem__(0, "x"), r"\$\.weight_blocks\[.*\]: expected"),
        (lambda m: m["token_table"].update(offset=-1), r"\$\.token_table\.offset: expected"),
        (lambda m: m["token_table"].update(offset=10**9), r"\$\.token_table: .* within the"),
        (lambda m: m["token_table"].update(shape=[10**6, 64]), r"\$\.token_table: .* within the"),
        (lambda m: m["token_table"].update(shape=[812, 32]), r"expected \[\*, 64\]"),
        (lambda m: m["token_table"].update(shape=[812]), r"\$\.token_table\.shape: expected"),
        (lambda m: m["token_table"].update(dtype="object"), r"\$\.token_table\.dtype: expected"),
        (lambda m: m.update(store="int4"), r"\$\.store: expected"),
    ],
)
def test_wrong_manifests_are_named(
    shared: Bundle, change: Callable[[Manifest], object], message: str
) -> None:
    rewrite(shared, change)
    with pytest.raises(FormatError, match=message) as error:
        load_bundle(shared.path)
    assert "\n" not in str(error.value)


def external(**entries: str) -> bytes:
    """Return a graph with a tensor f32[4, 4] in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key.partition("_")[0], value=value)
    out = helper.make_tensor_value_info("features", TensorProto.FLOAT, [4, 4])
    node = helper.make_node("Identity", ["w"], ["features"])
    graph = helper.make_graph([node], "g", [], [out], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


SIZE = str(10**12)
GOOD = {"location": WEIGHTS, "offset": "4096", "length": "64"}


@pytest.mark.parametrize(
    "entries",
    [
        {**GOOD, "offset": SIZE},
        {**GOOD, "offset": "-4096"},
        {**GOOD, "offset": "0x10"},
        {**GOOD, "offset": "9" * 30},
        {**GOOD, "offset": ""},
        {**GOOD, "length": "65"},
        {**GOOD, "length": SIZE},
        {**GOOD, "length": "-1"},
        {**GOOD, "prepacked": "x|0;64;y"},
    ],
)
def test_a_tensor_outside_of_the_file_is_refused(shared: Bundle, entries: dict[str, str]) -> None:
    path = shared.path / "prompt.onnx"
    for given, good in ((GOOD, True), (entries, False)):
        path.write_bytes(external(**given))
        vouch(shared, path.name)
        bundle = load_bundle(shared.path)
        if good:
            assert bundle.file("prompt.onnx") == path
            continue
        with pytest.raises(FormatError, match=r"has a tensor \[4, 4\] at offset .* within"):
            bundle.file("prompt.onnx")


def test_an_entry_that_is_given_twice_is_refused(shared: Bundle) -> None:
    (shared.path / "prompt.onnx").write_bytes(external(**GOOD, offset_again="0"))
    vouch(shared, "prompt.onnx")
    with pytest.raises(FormatError, match="not an ONNX graph"):
        load_bundle(shared.path).file("prompt.onnx")


@pytest.mark.parametrize("dims", [[2**40, 2**40], [-1], [0], [2**62] * 1000])
def test_a_shape_beyond_the_file_is_refused(shared: Bundle, dims: list[int]) -> None:
    model = onnx.load_model_from_string(external(location=WEIGHTS, offset="0"))
    model.graph.initializer[0].dims[:] = dims
    (shared.path / "prompt.onnx").write_bytes(model.SerializeToString())
    vouch(shared, "prompt.onnx")
    with pytest.raises(FormatError, match=r"has a tensor .* expected it to be within"):
        load_bundle(shared.path).file("prompt.onnx")


def vouch(bundle: Bundle, name: str) -> None:
    content = (bundle.path / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(bundle, lambda manifest: manifest["files"].update({name: entry}))


@pytest.fixture
def in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Return a bundle whose digests cover 64 KiB each."""
    for module in ("weights", "bundle"):
        monkeypatch.setattr(f"runtimes.{module}.BLOCK", BLOCK)
    bundle = share_weights(load_bundle(MINI), tmp_path / "blocks")
    assert len(bundle.weight_blocks) > 50
    return bundle


def test_only_the_blocks_of_a_graph_are_checked(in_blocks: Bundle) -> None:
    image = spans(in_blocks.path / "image.onnx")
    flip(in_blocks.path / WEIGHTS, min(image.values())[0])
    for use in (lambda: in_blocks.file("prompt.onnx"), lambda: token_table(in_blocks)):
        use()
    with pytest.raises(FormatError, match=r"weights\.bin: SHA-256 of block 0 differs"):
        in_blocks.file("image.onnx")
    with pytest.raises(FormatError, match=r"weights\.bin: SHA-256 differs"):
        in_blocks.file(WEIGHTS)


def test_every_byte_that_a_graph_reads_is_checked(in_blocks: Bundle) -> None:
    for name in ("text.onnx", "prompt.onnx"):
        offset, length = max(spans(in_blocks.path / name).values())
        for place in (offset, offset + length - 1):
            flip(in_blocks.path / WEIGHTS, place)
            with pytest.raises(FormatError, match="SHA-256 of block"):
                in_blocks.file(name)
            flip(in_blocks.path / WEIGHTS, place)
            in_blocks.file(name)


def test_a_block_is_read_once_while_the_file_is_unchanged(
    in_blocks: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def sha256() -> Any:
        counted.append(1)
        return hashlib.sha256()

    monkeypatch.setattr(weights, "hashlib", SimpleNamespace(sha256=sha256))
    in_blocks.file("text.onnx")
    once = len(counted)
    in_blocks.file("text.onnx")
    assert len(counted) == 2 * once  # the file is new, so it could change within a time stamp
    monkeypatch.setattr(weights, "_LEAST_AGE_NS", -(10**12))
    in_blocks.file("text.onnx")
    before = len(counted)
    load_bundle(in_blocks.path).file("text.onnx")
    assert len(counted) == before
    offset, _ = in_blocks.token_table.span if in_blocks.token_table else (0, 0)
    flip(in_blocks.path / WEIGHTS, offset)
    with pytest.raises(FormatError, match="SHA-256 of block"):
        load_bundle(in_blocks.path).file("text.onnx")


def test_a_truncated_or_missing_file_is_named(shared: Bundle) -> None:
    path = shared.path / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for use in (lambda: shared.file("image.onnx"), lambda: token_table(shared)):
        with pytest.raises(FormatError, match=r"weights\.bin has \d+ bytes, expected"):
            use()
    path.unlink()
    with pytest.raises(FormatError, match=r"weights\.bin is missing"):
        shared.file("image.onnx")
    with pytest.raises(FormatError, match=r"token_table\.bin is missing"):
        token_table(shared)


def test_a_client_half_has_the_table_alone(shared: Bundle, tmp_path: Path) -> None:
    half = export_client(shared, tmp_path / "half")
    assert {path.name for path in half.path.iterdir()} == {
        "bundle.json", "tokenizer.json", TABLE, "parity.safetensors",
    }  # fmt: skip
    assert half.digest == shared.digest
    assert half.is_client_half
    half.check_client_files()
    np.testing.assert_array_equal(token_table(half), token_table(shared))
    again = export_client(half, tmp_path / "again")
    assert (again.path / TABLE).read_bytes() == (half.path / TABLE).read_bytes()
    with pytest.raises(FormatError, match="client half of a bundle, without graphs"):
        half.file("prompt.onnx")
    flip(half.path / TABLE, 5)
    with pytest.raises(FormatError, match=r"token_table\.bin: SHA-256 differs"):
        half.check_client_files()


@pytest.mark.parametrize("bundle_precision", [True, False])
def test_the_reference_reads_the_same_weights(shared: Bundle, bundle_precision: bool) -> None:
    given, expected = parity_inputs(shared.file("parity.safetensors"), "prompt")
    features = _open(shared, bundle_precision, 1).run(["features"], given)[0]
    assert features.dtype == (np.float32 if bundle_precision else np.float64)
    assert np.abs(features - expected).max() < 1e-6


def test_a_copied_bundle_runs(shared: Bundle, tmp_path: Path) -> None:
    moved = load_bundle(Path(shutil.copytree(shared.path, tmp_path / "moved")))
    shutil.rmtree(shared.path)
    assert Graph(moved, "prompt", Execution(threads=1)).session.get_outputs()[0].name == "features"

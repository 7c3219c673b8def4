"""Graphs that may never end, or that need more than ONNX's own operators, are refused at load."""

import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from runtimes.bundle import load_bundle
from runtimes.classifier import open_classifier
from runtimes.extractor import OrtExtractor
from runtimes.graph_check import check_graph
from runtimes.ort import Graph
from runtimes.providers import Execution
from runtimes.reference import _open
from tests.conftest import MINI, Command
from ztune.errors import FormatError, ZtuneError

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name: str, dtype: int = FLOAT, shape: list[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, [1] if shape is None else shape)


def body() -> onnx.GraphProto:
    """Return a loop's body that always goes on."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("go_on", "x")]
    scalars = [value("i", INT64, []), value("go_on", BOOL, [])]
    return helper.make_graph(
        nodes, "body", [*scalars, value("x")], [value("go_on_out", BOOL, []), value("x_out")]
    )


def loop() -> onnx.NodeProto:
    return helper.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body())


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    constants = [
        helper.make_tensor("rounds", INT64, [], [2**62]),
        helper.make_tensor("yes", BOOL, [], [True]),
    ]
    graph = helper.make_graph(list(nodes), "g", [value("x")], [value("y")], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branch() -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "branch", [], [value("b")]
    )


def with_function() -> onnx.ModelProto:
    model = model_of(helper.make_node("Endless", ["x"], ["y"], domain="ai.onnx"))
    function = helper.make_function("ai.onnx", "Endless", ["x"], ["y"], [], [])
    model.functions.append(function)
    return model


def with_training() -> onnx.ModelProto:
    model = model_of(helper.make_node("Identity", ["x"], ["y"]))
    model.training_info.add().algorithm.CopyFrom(body())
    return model


def hidden(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its domain and operator written twice, of which the last counts."""
    (node,) = model.graph.node
    again = onnx.NodeProto()
    again.CopyFrom(node)
    model.graph.node[0].ClearField("attribute")
    model.graph.node[0].MergeFromString(again.SerializeToString())
    return model


HOSTILE = {
    "Loop": model_of(loop()),
    "If": model_of(
        helper.make_node("If", ["yes"], ["y"], then_branch=branch(), else_branch=branch())
    ),
    "Scan": model_of(helper.make_node("Scan", ["x"], ["y"], body=branch(), num_scan_inputs=1)),
    "SequenceMap": model_of(helper.make_node("SequenceMap", ["x"], ["y"], body=branch())),
    "many graphs": model_of(helper.make_node("Own", ["x"], ["y"], parts=[branch(), branch()])),
    "later node": model_of(helper.make_node("Identity", ["x"], ["z"]), loop()),
    "merged node": hidden(model_of(loop())),
    "ORT's own": model_of(helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")),
    "trees": model_of(helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml")),
    "anybody's": model_of(helper.make_node("Identity", ["x"], ["y"], domain="my.own")),
    "function": with_function(),
    "training": with_training(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_may_not_end_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(HOSTILE[name].SerializeToString())
    with pytest.raises(FormatError, match=r"g\.onnx has .*expected a graph of standard ONNX op"):
        check_graph(path, None)


def test_a_number_that_protobuf_cuts_off_hides_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    content = model_of(loop()).SerializeToString()
    graph = content.index(b"\x3a", 2)  # field 7 of the model, as one byte
    path.write_bytes(content[:graph] + b"\xba\x80\x80\x80\x10" + content[graph + 1 :])
    with pytest.raises(FormatError):
        check_graph(path, None)


@settings(max_examples=300)
@given(place=st.integers(min_value=0), bits=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_graph_is_read_or_refused_in_one_line(
    place: int, bits: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    content = bytearray(HOSTILE["later node"].SerializeToString())
    place %= len(content)
    content[place] ^= bits
    path.write_bytes(content[: place + 1] if cut else content)
    said = ""
    try:
        check_graph(path, None)
    except FormatError as error:
        said = str(error)
    assert "\n" not in said


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle whose graphs are all endless, and whose manifest vouches for them."""
    folder = Path(shutil.copytree(MINI, tmp_path / "bundle"))
    manifest = json.loads((folder / "bundle.json").read_text())
    for graph in folder.glob("*.onnx"):
        model = onnx.load(graph)
        model.graph.node.append(loop())
        model.graph.initializer.extend(HOSTILE["Loop"].graph.initializer)
        model.graph.node[-1].input[2] = model.graph.output[0].name
        graph.write_bytes(content := model.SerializeToString())
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][graph.name] = {"sha256": digest, "bytes": len(content)}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["image", "image_prompted", "text", "prompt"])
def test_no_graph_of_a_bundle_has_control_flow(name: str, bundle: Path) -> None:
    with pytest.raises(FormatError, match=rf"{name}\.onnx has control flow \(operator 'Loop'\)"):
        Graph(load_bundle(bundle), name, Execution())


def test_no_reference_extractor_or_classifier_has_control_flow(
    bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "e.onnx"
    path.write_bytes(HOSTILE["Loop"].SerializeToString())
    with pytest.raises(ZtuneError, match="control flow"):
        _open(load_bundle(bundle), False, None)
    with pytest.raises(ZtuneError, match="control flow"):
        OrtExtractor(path, load_bundle(MINI), Execution())
    with pytest.raises(ZtuneError, match="control flow"):
        open_classifier(path, Execution())


def test_a_graph_for_a_server_has_no_control_flow(
    bundle: Path, ztune: Command, tmp_path: Path
) -> None:
    done = ztune("export-triton", bundle, "--out", tmp_path / "repository")
    assert done.code == 1
    assert "control flow" in done.err

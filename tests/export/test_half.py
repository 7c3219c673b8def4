"""fp16 graphs: the precision of every node, for several architectures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from benchmarks.old_layout import write_version_1
from export.half import to_half
from export.quantize import quantize_bundle
from export.weights import read_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtPromptGraph, parity_on_this_machine
from runtimes.providers import Execution, onnxruntime, open_session
from runtimes.tokenizer import Tokenizer
from runtimes.weights import WEIGHTS
from tests.conftest import DIGITS, MINI, Command
from tests.export.conftest import Exported
from tests.export.small_models import write_tiny
from ztune.errors import ProviderError, ZtuneError

GRAPHS = ("image", "text", "prompt")
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def mini_half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantize_bundle(load_bundle(MINI), tmp_path_factory.mktemp("b") / "fp16", "fp16")


@pytest.fixture(scope="module", params=["ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "RN50"])
def other_half(
    request: pytest.FixtureRequest,
    small: Callable[[str], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    _, whole = small(request.param)
    out = tmp_path_factory.mktemp("other") / "fp16"
    return quantize_bundle(whole, out, "fp16")


def typed_nodes(bundle: Bundle, graph: str) -> Iterator[tuple[onnx.NodeProto, list[int], int]]:
    """Yield each node with the types of its inputs and of its output."""
    model = read_graph(bundle.file(f"{graph}.onnx"))
    inferred = shape_inference.infer_shapes(model).graph
    kinds = {w.name: w.data_type for w in inferred.initializer}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        kinds[value.name] = value.type.tensor_type.elem_type
    for node in inferred.node:
        yield node, [kinds[name] for name in node.input if name], kinds[node.output[0]]


def check_precisions(bundle: Bundle) -> None:
    for graph in GRAPHS:
        nodes = list(typed_nodes(bundle, graph))
        norms = [i for i, (node, _, _) in enumerate(nodes) if node.op_type == "LayerNormalization"]
        for node, inputs, output in nodes:
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2", "Div", "Where"):
                assert HALF not in (*inputs, output), node.op_type
            assert len({k for k in inputs if k in (HALF, FULL)}) <= 1, node.name
        products = [
            (i, output)
            for i, (node, _, output) in enumerate(nodes)
            if node.op_type in ("MatMul", "Gemm", "Conv")
        ]
        last = norms[-1] if norms else products[-1][0]
        assert {output for i, output in products if i < last} == {HALF}
        assert {output for i, output in products if i >= last} <= {FULL}


def test_products_are_fp16_and_sums_and_normalisation_fp32(mini_half: Bundle) -> None:
    check_precisions(mini_half)
    assert mini_half.precision == "fp16"
    assert mini_half.model_id == load_bundle(MINI).model_id
    weights = [w for graph in GRAPHS for w in read_graph(MINI / f"{graph}.onnx").graph.initializer]
    assert mini_half.files[WEIGHTS].bytes < 0.6 * sum(len(w.raw_data) for w in weights)
    for graph in GRAPHS:
        assert mini_half.parity[graph]["cosine"] > 0.99999


def test_residual_sums_stay_fp32(mini_half: Bundle) -> None:
    for graph in GRAPHS:
        nodes = list(typed_nodes(mini_half, graph))
        made_by = {name: node for node, _, _ in nodes for name in node.output}
        normed = {node.input[0] for node, _, _ in nodes if node.op_type == "LayerNormalization"}
        for name in normed & made_by.keys():
            # No value between a norm and the sum before it is fp16.
            assert made_by[name].op_type != "Cast"


def test_other_architectures(other_half: Bundle) -> None:
    check_precisions(other_half)
    for graph in GRAPHS:
        assert other_half.parity[graph]["cosine"] > 0.9999


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_external_weights_are_converted_too(precision: str, tmp_path: Path) -> None:
    mini = load_bundle(MINI)
    split = write_version_1(mini, tmp_path / "split", threshold=100_000)
    assert "image.onnx.data" in split.files
    one, other = (
        quantize_bundle(bundle, tmp_path / name, precision)
        for name, bundle in (("one", mini), ("other", split))
    )
    assert one.files == other.files
    assert one.manifest["derived_from"] == mini.digest


def test_an_fp16_bundle_is_refused_on_the_cpu(
    mini_half: Bundle, ztune: Command, tmp_path: Path
) -> None:
    with pytest.raises(ProviderError, match=r"an fp16 bundle cannot run on cpu: .*known to crash"):
        OrtPromptGraph(mini_half, Tokenizer(mini_half), Execution())
    with pytest.raises(ProviderError, match="an fp16 bundle cannot run on cpu"):
        parity_on_this_machine(mini_half, "text", Execution())
    words = ("--data", DIGITS, "--provider", "cpu", "--out", tmp_path / "run")
    done = ztune("tune", mini_half.path, *words)
    assert done.code == 1
    assert "an fp16 bundle cannot run on cpu" in done.err
    assert not (tmp_path / "run").exists()


def test_parity_of_fp16_on_the_cpu_skips_optimisations_that_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    levels = []

    def record(*given: Any) -> Any:
        session = open_session(*given)
        levels.append(session.get_session_options().graph_optimization_level)
        return session

    monkeypatch.setattr("runtimes.ort.open_session", record)
    quantize_bundle(load_bundle(MINI), tmp_path / "x", "fp16")
    assert levels == [onnxruntime().GraphOptimizationLevel.ORT_ENABLE_BASIC] * 3


def test_a_weight_beyond_fp16_is_named() -> None:
    weight = numpy_helper.from_array(np.full((2, 2), 7e4, dtype=np.float32), "big")
    ones = numpy_helper.from_array(np.ones(2, dtype=np.float32), "ones")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "big"], ["h"]),
            helper.make_node("LayerNormalization", ["h", "ones"], ["y"]),
        ],
        "g",
        [value("x", FULL, [1, 2])],
        [value("y", FULL, [1, 2])],
        [weight, ones],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(
        ZtuneError, match=r"weight big has values up to 7e\+04, above the fp16 maximum of 65504"
    ):
        to_half(model)


@pytest.mark.usefixtures("traced_before")
def test_export_in_another_precision_leaves_only_that(ztune: Command, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    out = tmp_path / "out" / "bundle"
    words = ("export", "--model", model, "--out", out)
    done = ztune(*words, "--precision", "fp16", "--json")
    assert done.code == 0, done.err
    assert done.json["precision"] == "fp16"
    assert "prompt.onnx: converting to fp16" in done.err
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]
    bundle = load_bundle(out)
    assert {path.name for path in out.iterdir()} == {*bundle.files, "bundle.json"}
    for name in bundle.files:
        bundle.file(name)
    refused = ztune(*words, "--precision", "fp8")
    assert refused.code == 1
    assert 'unknown --precision "fp8", expected fp32, fp16, int8' in refused.err

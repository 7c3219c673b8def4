"""Reference graphs: the same weights in higher precision, run in a process of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.quantize import quantize_bundle
from runtimes import reference
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtPromptGraph, parity_inputs
from runtimes.prompts import name_tokens
from runtimes.providers import Execution
from runtimes.reference import reference_features, to_reference_graph
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import FormatError, ZtuneError
from ztune.types import F32, F64

WORDS = ("zero", "one", "a rather long name", "three", "four")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantize_bundle(load_bundle(MINI), tmp_path_factory.mktemp("b") / "int8", "int8")


def contexts(n: int) -> F32:
    rng = np.random.default_rng(0)
    return (0.02 * rng.standard_normal((n, 4, 64))).astype(np.float32)


def refined(bundle: Bundle, n: int = 6, bundle_precision: bool = False, **execution: Any) -> F64:
    names = name_tokens(bundle.text, Tokenizer(bundle), WORDS, 4)
    return reference_features(
        bundle, names, contexts(n), 2, Execution(**execution), bundle_precision=bundle_precision
    )


def own(bundle: Bundle, n: int = 6) -> F32:
    return (
        OrtPromptGraph(bundle, Tokenizer(bundle), Execution())
        .encoder(WORDS, 4, n)
        .encode(contexts(n))
    )


def run(model: Any, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, feeds)[0])


def test_fp32_is_refined_to_double_precision() -> None:
    bundle = load_bundle(MINI)
    given, _ = parity_inputs(bundle.file("parity.safetensors"), "prompt")
    model = to_reference_graph(onnx.load(bundle.file("prompt.onnx")), "fp32")
    computed = run(model, given)
    # Independently of ONNX Runtime: numpy in double precision. Gelu alone is in single precision.
    expected = ReferenceEvaluator(model).run(None, given)[0]
    assert computed.dtype == np.float64
    assert np.abs(computed - expected).max() < 2e-8
    features = refined(bundle)
    difference = np.abs(features - own(bundle)).max()
    assert 1e-9 < difference < 1e-6


def test_int8_is_refined_to_its_weights_in_fp32(int8: Bundle) -> None:
    # The fp32 graph with each weight rounded as the quantizer did, put together independently.
    rounded = onnx.load(int8.file("prompt.onnx"))
    values = {t.name: numpy_helper.to_array(t) for t in rounded.graph.initializer}
    expected = onnx.load(load_bundle(MINI).file("prompt.onnx"))
    n_rounded = 0
    for tensor in expected.graph.initializer:
        for name, back in ((tensor.name, np.asarray), (f"{tensor.name}_Transposed", np.transpose)):
            if f"{name}_quantized" in values:
                weight, zero, scale = (
                    values[f"{name}_{part}"].astype(np.float32)
                    for part in ("quantized", "zero_point", "scale")
                )
                wide = np.ascontiguousarray(back((weight - zero) * scale))
                tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
                n_rounded += 1
    given, _ = parity_inputs(int8.file("parity.safetensors"), "prompt")
    exact = run(expected, given)
    n_products = sum(node.op_type == "MatMulInteger" for node in rounded.graph.node)
    assert n_rounded == n_products > 0
    before = run(rounded, given)
    model = to_reference_graph(rounded, "int8")
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"MatMulInteger", "DynamicQuantizeLinear"}
    np.testing.assert_allclose(run(model, given), exact, atol=2e-6)
    assert np.abs(before - exact).max() > 1e-4


def test_fp16_is_refined_to_its_weights_in_fp32() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16)
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["narrow"], to=half),
            helper.make_node("MatMul", ["narrow", "weight"], ["product"]),
            helper.make_node(
                "Constant", [], ["three"], value=helper.make_tensor("", half, [], [3])
            ),
            helper.make_node("Mul", ["product", "three"], ["y"]),
        ],
        "half",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [helper.make_tensor_value_info("y", half, [4, 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    computed = run(to_reference_graph(model, "fp16"), {"x": x})
    assert computed.dtype == np.float32
    np.testing.assert_allclose(computed, 3 * (x @ weight.astype(np.float32)), rtol=1e-5, atol=1e-6)


def test_the_process_answers_as_the_graph_whatever_its_calls(int8: Bundle) -> None:
    one_by_one = np.concatenate([refined(int8, n)[n - 1 :] for n in (1, 2, 3)])
    np.testing.assert_allclose(refined(int8, 3, threads=1), one_by_one, atol=1e-6)
    # A bundle named as the reference is run as it is.
    np.testing.assert_array_equal(
        refined(load_bundle(MINI), bundle_precision=True).shape, (6, 5, 128)
    )
    np.testing.assert_allclose(
        refined(load_bundle(MINI), bundle_precision=True), own(load_bundle(MINI)), atol=1e-6
    )


def test_a_graph_of_another_make_is_refused(int8: Bundle) -> None:
    with pytest.raises(FormatError, match="no MatMulInteger"):
        to_reference_graph(onnx.load(load_bundle(MINI).file("prompt.onnx")), "int8")
    strange = onnx.load(int8.file("prompt.onnx"))
    next(n for n in strange.graph.node if n.op_type == "DynamicQuantizeLinear").op_type = "Abs"
    with pytest.raises(FormatError, match="is not quantized in it"):
        to_reference_graph(strange, "int8")


def test_whatever_the_process_dies_of_is_one_line(
    int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [(5,)]
    with pytest.raises(ZtuneError, match=r"in higher precision: .*failed while running") as raised:
        # Contexts of another width than the graph's.
        reference_features(int8, names, np.zeros((2, 4, 32), np.float32), 2, Execution())
    assert "\n" not in str(raised.value)
    for program, message in (
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("raise SystemExit(3)", "exited with code 3 and no message"),
        ("print('x'); 1 / 0", "ZeroDivisionError: division by zero"),
    ):
        monkeypatch.setattr(reference, "_PROGRAM", program)
        with pytest.raises(ZtuneError, match=message) as raised:
            refined(int8)
        assert "\n" not in str(raised.value)

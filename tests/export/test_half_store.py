"""Weights shared by exported graphs, and bundles that store them in half precision."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.numpy import load_file

from benchmarks.old_layout import write_version_1
from export.bundle import export_bundle, model_id
from export.half_store import rounded_to_half, to_exact_half
from export.quantize import quantize_bundle
from export.weights import read_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import Graph, parity_inputs
from runtimes.prompts import embed, token_table
from runtimes.providers import Execution, run_graph
from runtimes.weights import WEIGHTS
from tests.conftest import FEW_DIGITS, Command
from tests.export.conftest import DEEP, Exported
from tests.export.graph_checks import check_double_reference
from ztune.errors import ConfigError
from ztune.exporting import export

GRAPHS = ("image", "text", "prompt")


def stored_bytes(bundle: Bundle, graph: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each matrix of a graph."""
    for tensor in onnx.load(bundle.file(f"{graph}.onnx")).graph.initializer:
        if len(tensor.dims) > 1 and len(tensor.raw_data) >= 1024:
            yield tensor.name, tensor.raw_data


@pytest.mark.parametrize("name", DEEP)
def test_prompt_and_text_graphs_share_their_weights(
    name: str, small: Callable[[str], Exported]
) -> None:
    loaded, bundle = small(name)
    text = {content for _, content in stored_bytes(bundle, "text")}
    own = [key for key, content in stored_bytes(bundle, "prompt") if content not in text]
    prefix = bundle.text.graph == "prefix"
    expected = ["projections.1.kv.weight", "projections.1.q.weight"] if prefix else []
    found = sorted(key for key in own if not key.startswith("sos_"))
    assert found == expected
    # In all, little more than the parameters: alignment counts in models as small as this.
    n_bytes = sum(4 * p.numel() for p in loaded.model.parameters())
    last = 3 * bundle.text.width**2 * 4 if prefix else 0
    assert bundle.files[WEIGHTS].bytes < n_bytes + last + 4096 * 150
    assert bundle.token_table is not None
    assert bundle.token_table.dtype == "float32"


@pytest.fixture(scope="module")
def half(tiny: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("half") / "bundle"
    loaded, _ = tiny
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    bundle = export_bundle(loaded, out, store="fp16", progress=lines.append)
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return bundle, lines


def test_half_the_bytes_and_nothing_lost_but_the_rounding(
    half: tuple[Bundle, list[str]], tiny: Exported
) -> None:
    bundle, lines = half
    loaded, whole = tiny
    assert bundle.model_id == whole.model_id == model_id(loaded)
    assert (bundle.store, bundle.precision, whole.store) == ("fp16", "fp32", "fp32")
    assert bundle.files[WEIGHTS].bytes < 0.53 * whole.files[WEIGHTS].bytes
    assert bundle.rounding.keys() == set(GRAPHS)
    worst = min(bundle.rounding.values())
    assert 0.9999 < worst < 1
    assert lines[-1] == (
        f"weights stored in fp16: minimum cosine to the original weights {worst:.7f}"
    )
    for name in GRAPHS:
        assert bundle.parity[name]["max_abs"] < 5e-6
        given, expected = parity_inputs(bundle.file("parity.safetensors"), name)
        graph = Graph(bundle, name, Execution(threads=1))
        (features,) = run_graph(graph.session, graph.path, ["features"], given)
        assert features.dtype == np.float32
        assert np.abs(features - expected).max() < 5e-6
    table = token_table(bundle)
    assert [one.dtype.name for one in (table, token_table(whole))] == ["float16", "float32"]
    ids = np.arange(0, 49000, 997)
    rounded = token_table(whole)[ids].astype(np.float16).astype(np.float32)
    assert embed(table, ids).dtype == np.float32
    np.testing.assert_array_equal(embed(table, ids), rounded)


def test_features_are_those_of_the_same_weights_in_32_bits(
    half: tuple[Bundle, list[str]], tmp_path: Path, ztune: Command
) -> None:
    bundle, _ = half
    wide = write_version_1(bundle, tmp_path / "wide")
    for name in GRAPHS:
        model = onnx.load(bundle.path / f"{name}.onnx", load_external_data=False)
        kinds = {w.data_type for w in model.graph.initializer if w.external_data}
        assert TensorProto.FLOAT16 in kinds
        for one in (wide, bundle):
            model = read_graph(one.file(f"{name}.onnx"))
            assert TensorProto.FLOAT16 not in {w.data_type for w in model.graph.initializer}
        given, _ = parity_inputs(bundle.file("parity.safetensors"), name)
        found = []
        for one in (bundle, wide):
            graph = Graph(one, name, Execution(threads=1))
            found.append(run_graph(graph.session, graph.path, ["features"], given)[0].tobytes())
        assert found[0] == found[1]
    runs = []
    for number, one in enumerate((bundle, wide)):
        out = tmp_path / f"run{number}"
        words = ("--data", FEW_DIGITS, "--shots", 1, "--queries", 20, "--out", out, "--quiet")
        done = ztune("tune", one.path, *words)
        assert done.code == 0, done.err
        tensors = load_file(out / "prompt.safetensors")
        runs.append({key: value.tobytes() for key, value in tensors.items()})
    assert runs[0] == runs[1]


def test_other_precisions_and_the_reference_take_it(
    half: tuple[Bundle, list[str]], tmp_path: Path
) -> None:
    bundle, _ = half
    wide = write_version_1(bundle, tmp_path / "wide")
    one, other = (
        quantize_bundle(given, tmp_path / name, "fp16")
        for name, given in (("one", bundle), ("other", wide))
    )
    for name in GRAPHS:
        assert one.files[f"{name}.onnx"].bytes == other.files[f"{name}.onnx"].bytes
        assert one.parity[name] == other.parity[name]
    assert (one.store, dict(one.rounding)) == ("fp32", {})
    check_double_reference(bundle)


def test_values_are_narrowed_only_where_that_is_exact() -> None:
    exact = np.array([0.5, -1e4, 65504, 0], np.float32)
    narrow = to_exact_half(exact)
    assert narrow is not None
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, exact)
    for value in (0.1, 7e4, 1e-9):
        assert to_exact_half(np.array([0.5, value], np.float32)) is None


def test_a_weight_beyond_fp16_is_named_and_nothing_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = 7e4
    before = [parameter.clone() for parameter in model.parameters()]
    with (
        pytest.raises(ConfigError, match=r"weight 1\.weight has values up to 7e\+04, above"),
        rounded_to_half(model),
    ):
        raise AssertionError
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": "int4"}, 'unknown `store` "int4", expected fp32, fp16'),
        ({"store": "fp16", "precision": "int8"}, "`store=fp16` requires `precision=fp32`, got"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export("ViT-B-32", tmp_path / "out", random_weights=0, **settings)
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_an_older_version_has_no_such_entries(tiny: Exported, tmp_path: Path) -> None:
    _, whole = tiny
    old = write_version_1(whole, tmp_path / "old")
    assert (old.token_table, old.weight_blocks, old.store) == (None, (), "fp32")
    assert {"image.onnx.data", "token_table.npy"} <= old.files.keys()
    np.testing.assert_array_equal(token_table(old), token_table(whole))
    assert load_bundle(old.path).model_id == whole.model_id

"""Features of a separate extractor: any ONNX file that takes the tower's images."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes.bundle import Bundle, load_bundle
from runtimes.extractor import OrtExtractor
from runtimes.ort import OrtImageEncoder
from runtimes.providers import Execution
from tests.conftest import DIGITS, MINI
from ztune.errors import ConfigError, ZtuneError
from ztune.types import U8, RandomView

SIDE = 24
Shape = list[Any]


def write(
    path: Path,
    taken: Shape,
    given: Shape,
    *,
    pool: bool = True,
    flat: bool = False,
    dtype: int = TensorProto.FLOAT,
    extra_input: bool = False,
    extra_output: bool = False,
) -> Path:
    """Write a network that computes the mean of each channel, with the declared shapes."""
    nodes = []
    x = "x"
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [x], ["wide"], to=TensorProto.FLOAT))
        x = "wide"
    if flat:
        nodes.append(helper.make_node("Flatten", [x], ["y"], axis=1))
    elif pool:
        nodes += [
            helper.make_node("GlobalAveragePool", [x], ["p"]),
            helper.make_node("Flatten", ["p"], ["y"], axis=1),
        ]
    else:
        nodes.append(helper.make_node("Identity", [x], ["y"]))
    inputs = [helper.make_tensor_value_info("x", dtype, taken)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, given)]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N"]))
        nodes.append(helper.make_node("Identity", ["more"], ["unused"]))
    if extra_output:
        nodes.append(helper.make_node("Identity", ["y"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, given))
    graph = helper.make_graph(nodes, "means", inputs, outputs)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def bundle() -> Bundle:
    return load_bundle(MINI)


@pytest.fixture
def pixels(bundle: Bundle) -> U8:
    encoder = OrtImageEncoder(bundle, Execution())
    return np.stack([encoder.read(path, None) for path in sorted((DIGITS / "two").iterdir())[:5]])


def test_it_preprocesses_images_as_the_tower_does(
    tmp_path: Path, bundle: Bundle, pixels: U8
) -> None:
    extractor = OrtExtractor(
        write(tmp_path / "e.onnx", ["N", 3, SIDE, SIDE], ["N", 3]), bundle, Execution()
    )
    assert extractor.width() == 3
    found = extractor.encode(pixels)
    assert found.dtype == np.float32
    mean, std = np.array(bundle.image.mean), np.array(bundle.image.std)
    expected = ((pixels / 255 - mean) / std).mean(axis=(1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # and not of unit length
    assert not np.allclose(np.linalg.norm(found, axis=1), 1)


def test_the_bundles_image_tower_returns_the_bundles_features(bundle: Bundle, pixels: U8) -> None:
    extractor = OrtExtractor(MINI / "image.onnx", bundle, Execution())
    tower = OrtImageEncoder(bundle, Execution())
    assert extractor.width() == bundle.embed_dim
    np.testing.assert_allclose(extractor.encode(pixels), tower.encode(pixels), atol=1e-5)
    path = next((DIGITS / "two").iterdir())
    for seed in (None, 3):
        views = [
            None if seed is None else RandomView(np.random.default_rng(seed)) for _ in range(2)
        ]
        np.testing.assert_array_equal(extractor.read(path, views[0]), tower.read(path, views[1]))


def test_all_sizes_may_be_dynamic(tmp_path: Path, bundle: Bundle, pixels: U8) -> None:
    free: list[Shape] = [["N", 3, "H", "W"], ["N", 3, SIDE, "W"], [None, 3, None, None]]
    for number, taken in enumerate(free):
        path = write(tmp_path / f"{number}.onnx", taken, [taken[0], 3])
        extractor = OrtExtractor(path, bundle, Execution())
        assert extractor.width() == 3
        assert extractor.encode(pixels).shape == (5, 3)


def test_other_weights_are_another_identity(tmp_path: Path, bundle: Bundle) -> None:
    free = write(tmp_path / "a.onnx", ["N", 3, "H", "W"], ["N", 3])
    fixed = write(tmp_path / "b.onnx", ["N", 3, SIDE, SIDE], ["N", 3])
    twin = tmp_path / "c.onnx"
    twin.write_bytes(free.read_bytes())
    of = {path: OrtExtractor(path, bundle, Execution()).identity for path in (free, fixed, twin)}
    assert of[free] == of[twin] != of[fixed]
    # The cache distinguishes the tower's features from the same file's as an extractor.
    own = OrtExtractor(MINI / "image.onnx", bundle, Execution()).identity
    assert own != OrtImageEncoder(bundle, Execution()).identity


@pytest.mark.parametrize(
    ("taken", "given", "settings"),
    [
        (["N", 3, 32, 32], ["N", 3], {}),
        (["N", 3, SIDE, 32], ["N", 3], {}),
        (["N", 1, SIDE, SIDE], ["N", 1], {}),
        (["N", SIDE, SIDE, 3], ["N", SIDE], {}),
        (["N", 3, SIDE, SIDE], ["N", 3, SIDE, SIDE], {"pool": False}),
        (["N", 3, "H", "W"], ["N", "k"], {"flat": True}),
        ([1, 3, SIDE, SIDE], [1, 3], {}),
        (["N", 3, SIDE, SIDE], ["N", 3], {"extra_input": True}),
        (["N", 3, SIDE, SIDE], ["N", 3], {"extra_output": True}),
        (["N", 3, SIDE, SIDE], ["N", 3], {"dtype": TensorProto.UINT8}),
        (["N", 3, SIDE, SIDE], ["N", 3], {"dtype": TensorProto.FLOAT16}),
    ],
    ids=[
        "larger", "not-square", "grey", "channels-last", "maps", "unknown-width",
        "one-image", "two-inputs", "two-outputs", "bytes", "half",
    ],
)  # fmt: skip
def test_another_shape_is_refused_with_what_is_expected(
    taken: Shape, given: Shape, settings: dict[str, Any], tmp_path: Path, bundle: Bundle
) -> None:
    path = write(tmp_path / "e.onnx", taken, given, **settings)
    extractor = OrtExtractor(path, bundle, Execution())
    expected = (
        r'extractor ".*e.onnx" has inputs .* expected one input f32\[N, 3, 24, 24\] for any N'
    )
    with pytest.raises(ConfigError, match=expected):
        extractor.width()
    with pytest.raises(ConfigError, match=expected):
        extractor.encode(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8))


def test_files_that_are_not_networks_are_refused(tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"none\.onnx.* does not exist"):
        OrtExtractor(tmp_path / "none.onnx", bundle, Execution())
    with pytest.raises(ConfigError, match="does not exist"):
        OrtExtractor(tmp_path, bundle, Execution())
    broken = tmp_path / "broken.onnx"
    whole = (MINI / "image.onnx").read_bytes()
    for content in (b"", b"no graph", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        with pytest.raises(ZtuneError, match=r"broken\.onnx"):
            OrtExtractor(broken, bundle, Execution()).width()


def test_weights_outside_its_folder_are_not_read(tmp_path: Path, bundle: Bundle) -> None:
    model = onnx.load(MINI / "image.onnx")
    path = tmp_path / "e.onnx"
    onnx.save(model, path, save_as_external_data=True, location="e.data", size_threshold=0)
    escaping = onnx.load(path, load_external_data=False)
    for tensor in escaping.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    path.write_bytes(escaping.SerializeToString())
    with pytest.raises(ZtuneError, match=r"e\.onnx stores tensors in .*elsewhere"):
        OrtExtractor(path, bundle, Execution())

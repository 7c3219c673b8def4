"""Compare the resize nodes with preprocessing over sizes up to 4,000."""

import functools
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from export.nodes import Nodes, pixels_to_float
from runtimes.bundle import ImageSpec
from runtimes.preprocess import crop

LENGTHS = st.one_of(st.integers(1, 40), st.integers(1, 600), st.integers(1, 4000))


@functools.cache
def graph(spec: ImageSpec) -> Any:
    g = Nodes("image")
    resized = pixels_to_float(g, spec, resize=True)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", "H", "W", 3])
    output = helper.make_tensor_value_info(resized, TensorProto.FLOAT, None)
    part = helper.make_graph(g.nodes, "part", [pixels], [output], g.constants)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(part, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("mode", ["shortest", "shortest_floor", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [16, 37, 224])
def test_the_nodes_have_the_pixels_of_preprocessing(
    mode: Any, interpolation: Any, side: int
) -> None:
    spec = ImageSpec(side, (0.5,) * 3, (0.5,) * 3, interpolation, mode, 9)

    @settings(max_examples=15, deadline=None)
    @given(LENGTHS, LENGTHS, st.integers(0, 2**32), st.booleans())
    def check(width: int, height: int, seed: int, hard: bool) -> None:
        # Thinner ones are refused when they are read.
        height = min(max(height, -(-width // 100)), width * 100, max(1, 2_000_000 // width))
        levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        if hard:  # the filter overshoots at edges
            levels = levels // 128 * np.uint8(255)
        got = graph(spec).run(None, {"pixels": levels[None]})[0][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(got, crop(Image.fromarray(levels), spec))

    check()

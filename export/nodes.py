"""Build ONNX nodes: constants, operators and image preprocessing."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import ImageSpec


class Nodes:
    """Nodes and constants in the order in which they are added."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        name = f"{self._prefix}.constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        name = output or f"{self._prefix}.{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name


def pixels_to_float(g: Nodes, spec: ImageSpec, *, resize: bool) -> str:
    """Convert pixels u8[N, H, W, 3] to f32[N, 3, S, S] in 0…255, as runtimes.preprocess does."""
    channels_first = g.node("Transpose", ["pixels"], perm=[0, 3, 1, 2])
    pixels = g.node("Cast", [channels_first], to=TensorProto.FLOAT)
    return _resize_and_crop(g, pixels, spec) if resize else pixels


def normalise(g: Nodes, pixels: str, spec: ImageSpec) -> str:
    """Convert pixels f32[N, 3, H, W] in 0…255 to the image tower's input."""
    fraction = g.node("Div", [pixels, g.constant(255.0)])
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (spec.mean, spec.std))
    centred = g.node("Sub", [fraction, g.constant(mean)])
    return g.node("Div", [centred, g.constant(std)])


def _resize_and_crop(g: Nodes, pixels: str, spec: ImageSpec) -> str:
    """Resize and crop f32[N, 3, H, W] as open_clip's transform does, rounding to 8 bits."""
    S = spec.size
    shape = g.node("Shape", [pixels])
    size = g.node("Slice", [shape, g.constant([2], np.int64), g.constant([4], np.int64)])
    target = g.constant([S, S], np.int64)
    if spec.resize_mode == "squash":
        new_size = target
    else:
        # shortest: the short side becomes S and the other int(S * long / short);
        # longest: the long side becomes S and the other round(short / (long / S)).
        reduce = "ReduceMin" if spec.resize_mode == "shortest" else "ReduceMax"
        side = g.node(reduce, [size], keepdims=1)
        if spec.resize_mode == "shortest":
            enlarged = g.node("Mul", [size, g.constant([S], np.int64)])
            new_size = g.node("Div", [enlarged, side])  # integer division
        else:
            wide = g.node("Cast", [size], to=TensorProto.DOUBLE)
            ratio = g.node(
                "Div",
                [g.node("Cast", [side], to=TensorProto.DOUBLE), g.constant([S], np.float64)],
            )
            rounded = g.node("Round", [g.node("Div", [wide, ratio])])
            new_size = g.node("Cast", [rounded], to=TensorProto.INT64)
    whole = resample(g, pixels, new_size, spec)
    if spec.resize_mode == "squash":
        return whole
    axes = g.constant([2, 3], np.int64)
    if spec.resize_mode == "longest":
        # torchvision puts the smaller half of the padding first.
        missing = g.node("Sub", [target, new_size])
        first = g.node("Div", [missing, g.constant([2], np.int64)])
        pads = g.node("Concat", [first, g.node("Sub", [missing, first])], axis=0)
        return g.node("Pad", [whole, pads, g.constant(float(spec.fill_color)), axes])
    extra = g.node("Cast", [g.node("Sub", [new_size, target])], to=TensorProto.DOUBLE)
    # Round half to even, like Python's round in torchvision's CenterCrop.
    start = g.node(
        "Cast",
        [g.node("Round", [g.node("Div", [extra, g.constant([2.0], np.float64)])])],
        to=TensorProto.INT64,
    )
    return g.node("Slice", [whole, start, g.node("Add", [start, target]), axes])


def resample(g: Nodes, pixels: str, new_size: str, spec: ImageSpec) -> str:
    """Resize f32[N, 3, H, W] to `new_size` i64[2] with Pillow's filter."""
    shape = g.node("Shape", [pixels])
    # Pillow resizes the width first and rounds to integers before the height.
    first_three = g.node("Slice", [shape, g.constant([0], np.int64), g.constant([3], np.int64)])
    batch = g.node("Slice", [shape, g.constant([0], np.int64), g.constant([2], np.int64)])
    new_width = g.node("Slice", [new_size, g.constant([1], np.int64), g.constant([2], np.int64)])
    wide = _resample_axis(g, pixels, g.node("Concat", [first_three, new_width], axis=0), spec)
    return _resample_axis(g, wide, g.node("Concat", [batch, new_size], axis=0), spec)


def _resample_axis(g: Nodes, pixels: str, sizes: str, spec: ImageSpec) -> str:
    """Resize to `sizes` with Pillow's filter and round to integers."""
    resized = g.node(
        "Resize",
        [pixels, "", "", sizes],
        mode="cubic" if spec.interpolation == "bicubic" else "linear",
        cubic_coeff_a=-0.5,
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )
    # Round half up as Pillow does; ONNX's Round rounds half to even.
    nearest = g.node("Floor", [g.node("Add", [resized, g.constant(0.5)])])
    return g.node("Clip", [nearest, g.constant(0.0), g.constant(255.0)])

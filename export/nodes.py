"""Build ONNX nodes: constants, operators and image preprocessing."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import ImageSpec

# Pillow's weights of 8-bit pixels are integers: 2^22 is 1.
_ONE = 1 << 22
# Pixels whose sources are gathered together: large blocks multiply by more zeros, small ones copy
# overlapping sources more often.
_BLOCK = 16


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

    def integers(self, *values: int) -> str:
        """Return a constant i64[n]."""
        return self.constant(values, np.int64)

    def number(self, value: float) -> str:
        """Return a constant f64[]."""
        return self.constant(value, np.float64)

    def cast(self, name: str, kind: int) -> str:
        return self.node("Cast", [name], to=kind)


def pixels_to_float(g: Nodes, spec: ImageSpec, *, resize: bool) -> str:
    """Convert `pixels` u8[N, H, W, 3] to f32[N, 3, S, S] in 0…255, as runtimes.preprocess does."""
    channels_first = g.node("Transpose", ["pixels"], perm=[0, 3, 1, 2])
    if resize:
        return _resize_and_crop(g, channels_first, spec)
    return g.cast(channels_first, TensorProto.FLOAT)


def normalise(g: Nodes, pixels: str, spec: ImageSpec) -> str:
    """Convert pixels f32[N, 3, H, W] in 0…255 to the image tower's input."""
    fraction = g.node("Div", [pixels, g.constant(255.0)])
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (spec.mean, spec.std))
    centred = g.node("Sub", [fraction, g.constant(mean)])
    return g.node("Div", [centred, g.constant(std)])


def _resize_and_crop(g: Nodes, pixels: str, spec: ImageSpec) -> str:
    """Convert u8[N, 3, H, W] to f32[N, 3, S, S] as runtimes.preprocess.crop does."""
    S = spec.size
    size = g.node("Slice", [g.node("Shape", [pixels]), g.integers(2), g.integers(4)])
    if spec.resize_mode in ("shortest", "shortest_floor"):
        short = g.node("ReduceMin", [size], keepdims=1)
        new_size = g.node("Div", [g.node("Mul", [size, g.integers(S)]), short])
        extra = g.cast(g.node("Sub", [new_size, g.integers(S)]), TensorProto.DOUBLE)
        # ONNX's Round rounds half to even, like Python's round.
        to_integer = "Floor" if spec.resize_mode == "shortest_floor" else "Round"
        rounded = g.node(to_integer, [g.node("Div", [extra, g.number(2)])])
        start = g.cast(rounded, TensorProto.INT64)
    elif spec.resize_mode == "longest":
        long = g.cast(g.node("ReduceMax", [size], keepdims=1), TensorProto.DOUBLE)
        ratio = g.node("Div", [long, g.number(S)])
        exact = g.node("Div", [g.cast(size, TensorProto.DOUBLE), ratio])
        rounded = g.cast(g.node("Round", [exact]), TensorProto.INT64)
        new_size = g.node("Max", [rounded, g.integers(1)])
        margin = g.node("Div", [g.node("Sub", [g.integers(S), new_size]), g.integers(2)])
        start = g.node("Neg", [margin])
    else:
        new_size, start = g.integers(S, S), g.integers(0, 0)
    whole = resize(g, pixels, new_size, start, S, spec)
    if spec.resize_mode != "longest":
        return whole
    for axis, column_or_row in enumerate(((S, 1), (1, S))):
        position = g.node("Add", [_at(g, start, axis), g.integers(*range(S))])
        after_start = g.node("GreaterOrEqual", [position, g.integers(0)])
        inside = g.node("And", [after_start, g.node("Less", [position, _at(g, new_size, axis)])])
        mask = g.node("Reshape", [inside, g.integers(*column_or_row)])
        whole = g.node("Where", [mask, whole, g.constant(float(spec.fill_color))])
    return whole


def resize(g: Nodes, pixels: str, new_size: str, start: str, count: int, spec: ImageSpec) -> str:
    """Resize u8[N, 3, H, W] to `new_size` i64[2] as runtimes.preprocess.resize does.

    Returns only the pixels from `start` i64[2] on: f32[N, 3, count, count]. Pixels outside of the
    image repeat its edge.
    """
    sides = g.node("Slice", [g.node("Shape", [pixels]), g.integers(2), g.integers(4)])
    planes = g.node("Concat", [g.integers(-1), sides], axis=0)
    # ONNX Runtime would merge the Transposes before and after this Reshape into a much slower one.
    pixels = g.node("Reshape", [pixels, planes])
    for axis in (1, 0):  # the width first; the axis to resize comes second
        turned = g.node("Transpose", [pixels], perm=[0, 2, 1])
        pixels = _resize_axis(
            g, turned, _at(g, new_size, axis), _at(g, start, axis), count, spec.interpolation
        )
    images = g.node("Reshape", [pixels, g.integers(-1, 3, count, count)])
    return g.cast(images, TensorProto.FLOAT)


def _at(g: Nodes, values: str, index: int) -> str:
    return g.node("Gather", [values, g.integers(index)])


def _resize_axis(
    g: Nodes, pixels: str, new_length: str, start: str, count: int, interpolation: str
) -> str:
    """Resize u8[n, L, R] to `new_length` i64[1]; return u8[n, count, R] from `start` i64[1].

    The arithmetic is Pillow's, to the bit: weights in double precision, rounded to multiples of
    2^-22, and exact sums. ONNX's Resize has weights in single precision, which round some pixels
    differently. Blocks of pixels are computed as matrix products with the sources they share.
    """
    integer, double = TensorProto.INT64, TensorProto.DOUBLE
    length = g.cast(_at(g, g.node("Shape", [pixels]), 1), double)
    scale = g.node("Div", [length, g.cast(new_length, double)])
    stretch = g.node("Max", [scale, g.number(1)])
    radius = g.node("Mul", [stretch, g.number(2 if interpolation == "bicubic" else 1)])
    # Positions and centres f64[blocks, block, 1]; sources from `low` up to `high` have weights.
    n_blocks = -(-count // _BLOCK)
    grid = g.constant(np.arange(n_blocks * _BLOCK).reshape(n_blocks, _BLOCK, 1), np.int64)
    position = g.node("Max", [g.node("Add", [grid, start]), g.integers(0)])
    position = g.node("Min", [position, g.node("Sub", [new_length, g.integers(1)])])
    middle = g.node("Add", [g.cast(position, double), g.number(0.5)])
    centre = g.node("Mul", [middle, scale])
    half = g.number(0.5)
    left = g.node("Add", [g.node("Sub", [centre, radius]), half])
    right = g.node("Add", [g.node("Add", [centre, radius]), half])
    low = g.node("Max", [g.node("Floor", [left]), g.number(0)])
    high = g.node("Min", [g.node("Floor", [right]), length])
    first = g.node("Gather", [low, g.integers(0)], axis=1)
    width = g.node("ReduceMax", [g.node("Sub", [high, first])], keepdims=0)
    # Sources f64[blocks, 1, width] of each block.
    source = g.node("Add", [first, g.node("Range", [g.number(0), width, g.number(1)])])
    distance = g.node("Add", [g.node("Sub", [source, centre]), half])
    inverse = g.node("Div", [g.number(1), stretch])
    weight = _filter(g, g.node("Abs", [g.node("Mul", [distance, inverse])]), interpolation)
    outside = g.node(
        "Or", [g.node("Less", [source, low]), g.node("GreaterOrEqual", [source, high])]
    )
    weight = g.node("Where", [outside, g.number(0), weight])
    total = g.node("ReduceSum", [weight, g.integers(2)], keepdims=1)
    fixed = g.node("Mul", [g.node("Div", [weight, total]), g.number(_ONE)])
    nearest = g.node("Floor", [g.node("Add", [g.node("Abs", [fixed]), half])])
    fixed = g.node("Mul", [g.node("Sign", [fixed]), nearest])  # halves are rounded away from zero
    within = g.node("Min", [source, g.node("Sub", [length, g.number(1)])])
    index = g.cast(g.node("Squeeze", [within, g.integers(1)]), integer)
    gathered = g.node("Gather", [pixels, index], axis=1)
    levels = g.node("Floor", [g.node("Add", [_exact_product(g, fixed, gathered), half])])
    levels = g.cast(g.node("Clip", [levels, g.number(0), g.number(255)]), TensorProto.UINT8)
    merged = g.node("Reshape", [levels, g.integers(0, n_blocks * _BLOCK, -1)])
    return g.node("Slice", [merged, g.integers(0), g.integers(count), g.integers(1)])


def _filter(g: Nodes, x: str, interpolation: str) -> str:
    """Return the filter's values f64 at distances x ≥ 0."""

    def polynomial(*coefficients: float) -> str:
        """Evaluate by Horner's rule, highest power first."""
        value = g.number(coefficients[0])
        for coefficient in coefficients[1:]:
            value = g.node("Mul", [value, x])
            value = g.node("Add", [value, g.number(coefficient)]) if coefficient else value
        return value

    if interpolation == "bilinear":
        return g.node("Max", [polynomial(-1, 1), g.number(0)])
    near = polynomial(1.5, -2.5, 0, 1)
    far = g.node("Mul", [polynomial(1, -5, 8, -4), g.number(-0.5)])
    tail = g.node("Where", [g.node("Less", [x, g.number(2)]), far, g.number(0)])
    return g.node("Where", [g.node("Less", [x, g.number(1)]), near, tail])


def _exact_product(g: Nodes, weights: str, pixels: str) -> str:
    """Return f64[..., m, n], the exact product of f64[..., m, k] / 2^22 with u8[..., k, n].

    Weights are integers from -2^23 to 2^23: three digits of 8 bits with a zero point of 128.
    """
    rest, digits = g.node("Add", [weights, g.number(0x808080)]), []
    for unit in (1 << 16, 1 << 8, 1):
        digits.append(g.node("Floor", [g.node("Div", [rest, g.number(unit)])]))
        rest = g.node("Sub", [rest, g.node("Mul", [digits[-1], g.number(unit)])])
    stored = g.cast(g.node("Concat", digits, axis=1), TensorProto.UINT8)
    products = g.node("MatMulInteger", [stored, pixels, g.constant(128, np.uint8)])
    units = np.array([1 << 16, 1 << 8, 1]) / _ONE
    combine = g.constant(np.kron(units, np.eye(_BLOCK)), np.float64)
    return g.node("MatMul", [combine, g.cast(products, TensorProto.DOUBLE)])

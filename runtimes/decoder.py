"""BlackVIP's decoder: from an image's feature to a perturbation of the image.

Source: Oh et al., "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", CVPR 2023.
The feature and a tuned trigger form a latent f32[32, g, g]. Each of four blocks doubles its sides:
a depth-wise transposed convolution (kernel 2, stride 2), a 1x1 convolution (a transposed one in the
published code, which starts it otherwise), batch normalisation and GELU; a last transposed
convolution makes the image. For small images, which the paper does not use,
the first of them have kernel and stride 1. All weights are one vector, in the order of
`weight_shapes`, and an input of the graph: all candidates share a session.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from runtimes.providers import Execution, open_session, run_graph
from ztune.errors import ConfigError
from ztune.types import F32, F64

# Channels into a block, outputs of its depth-wise convolution per channel, channels out of it.
_BLOCKS = ((32, 2, 64), (64, 1, 32), (32, 1, 32), (32, 1, 16))
_COLOURS = 3
_STAGES = len(_BLOCKS) + 1
_EPSILON = 1e-5
N_STATISTICS = sum(n_out for _, _, n_out in _BLOCKS)
# Pixels per call: 32 images of 224 px, which took 160 MB on a CPU.
_PIXELS = 32 * 224 * 224
_BY_BATCH = "batch"
_NONE = np.zeros((2, N_STATISTICS), dtype=np.float32)


def layout(extractor_dim: int, size: int) -> tuple[int, tuple[int, ...]]:
    """Return g and the kernel of each of the five stages: 7 and all 2 in the paper.

    g leaves room for a trigger, and g times the kernels is at least `size`.
    """
    g = math.isqrt(extractor_dim // _BLOCKS[0][0]) + 1
    doublings = 0
    while g << doublings < size and doublings < _STAGES:
        doublings += 1
    kernels = (1,) * (_STAGES - doublings) + (2,) * doublings
    return max(g, -(-size // 2**doublings)), kernels


def output_side(extractor_dim: int, size: int) -> int:
    """Return the side of the decoder's image before its centre crop."""
    g, kernels = layout(extractor_dim, size)
    return g * math.prod(kernels)


def weight_shapes(extractor_dim: int, size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and torch shapes of the weights, in the vector's order."""
    g, kernels = layout(extractor_dim, size)
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("trigger", (_BLOCKS[0][0] * g * g - extractor_dim,))
    ]
    for number, ((n_in, spread, n_out), kernel) in enumerate(zip(_BLOCKS, kernels, strict=False)):
        shapes += [
            (f"spread_{number}", (n_in, spread, kernel, kernel)),
            (f"spread_bias_{number}", (n_in * spread,)),
            (f"mix_{number}", (n_out, n_in * spread, 1, 1)),
            (f"gain_{number}", (n_out,)),
            (f"shift_{number}", (n_out,)),
        ]
    return [*shapes, ("image", (_BLOCKS[-1][2], _COLOURS, kernels[-1], kernels[-1]))]


def n_values(extractor_dim: int, size: int) -> int:
    """Return the number of weights: 9,920 for features of 768 values and images of 224 px."""
    return sum(math.prod(shape) for _, shape in weight_shapes(extractor_dim, size))


def initial_values(extractor_dim: int, size: int, rng: np.random.Generator) -> F64:
    """Draw values f64[n] from torch's default initialisation; the trigger from U(0, 0.1).

    Torch draws weights and biases from U(±1/sqrt(fan-in)), and takes for the fan-in of a transposed
    convolution, as all of these are, the outputs of a group times the kernel's area.
    """
    drawn: list[F64] = []
    bound = 0.0
    for name, shape in weight_shapes(extractor_dim, size):
        if name == "trigger":
            drawn.append(rng.uniform(0, 0.1, shape))
        elif name.startswith(("gain", "shift")):
            drawn.append(np.full(shape, float(name.startswith("gain"))))
        else:
            if len(shape) == 4:  # a bias follows its weight and has the same bound
                # `mix` is stored with its outputs first, as an ordinary convolution.
                fan_in = shape[0] if name.startswith("mix") else math.prod(shape[1:])
                bound = 1 / math.sqrt(fan_in)
            drawn.append(rng.uniform(-bound, bound, shape))
    return np.concatenate([values.ravel() for values in drawn])


class Decoder:
    """The decoder: values f32[n] and features f32[N, k] to perturbations of N images."""

    def __init__(self, extractor_dim: int, size: int, execution: Execution):
        """Take features of k = `extractor_dim` and images of side S = `size`."""
        # Not worth a TensorRT engine, as it is small compared with the image tower.
        provider = "cuda" if execution.provider == "tensorrt" else execution.provider
        self._execution = replace(execution, provider=provider)
        self._sizes = extractor_dim, size
        self._n_values = n_values(extractor_dim, size)
        self._chunk = max(1, _PIXELS // output_side(extractor_dim, size) ** 2)
        self._sessions: dict[int | str | None, Any] = {}

    def __call__(self, values: F32, features: F32, statistics: F32) -> F32:
        """Return the perturbations f32[N, 3, S, S], normalised by statistics f32[2, 144].

        Raises: ConfigError when values, features or statistics have another size.
        """
        return np.concatenate(
            [self._run(values, part, statistics) for part in self._calls(features)]
        )

    def fits_one_call(self, n_images: int) -> bool:
        """Return whether `n_images` fit one call."""
        return n_images <= self._chunk

    def decode_batch(self, values: F32, features: F32) -> F32:
        """Return the perturbations f32[N, 3, S, S], normalised by the statistics of this batch.

        This takes one call, whereas `statistics` takes four.
        Raises: ConfigError when values or features have another size.
        """
        return self._run(values, features, _NONE, _BY_BATCH)

    def statistics(self, values: F32, features: F32) -> F32:
        """Return the normalisation means and variances f32[2, 144] over all N images.

        They equal those of one call with all images. To bound memory, images are processed in
        chunks, once for each normalisation with the previous ones fixed.

        Raises: ConfigError when values or features have another size.
        """
        result = np.zeros((2, N_STATISTICS), dtype=np.float32)
        calls = self._calls(features)
        shares = np.array([len(part) for part in calls]) / len(features)
        stop = 0
        for number, (_, _, n_out) in enumerate(_BLOCKS):
            begin, stop = stop, stop + n_out
            measured = np.stack([self._run(values, part, result, number) for part in calls]).astype(
                np.float64
            )
            mean = np.tensordot(shares, measured[:, 0], 1)
            variances = measured[:, 1] + (measured[:, 0] - mean) ** 2
            result[:, begin:stop] = mean, np.tensordot(shares, variances, 1)
        return result

    def _calls(self, features: F32) -> list[F32]:
        return [features[at : at + self._chunk] for at in range(0, len(features), self._chunk)]

    def _run(
        self, values: F32, features: F32, statistics: F32, measured: int | str | None = None
    ) -> F32:
        shapes = {
            "values": (self._n_values,),
            "features": (len(features), self._sizes[0]),
            "statistics": (2, N_STATISTICS),
        }
        given = {"values": values, "features": features, "statistics": statistics}
        for name, shape in shapes.items():
            if given[name].shape != shape:
                raise ConfigError(
                    f"decoder `{name}` is f32{list(given[name].shape)}, expected f32{list(shape)} "
                    f"for features of {self._sizes[0]} values and images of {self._sizes[1]} px"
                )
        if measured not in self._sessions:
            graph = decoder_graph(*self._sizes, measured)
            self._sessions[measured] = open_session(graph, self._execution)
        session = self._sessions[measured]
        feeds = {
            value.name: np.ascontiguousarray(given[value.name], dtype=np.float32)
            for value in session.get_inputs()
        }
        return run_graph(session, "the decoder's graph", None, feeds)[0]


def decoder_graph(extractor_dim: int, size: int, measured: int | str | None = None) -> bytes:
    """Return a graph with k = `extractor_dim` and S = `size`.

    Inputs: `features` f32[N, k], `values` f32[n], and `statistics` f32[2, 144], the means and
    variances to normalise by. Output: `perturbation` f32[N, 3, S, S]. If `measured` is a block's
    number, the output is its batch mean and variance `own` f32[2, channels], and the graph ends
    there. With `measured` 0 or "batch" there is no input `statistics`; "batch" normalises by the
    batch's own.

    A block's two convolutions are one matrix product from a position to the four (or one) that it
    becomes, since nothing is between them and their windows do not overlap.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: Any, dtype: type = np.int64) -> str:
        name = f"constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def node(operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def reshape(value: str, *shape: int) -> str:
        return node("Reshape", value, constant(shape))

    def split(value: str, sizes: list[int], names: list[str], axis: int) -> None:
        nodes.append(helper.make_node("Split", [value, constant(sizes)], names, axis=axis))

    def mean(value: str) -> str:
        # In two steps, since one fp32 sum of a million numbers loses precision.
        rows = node("ReduceMean", value, constant([2]), keepdims=0)
        return node("ReduceMean", rows, constant([0, 1]), keepdims=0)

    def enlarge(value: str, matrix: str, kernel: int, n_out: int, perm: list[int]) -> str:
        """Return kernel² positions for each of f32[N, width, width, C], by f32[C, kernel² n]."""
        product = node("MatMul", value, matrix)
        places = reshape(product, -1, width, width, kernel, kernel, n_out)
        return node("Transpose", places, perm=perm)

    weights = weight_shapes(extractor_dim, size)
    split("values", [math.prod(shape) for _, shape in weights], [name for name, _ in weights], 0)
    given = [f"given_{number}" for number in range(len(_BLOCKS))]
    given_statistics = measured not in (0, _BY_BATCH)
    if given_statistics:
        split("statistics", [n_out for _, _, n_out in _BLOCKS], given, 1)
    width, kernels = layout(extractor_dim, size)
    n_images = node("Shape", "features", start=0, end=1)
    shape = node("Concat", n_images, constant(weights[0][1]), axis=0)
    latent = node("Concat", "features", node("Expand", "trigger", shape), axis=1)
    channels_first = reshape(latent, -1, _BLOCKS[0][0], width, width)
    state = node("Transpose", channels_first, perm=[0, 2, 3, 1])
    for number, ((n_in, spread, n_out), kernel) in enumerate(zip(_BLOCKS, kernels, strict=False)):
        by_input = node("Transpose", reshape(f"mix_{number}", n_out, -1), perm=[1, 0])
        products = node(
            "Mul",
            reshape(f"spread_{number}", n_in, spread, kernel**2, 1),
            reshape(by_input, n_in, spread, 1, n_out),
        )
        matrix = reshape(node("ReduceSum", products, constant([1]), keepdims=0), n_in, -1)
        bias = node("MatMul", reshape(f"spread_bias_{number}", 1, -1), by_input)
        state = enlarge(state, matrix, kernel, n_out, [0, 1, 3, 2, 4, 5])
        width *= kernel
        state = node("Add", reshape(state, -1, width, width, n_out), bias)
        if given_statistics and number != measured:
            means, variances = (node("Gather", given[number], constant(row)) for row in range(2))
            centred = node("Sub", state, means)
        else:
            means = mean(state)
            centred = node("Sub", state, means)
            variances = mean(node("Mul", centred, centred))
        if number == measured:
            rows = reshape(means, 1, -1), reshape(variances, 1, -1)
            node("Concat", *rows, output="own", axis=0)
            break
        spread_out = node("Sqrt", node("Add", variances, constant(_EPSILON, np.float32)))
        scaled = node("Mul", centred, node("Div", f"gain_{number}", spread_out))
        state = node("Gelu", node("Add", scaled, f"shift_{number}"))
    else:
        kernel = kernels[-1]
        by_place = node("Transpose", reshape("image", -1, _COLOURS, kernel**2), perm=[0, 2, 1])
        matrix = reshape(by_place, -1, kernel**2 * _COLOURS)
        image = enlarge(state, matrix, kernel, _COLOURS, [0, 5, 1, 3, 2, 4])
        width *= kernel
        image = reshape(image, -1, _COLOURS, width, width)
        first = (width - size) // 2
        crop = [constant(value) for value in ([first] * 2, [first + size] * 2, [2, 3])]
        node("Slice", image, *crop, output="perturbation")

    def tensor(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    inputs = [
        tensor("features", "N", extractor_dim),
        tensor("values", n_values(extractor_dim, size)),
    ]
    if given_statistics:
        inputs.append(tensor("statistics", 2, N_STATISTICS))
    output = tensor("perturbation", "N", _COLOURS, size, size)
    if isinstance(measured, int):
        output = tensor("own", 2, _BLOCKS[measured][2])
    graph = helper.make_graph(nodes, "decoder", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())

"""Pack a bundle's image tower and an artifact into one `classifier.onnx`: picture in, logits out.

Needs the `onnx` package and no torch, so that a device can pack what it has tuned.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtimes.bundle import Bundle, ImageSpec, describe
from runtimes.classifier import FORMAT, VERSION
from ztune.artifact import Artifact
from ztune.errors import DataError, FormatError
from ztune.files import replacing
from ztune.logits import FeatureClassifier
from ztune.types import Json

# Bytes above which the weights go beside the one file to ship: a protobuf file ends at 2 GiB.
_LARGEST_FILE = 1_800_000_000


class _Graph:
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


def pack(
    bundle: Bundle,
    artifact: Artifact,
    out: Path,
    *,
    resize: bool = False,
    external_threshold: int = _LARGEST_FILE,
) -> None:
    """Write `out`: input `pixels u8[N, S, S, 3]`, outputs `logits` and `probabilities` f32[N, C].

    With `resize` the input is u8[N, H, W, 3] of any size, resized and cropped inside the graph as
    the bundle's preprocessing says. Class names and provenance stand in the metadata.
    Raises: FormatError when the artifact's embedding size is not the bundle's; DataError when `out`
    cannot be written.
    """
    classifier = artifact.classifier()
    n_classes, embed_dim = classifier.weight.shape
    if embed_dim != bundle.embed_dim:
        raise FormatError(
            f"the artifact is for features of {embed_dim} values, the bundle's image tower "
            f"gives {bundle.embed_dim} (pack with the bundle it was tuned on)"
        )
    model = onnx.load(str(bundle.file("image.onnx")))
    graph = model.graph
    _prefix_names(graph, "image.")
    S = bundle.image.size
    shape = ["N", "H", "W", 3] if resize else ["N", S, S, 3]
    before = _preprocessing(bundle.image, resize, graph.input[0].name)
    after = _classification(classifier, graph.output[0].name)
    body = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*before.nodes, *body, *after.nodes])
    graph.initializer.extend([*before.constants, *after.constants])
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape))
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n_classes])
        for name in ("logits", "probabilities")
    )
    graph.name = "ztune-classifier"
    del model.metadata_props[:]
    helper.set_model_props(model, _metadata(bundle, artifact, resize))
    _save(model, out, external_threshold)


def _prefix_names(graph: Any, prefix: str) -> None:
    """Rename every value of the image tower so that none can meet a name of ours."""

    def renamed(name: str) -> str:
        return prefix + name if name else name

    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for value in [*graph.initializer, *graph.input, *graph.output, *graph.value_info]:
        value.name = renamed(value.name)


def _preprocessing(spec: ImageSpec, resize: bool, output: str) -> _Graph:
    """Pixels u8[N, H, W, 3] to the image tower's input: the operations of runtimes.preprocess."""
    g = _Graph("preprocess")
    channels_first = g.node("Transpose", ["pixels"], perm=[0, 3, 1, 2])
    grey = g.node("Cast", [channels_first], to=TensorProto.FLOAT)
    if resize:
        grey = _resized(g, grey, spec)
    fraction = g.node("Div", [grey, g.constant(255.0)])
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (spec.mean, spec.std))
    centred = g.node("Sub", [fraction, g.constant(mean)])
    g.node("Div", [centred, g.constant(std)], output)
    return g


def _resized(g: _Graph, grey: str, spec: ImageSpec) -> str:
    """Resize f32[N, 3, H, W] to the model's square as open_clip's transform would, 8-bit steps."""
    S = spec.size
    shape = g.node("Shape", [grey])
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
            scaled = g.node("Mul", [size, g.constant([S], np.int64)])
            new_size = g.node("Div", [scaled, side])  # whole numbers: rounds down
        else:
            wide = g.node("Cast", [size], to=TensorProto.DOUBLE)
            ratio = g.node(
                "Div",
                [g.node("Cast", [side], to=TensorProto.DOUBLE), g.constant([S], np.float64)],
            )
            rounded = g.node("Round", [g.node("Div", [wide, ratio])])
            new_size = g.node("Cast", [rounded], to=TensorProto.INT64)
    # Pillow resizes along the width first and rounds to whole grey levels before the height.
    first_three = g.node("Slice", [shape, g.constant([0], np.int64), g.constant([3], np.int64)])
    batch = g.node("Slice", [shape, g.constant([0], np.int64), g.constant([2], np.int64)])
    new_width = g.node("Slice", [new_size, g.constant([1], np.int64), g.constant([2], np.int64)])
    wide_sizes = g.node("Concat", [first_three, new_width], axis=0)
    whole = _scaled(g, grey, wide_sizes, spec)
    whole = _scaled(g, whole, g.node("Concat", [batch, new_size], axis=0), spec)
    if spec.resize_mode == "squash":
        return whole
    axes = g.constant([2, 3], np.int64)
    if spec.resize_mode == "longest":
        # As torchvision pads: the smaller half before.
        missing = g.node("Sub", [target, new_size])
        first = g.node("Div", [missing, g.constant([2], np.int64)])
        pads = g.node("Concat", [first, g.node("Sub", [missing, first])], axis=0)
        return g.node("Pad", [whole, pads, g.constant(float(spec.fill_color)), axes])
    extra = g.node("Cast", [g.node("Sub", [new_size, target])], to=TensorProto.DOUBLE)
    # Round half to even, as Python's round does inside torchvision's CenterCrop.
    start = g.node(
        "Cast",
        [g.node("Round", [g.node("Div", [extra, g.constant([2.0], np.float64)])])],
        to=TensorProto.INT64,
    )
    return g.node("Slice", [whole, start, g.node("Add", [start, target]), axes])


def _scaled(g: _Graph, grey: str, sizes: str, spec: ImageSpec) -> str:
    """Resize to `sizes` with Pillow's filter and round to whole grey levels."""
    resized = g.node(
        "Resize",
        [grey, "", "", sizes],
        mode="cubic" if spec.interpolation == "bicubic" else "linear",
        cubic_coeff_a=-0.5,
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )
    # Halves go up, as in Pillow; ONNX's Round would send them to the even neighbour.
    nearest = g.node("Floor", [g.node("Add", [resized, g.constant(0.5)])])
    return g.node("Clip", [nearest, g.constant(0.0), g.constant(255.0)])


def _classification(classifier: FeatureClassifier, features: str) -> _Graph:
    """Unit features to logits and probabilities: FeatureClassifier.logits as nodes."""
    g = _Graph("classify")
    logits = g.node("MatMul", [features, g.constant(classifier.weight.T)])
    kernel = classifier.kernel
    if kernel is not None:
        cosines = g.node("MatMul", [features, g.constant(kernel.keys.T)])
        distances = g.node("Sub", [g.constant(1.0), cosines])
        exponents = g.node("Mul", [distances, g.constant(-kernel.sharpness)])
        votes = g.node("MatMul", [g.node("Exp", [exponents]), g.constant(kernel.values)])
        logits = g.node("Add", [logits, votes])
    logits = g.node("Add", [logits, g.constant(classifier.bias)], "logits")
    g.node("Softmax", [logits], "probabilities", axis=1)
    return g


def _metadata(bundle: Bundle, artifact: Artifact, resize: bool) -> dict[str, str]:
    p = artifact.provenance
    image = bundle.manifest["image"]
    document: dict[str, Json] = {
        "format": FORMAT,
        "version": VERSION,
        "classes": list(artifact.classes),
        "image": image,
        "resize": resize,
        "model_id": p.model_id,
        "bundle_digest": bundle.digest,
        "precision": bundle.precision,
        "source": dict(bundle.source),
        "method": p.method,
        "config": dict(p.config),
        "seed": p.seed,
        "queries": p.queries,
        "tuning_pictures": [f"{int(value):016x}" for value in artifact.tuning_pictures],
    }
    return {
        "ztune": describe(document),
        "class_names": json.dumps(list(artifact.classes), ensure_ascii=False),
    }


def _n_bytes(graph: Any) -> int:
    """Return the size of constants and nodes; the model's own ByteSize fails beyond 2 GB."""
    constants = sum(len(constant.raw_data) for constant in graph.initializer)
    return constants + sum(node.ByteSize() for node in graph.node)


def _save(model: Any, out: Path, external_threshold: int) -> None:
    weights = Path(f"{out}.data")
    try:
        if _n_bytes(model.graph) < external_threshold:
            with replacing(out) as temporary:
                onnx.save(model, str(temporary))
            return
        # Under their final names, since the graph names its weights; then renamed together.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            onnx.save(
                model,
                str(Path(folder, out.name)),
                save_as_external_data=True,
                location=weights.name,
                size_threshold=1024,
            )
            for path in (weights, out):
                written = Path(folder, path.name)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
                written.replace(path)
    except OSError as error:
        raise DataError(f'"{out}" cannot be written: {error.strerror or error}') from None

"""Pack a bundle's image tower and an artifact into one `classifier.onnx`: image in, logits out.

Needs `onnx` but not torch, so that it also runs on devices.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from export.nodes import Nodes, normalise, pixels_to_float
from export.visual_prompt import Subgraph, add_visual_prompt, uses_tokens
from export.weights import read_graph
from runtimes.bundle import IMAGE_PROMPTED, Bundle, compact_json
from runtimes.classifier import DATA_SHA256, FORMAT, INLIER_SCORE, VERSION, ClassifierMetadata, seal
from ztune.artifact import Artifact, VisualArtifact, inliers_of
from ztune.errors import DataError, FormatError
from ztune.io.files import replacing, sha256
from ztune.io.schema import plain
from ztune.logits import LEAST_LENGTH, FeatureClassifier, InlierTest, Whitening

# Bytes above which weights go into a second file, since protobuf files are limited to 2 GiB.
_LARGEST_FILE = 1_800_000_000


def pack(
    bundle: Bundle,
    artifact: Artifact,
    out: Path,
    *,
    resize: bool = False,
    extractor: Path | None = None,
    external_threshold: int = _LARGEST_FILE,
) -> None:
    """Write `out`: input `pixels u8[N, S, S, 3]`, outputs `logits` and `probabilities` f32[N, C].

    Probabilities are the softmax of the logits divided by the artifact's temperature, if any.

    With `resize` the input is u8[N, H, W, 3] of any size, and the graph resizes and crops it by the
    bundle's preprocessing. An artifact that tells images of none of the classes gets a third
    output, `inlier_score` f32[N], which is below 0 for those. A visual prompt becomes part of the
    graph; `extractor` is the ONNX file whose features a decoder was tuned with, unless that was the
    bundle's image tower. Class names and provenance are stored as metadata, and the file ends with
    a digest of all that precedes it.

    Raises: FormatError when artifact, bundle and extractor do not match; DataError when `out`
        cannot be written.
    """
    classifier = artifact.classifier()
    n_classes, embed_dim = classifier.weight.shape
    if embed_dim != bundle.embed_dim:
        raise FormatError(
            f"the artifact needs features of {embed_dim} values, but the bundle's image tower "
            f"returns {bundle.embed_dim} (pack with the bundle it was tuned on)"
        )
    visual = artifact if isinstance(artifact, VisualArtifact) else None
    name = IMAGE_PROMPTED if uses_tokens(visual) else "image.onnx"
    model = read_graph(bundle.file(name))
    graph = model.graph
    _check_tower(graph, bundle, name)
    S = bundle.image.size
    shape = ["N", "H", "W", 3] if resize else ["N", S, S, 3]
    g = Nodes("image")
    tower = Subgraph(graph, "image.")
    pixels = pixels_to_float(g, bundle.image, resize=resize)
    if visual is None:
        features = tower.insert(g, "image.", [normalise(g, pixels, bundle.image)])
    else:
        features = add_visual_prompt(g, model, tower, pixels, bundle, visual, extractor)
    test = inliers_of(artifact)
    after = _classifier_nodes(classifier, features, test)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend([*g.nodes, *after.nodes])
    graph.initializer.extend([*g.constants, *after.constants])
    graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape))
    graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n_classes])
        for name in ("logits", "probabilities")
    )
    if test is not None:
        score = helper.make_tensor_value_info(INLIER_SCORE, TensorProto.FLOAT, ["N"])
        graph.output.append(score)
    graph.name = "ztune-classifier"
    del model.metadata_props[:]
    helper.set_model_props(model, _metadata(bundle, artifact, resize))
    _save(model, out, external_threshold)


def _check_tower(graph: Any, bundle: Bundle, name: str) -> None:
    """Check the inputs and outputs of an image graph.

    Raises: FormatError.
    """
    stored = {weight.name for weight in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in stored]
    outputs = [value.name for value in graph.output]
    expected = ["pixels", "tokens"] if name == IMAGE_PROMPTED else ["pixels"]
    if inputs != expected or outputs != ["features"]:
        raise FormatError(
            f'bundle "{bundle.path}": {name} has inputs {inputs} and outputs {outputs}, expected '
            f"{expected} and ['features'] (export again)"
        )


def _classifier_nodes(
    classifier: FeatureClassifier, features: str, test: InlierTest | None = None
) -> Nodes:
    """Return FeatureClassifier.logits as nodes: unit features to logits and probabilities.

    With a test its scores are the output `inlier_score`.
    """
    g = Nodes("classify")
    logits = g.node("MatMul", [features, g.constant(classifier.weight.T)])
    kernel = classifier.kernel
    if kernel is not None:
        whitened = features
        if kernel.whitening is not None:
            whitened = _whitening_nodes(g, kernel.whitening, features)
        cosines = g.node("MatMul", [whitened, g.constant(kernel.keys.T)])
        distances = g.node("Sub", [g.constant(1.0), cosines])
        exponents = g.node("Mul", [distances, g.constant(-kernel.sharpness)])
        votes = g.node("MatMul", [g.node("Exp", [exponents]), g.constant(kernel.values)])
        logits = g.node("Add", [logits, votes])
    logits = g.node("Add", [logits, g.constant(classifier.bias)], "logits")
    scaled = logits
    if classifier.temperature != 1:
        scaled = g.node("Div", [logits, g.constant(classifier.temperature)])
    g.node("Softmax", [scaled], "probabilities", axis=1)
    if test is not None:
        cosines = g.node("MatMul", [features, g.constant(test.prototypes.T)])
        nearest = g.node("ReduceMax", [cosines, g.integers(1)], keepdims=0)
        g.node("Sub", [nearest, g.constant(test.threshold)], INLIER_SCORE)
    return g


def _whitening_nodes(g: Nodes, whitening: Whitening, features: str) -> str:
    """Return the name of Whitening's result as nodes."""
    moved = g.node("Sub", [features, g.constant(whitening.centre)])
    moved = g.node("MatMul", [moved, g.constant(whitening.matrix)])
    lengths = g.node("ReduceL2", [moved, g.integers(1)], keepdims=1)
    lengths = g.node("Max", [lengths, g.constant(LEAST_LENGTH)])
    return str(g.node("Div", [moved, lengths]))


def _metadata(bundle: Bundle, artifact: Artifact, resize: bool) -> dict[str, str]:
    p, test = artifact.provenance, inliers_of(artifact)
    metadata = ClassifierMetadata(
        classes=artifact.classes,
        image=bundle.image,
        resize=resize,
        model_id=p.model_id,
        bundle_digest=bundle.digest,
        precision=bundle.precision,
        source=bundle.source,
        method=p.method,
        config=p.config,
        seed=p.seed,
        queries=p.queries,
        temperature=artifact.temperature,
        reject=None if test is None else test.share,
        tuning_images=tuple(f"{int(value):016x}" for value in artifact.tuning_images),
    )
    return {
        "ztune": compact_json({"format": FORMAT, "version": VERSION, **plain(metadata)}),
        "class_names": json.dumps(list(artifact.classes), ensure_ascii=False),
    }


def _graph_bytes(graph: Any) -> int:
    """Return the size of constants and nodes; ModelProto.ByteSize fails above 2 GB."""
    constants = sum(len(constant.raw_data) for constant in graph.initializer)
    return constants + sum(node.ByteSize() for node in graph.node)


def _save(model: Any, out: Path, external_threshold: int) -> None:
    weights = Path(f"{out}.data")
    try:
        if _graph_bytes(model.graph) < external_threshold:
            with replacing(out) as temporary:
                onnx.save(model, str(temporary))
                seal(temporary)
            return
        # Written under its final name, since the graph refers to the weights file by name.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            onnx.save(
                model,
                str(Path(folder, out.name)),
                save_as_external_data=True,
                location=weights.name,
                size_threshold=1024,
            )
            digest = StringStringEntryProto(
                key=DATA_SHA256, value=sha256(Path(folder, weights.name))
            )
            with Path(folder, out.name).open("ab") as file:
                file.write(ModelProto(metadata_props=[digest]).SerializeToString())
            seal(Path(folder, out.name))
            for path in (weights, out):
                written = Path(folder, path.name)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
                written.replace(path)
    except OSError as error:
        raise DataError(f'"{out}" cannot be written: {error.strerror or error}') from None

"""Build visual prompts as ONNX nodes: what runtimes/visual.py computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, version_converter

from export.nodes import Nodes, normalise, resize
from runtimes.bundle import Bundle
from runtimes.decoder import N_STATISTICS, decoder_graph, n_values
from runtimes.graph_check import check_graph
from runtimes.visual import inner_side, limits, normalised_border
from ztune.artifact import VisualArtifact
from ztune.errors import FormatError
from ztune.io.files import sha256
from ztune.printing import reason_of


class Subgraph:
    """A graph to insert into another one, any number of times with the same weights."""

    def __init__(self, graph: Any, prefix: str) -> None:
        """Prefix the names of the graph's weights to avoid collisions."""
        self._nodes = list(graph.node)
        self._weights = {w.name: prefix + w.name for w in graph.initializer}
        self._inputs = [v.name for v in graph.input if v.name not in self._weights]
        self._output = graph.output[0].name
        for weight in graph.initializer:
            weight.name = self._weights[weight.name]

    def insert(self, g: Nodes, prefix: str, inputs: Sequence[str]) -> str:
        """Add the nodes to `g`, fed with its values `inputs`, and return the output's name."""
        own = dict(zip(self._inputs, inputs, strict=True)) | self._weights | {"": ""}
        for node in self._nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name if node.name else ""
            copy.input[:] = [own.get(name, prefix + name) for name in node.input]
            copy.output[:] = [prefix + name if name else "" for name in node.output]
            g.nodes.append(copy)
        return own.get(self._output, prefix + self._output)


def uses_tokens(artifact: VisualArtifact | None) -> bool:
    """Return whether a prompt needs the image graph that takes tokens."""
    return artifact is not None and artifact.program == "tokens"


def add_visual_prompt(
    g: Nodes,
    model: Any,
    tower: Subgraph,
    pixels: str,
    bundle: Bundle,
    artifact: VisualArtifact,
    extractor: Path | None,
) -> str:
    """Add the nodes from pixels f32[N, 3, S, S] in 0…255 to features f32[N, e].

    `tower` is the image graph of `model`; `model` also gets the weights of other graphs.

    Raises: FormatError when artifact, bundle and extractor do not match.
    """
    if extractor is not None and not artifact.extractor:
        raise FormatError(
            f'"{extractor}" was given, but the artifact was tuned without an extractor (omit it)'
        )
    if artifact.program == "tokens":
        width = None if bundle.visual is None else bundle.visual.width
        if artifact.visual.shape[1] != width:
            raise _shape_error(artifact, f"[n, {width}]")
        tokens = g.constant(artifact.visual[None])
        one = tower.insert(g, "image.", [normalise(g, pixels, bundle.image), tokens])
        return g.node("Squeeze", [one, g.constant([0], np.int64)])
    if artifact.program == "border":
        changed = _add_border(g, pixels, bundle, artifact)
    else:
        changed = _add_decoder(g, model, tower, pixels, bundle, artifact, extractor)
    return tower.insert(g, "image.", [changed])


def _shape_error(artifact: VisualArtifact, expected: str) -> FormatError:
    return FormatError(
        f"the {artifact.program} prompt is f32{list(artifact.visual.shape)}, but the bundle "
        f"takes f32{expected} (pack with the bundle it was tuned on)"
    )


def _add_border(g: Nodes, pixels: str, bundle: Bundle, artifact: VisualArtifact) -> str:
    size = bundle.image.size
    if artifact.visual.shape != (3, size, size):
        raise _shape_error(artifact, f"[3, {size}, {size}]")
    inner = inner_side(size)
    margin = (size - inner) // 2
    frame = normalised_border(artifact.visual, bundle.image)
    frame[:, margin : margin + inner, margin : margin + inner] = 0
    levels = g.cast(pixels, TensorProto.UINT8)
    whole = g.integers(inner, inner), g.integers(0, 0), inner
    small = normalise(g, resize(g, levels, *whole, bundle.image), bundle.image)
    padded = g.node("Pad", [small, g.constant([0, 0, margin, margin] * 2, np.int64)])
    return g.node("Add", [padded, g.constant(frame[None])])


def _add_decoder(
    g: Nodes,
    model: Any,
    tower: Subgraph,
    pixels: str,
    bundle: Bundle,
    artifact: VisualArtifact,
    extractor: Path | None,
) -> str:
    size = bundle.image.size
    plain = normalise(g, pixels, bundle.image)
    if artifact.extractor:
        source, extractor_dim = _load_extractor(artifact, extractor, model)
        features = _insert_model(g, model, source, "extractor.", [plain])
    else:
        extractor_dim = bundle.embed_dim
        features = tower.insert(g, "plain.", [plain])
    if artifact.visual.shape != (n_values(extractor_dim, size),):
        raise _shape_error(artifact, f"[{n_values(extractor_dim, size)}]")
    statistics = artifact.statistics
    if statistics is None or statistics.shape != (2, N_STATISTICS):
        raise FormatError(
            f"the decoder has no normalisation statistics f32[2, {N_STATISTICS}] (tune again)"
        )
    decoder = _convert_opset(
        onnx.load_from_string(decoder_graph(extractor_dim, size)), model, "the decoder"
    )
    given = [features, g.constant(artifact.visual), g.constant(statistics)]
    added = _insert_model(g, model, decoder, "decoder.", given)
    black, white = limits(bundle.image)
    above = g.node("Max", [g.node("Add", [added, plain]), g.constant(black[None])])
    return g.node("Min", [above, g.constant(white[None])])


def _insert_model(g: Nodes, model: Any, other: Any, prefix: str, inputs: Sequence[str]) -> str:
    """Insert another model's nodes into `g` and its weights into `model`."""
    output = Subgraph(other.graph, prefix).insert(g, prefix, inputs)
    model.graph.initializer.extend(other.graph.initializer)
    known = {part.domain for part in model.opset_import}
    model.opset_import.extend(part for part in other.opset_import if part.domain not in known)
    return output


def _load_extractor(artifact: VisualArtifact, path: Path | None, model: Any) -> tuple[Any, int]:
    """Return the model whose features the decoder was tuned with, and their dimension.

    Raises: FormatError for another file, or one that is not an image encoder.
    """
    if path is None:
        raise FormatError(
            "the decoder was tuned with a separate extractor of SHA-256 "
            f"{artifact.extractor[:12]}… (pass its ONNX file)"
        )
    where = f'extractor "{path}"'
    if not path.is_file() or sha256(path) != artifact.extractor:
        raise FormatError(
            f"{where} is not the file that the decoder was tuned with (expected SHA-256 "
            f"{artifact.extractor[:12]}…)"
        )
    check_graph(path, None)  # the SHA-256 above covers this file only
    source = onnx.load(str(path))
    graph = source.graph
    stored = {w.name for w in graph.initializer}
    inputs = [value.type.tensor_type for value in graph.input if value.name not in stored]
    outputs = [value.type.tensor_type.shape.dim for value in graph.output]
    fits = (
        len(inputs) == len(outputs) == 1
        and inputs[0].elem_type == TensorProto.FLOAT
        and len(inputs[0].shape.dim) == 4
        and len(outputs[0]) == 2
        and outputs[0][1].dim_value > 0
    )
    if not fits:
        raise FormatError(
            f"{where} is not a graph with one input f32[N, 3, S, S] and one output f32[N, k] of "
            "fixed k"
        )
    return _convert_opset(source, model, where), outputs[0][1].dim_value


def _convert_opset(source: Any, model: Any, where: str) -> Any:
    """Convert `source` to the operator set of `model`."""
    own, wanted = (
        next(part.version for part in one.opset_import if part.domain in ("", "ai.onnx"))
        for one in (source, model)
    )
    if own == wanted:
        return source
    try:
        return version_converter.convert_version(source, wanted)
    except Exception as error:  # the converter raises many types
        raise FormatError(
            f"{where} uses ONNX operator set {own} and cannot be converted to the bundle's "
            f"{wanted}: {reason_of(error)}"
        ) from None

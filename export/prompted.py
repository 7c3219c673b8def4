"""Visual prompts as part of a classifier: what runtimes/visual.py does to images, as nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, version_converter

from export.nodes import Nodes, normalised, scaled
from runtimes.bundle import Bundle, check_external_data
from runtimes.decoder import N_STATISTICS, decoder_graph, n_values
from runtimes.visual import inner_side, limits, normalised_border
from ztune.artifact import VisualArtifact
from ztune.errors import FormatError
from ztune.io.files import sha256
from ztune.printing import reason_of


class Tower:
    """A graph whose nodes go into another one, as often as it is asked for; its weights once."""

    def __init__(self, graph: Any, prefix: str) -> None:
        """Rename the graph's weights so that they cannot meet a name of others."""
        self._nodes = list(graph.node)
        self._weights = {w.name: prefix + w.name for w in graph.initializer}
        self._inputs = [v.name for v in graph.input if v.name not in self._weights]
        self._output = graph.output[0].name
        for weight in graph.initializer:
            weight.name = self._weights[weight.name]

    def place(self, g: Nodes, prefix: str, inputs: Sequence[str]) -> str:
        """Add the nodes behind values of `g` and return the output's name there."""
        own = dict(zip(self._inputs, inputs, strict=True)) | self._weights | {"": ""}
        for node in self._nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name if node.name else ""
            copy.input[:] = [own.get(name, prefix + name) for name in node.input]
            copy.output[:] = [prefix + name if name else "" for name in node.output]
            g.nodes.append(copy)
        return own.get(self._output, prefix + self._output)


def has_tokens(artifact: VisualArtifact | None) -> bool:
    """Return whether an image goes through the image graph that takes tokens."""
    return artifact is not None and artifact.program == "tokens"


def prompted(
    g: Nodes,
    model: Any,
    tower: Tower,
    grey: str,
    bundle: Bundle,
    artifact: VisualArtifact,
    extractor: Path | None,
) -> str:
    """Add what is between grey levels f32[N, 3, S, S] and the features f32[N, e] they get.

    `tower` is of the image graph in `model`, which takes the weights of other graphs.

    Raises: FormatError when artifact, bundle and extractor do not fit together.
    """
    if extractor is not None and not artifact.extractor:
        raise FormatError(
            f'"{extractor}" was given, but the artifact was tuned without an extractor of its own '
            "(leave it out)"
        )
    if artifact.program == "tokens":
        width = None if bundle.visual is None else bundle.visual.width
        if artifact.visual.shape[1] != width:
            raise _misfit(artifact, f"[n, {width}]")
        tokens = g.constant(artifact.visual[None])
        one = tower.place(g, "image.", [normalised(g, grey, bundle.image), tokens])
        return g.node("Squeeze", [one, g.constant([0], np.int64)])
    if artifact.program == "border":
        changed = _with_border(g, grey, bundle, artifact)
    else:
        changed = _with_decoder(g, model, tower, grey, bundle, artifact, extractor)
    return tower.place(g, "image.", [changed])


def _misfit(artifact: VisualArtifact, expected: str) -> FormatError:
    return FormatError(
        f"the values of the {artifact.program} are f32{list(artifact.visual.shape)}, the bundle "
        f"takes f32{expected} (pack with the bundle it was tuned on)"
    )


def _with_border(g: Nodes, grey: str, bundle: Bundle, artifact: VisualArtifact) -> str:
    size = bundle.image.size
    if artifact.visual.shape != (3, size, size):
        raise _misfit(artifact, f"[3, {size}, {size}]")
    inner = inner_side(size)
    margin = (size - inner) // 2
    frame = normalised_border(artifact.visual, bundle.image)
    frame[:, margin : margin + inner, margin : margin + inner] = 0
    small = normalised(
        g, scaled(g, grey, g.constant([inner, inner], np.int64), bundle.image), bundle.image
    )
    padded = g.node("Pad", [small, g.constant([0, 0, margin, margin] * 2, np.int64)])
    return g.node("Add", [padded, g.constant(frame[None])])


def _with_decoder(
    g: Nodes,
    model: Any,
    tower: Tower,
    grey: str,
    bundle: Bundle,
    artifact: VisualArtifact,
    extractor: Path | None,
) -> str:
    size = bundle.image.size
    plain = normalised(g, grey, bundle.image)
    if artifact.extractor:
        source, extractor_dim = _extractor(artifact, extractor, model)
        features = _added(g, model, source, "extractor.", [plain])
    else:
        extractor_dim = bundle.embed_dim
        features = tower.place(g, "plain.", [plain])
    if artifact.visual.shape != (n_values(extractor_dim, size),):
        raise _misfit(artifact, f"[{n_values(extractor_dim, size)}]")
    statistics = artifact.statistics
    if statistics is None or statistics.shape != (2, N_STATISTICS):
        raise FormatError(
            f"the decoder has no statistics f32[2, {N_STATISTICS}] to normalise by (tune again)"
        )
    decoder = _at_opset(
        onnx.load_from_string(decoder_graph(extractor_dim, size)), model, "the decoder"
    )
    given = [features, g.constant(artifact.visual), g.constant(statistics)]
    added = _added(g, model, decoder, "decoder.", given)
    black, white = limits(bundle.image)
    above = g.node("Max", [g.node("Add", [added, plain]), g.constant(black[None])])
    return g.node("Min", [above, g.constant(white[None])])


def _added(g: Nodes, model: Any, other: Any, prefix: str, inputs: Sequence[str]) -> str:
    """Put another model's nodes behind values of `g`, its weights into `model`."""
    output = Tower(other.graph, prefix).place(g, prefix, inputs)
    model.graph.initializer.extend(other.graph.initializer)
    known = {part.domain for part in model.opset_import}
    model.opset_import.extend(part for part in other.opset_import if part.domain not in known)
    return output


def _extractor(artifact: VisualArtifact, path: Path | None, model: Any) -> tuple[Any, int]:
    """Return the model whose features the decoder was tuned with, and their number.

    Raises: FormatError when it is another file, or no image encoder.
    """
    if path is None:
        raise FormatError(
            "the decoder was tuned with an extractor of its own, of SHA-256 "
            f"{artifact.extractor[:12]}… (name its ONNX file)"
        )
    where = f'extractor "{path}"'
    if not path.is_file() or sha256(path) != artifact.extractor:
        raise FormatError(
            f"{where} is not the file that the decoder was tuned with, which has SHA-256 "
            f"{artifact.extractor[:12]}…"
        )
    check_external_data(path, None)  # the SHA-256 above speaks for this file alone
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
    branches = any(a.HasField("g") for node in graph.node for a in node.attribute)
    if not fits or branches or source.functions:
        raise FormatError(
            f"{where} is no plain graph with one input f32[N, 3, S, S] and one output f32[N, k] "
            "of a k that it names"
        )
    return _at_opset(source, model, where), outputs[0][1].dim_value


def _at_opset(source: Any, model: Any, where: str) -> Any:
    """Return a model in the operator set of another."""
    own, wanted = (
        next(part.version for part in one.opset_import if part.domain in ("", "ai.onnx"))
        for one in (source, model)
    )
    if own == wanted:
        return source
    try:
        return version_converter.convert_version(source, wanted)
    except Exception as error:  # the converter raises many types, all of them final here
        raise FormatError(
            f"{where} is in ONNX operator set {own}, the bundle in {wanted}, and it cannot be "
            f"converted: {reason_of(error)}"
        ) from None

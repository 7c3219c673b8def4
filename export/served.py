"""Build the graphs for a server: a bundle's graphs with token ids as input and losses as output.

Every answer has `digest`, the SHA-256 of the bundle's manifest, which identifies the export.
docs/serving.md specifies inputs and outputs. Needs onnx, but not torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from export.client import read_client_file
from export.nodes import Nodes
from export.visual_prompt import Subgraph
from export.weights import read_graph
from runtimes.bundle import Bundle
from runtimes.prompts import placeholder_id, token_table
from runtimes.scores import scoring_nodes

_FLOAT, _DOUBLE, _INT64, _UINT8 = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.UINT8,
)
_OPSET, _IR = 20, 10


def image_graph(bundle: Bundle) -> ModelProto:
    """Return `pixels` f32[N, 3, S, S] to `features` f32[N, e] and `digest` u8[N, 32]."""
    return _with_digest(bundle, "image", "pixels")


def text_graph(bundle: Bundle) -> ModelProto:
    """Return `tokens` i64[B, L] to `features` f32[B, e] and `digest` u8[B, 32]."""
    model = _with_digest(bundle, "text", "tokens")
    g = Nodes("served.ids")
    ids = _or_beyond(g, "tokens", g.constant(len(token_table(bundle)), np.int64))
    for node in model.graph.node:
        node.input[:] = [ids if name == "tokens" else name for name in node.input]
    nodes = [*g.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(g.constants)
    return model


def _or_beyond(g: Nodes, indices: str, n_rows: str) -> str:
    """Return indices into `n_rows` with negative ones, which would wrap round, out of range."""
    negative = g.node("Less", [indices, g.constant(0, np.int64)])
    return g.node("Where", [negative, n_rows, indices])


def _with_digest(bundle: Bundle, name: str, given: str) -> ModelProto:
    """Return a bundle's graph with a digest for each row of its input `given`."""
    model = read_graph(bundle.file(f"{name}.onnx"))
    g = Nodes("served")
    rows = g.node("Shape", [given], start=0, end=1)
    size = g.node("Concat", [rows, g.constant([32], np.int64)], axis=0)
    g.node("Expand", [g.constant(_digest(bundle)[None], np.uint8), size], "digest")
    model.graph.node.extend(g.nodes)
    model.graph.initializer.extend(g.constants)
    model.graph.output.append(_value("digest", _UINT8, "N", 32))
    return model


def prompt_graph(bundle: Bundle) -> ModelProto:
    """Return `contexts` f32[P, m, d] and `tokens` i64[C, n] to `features` f32[P, C, e], `digest`.

    A row of `tokens` is a class name with `suffix_ids`, padded with -1.
    """
    g, model, features = _embed_tokens(bundle)
    g.node("Identity", [features], "features")
    outputs = [_value("features", _FLOAT, "P", "C", bundle.embed_dim)]
    return _finish(bundle, g, model, _text_inputs(bundle), outputs)


def score_graph(bundle: Bundle, *, logits: bool) -> ModelProto:
    """Return contexts, class tokens, image features and labels to losses.

    Inputs of `prompt_graph`, `features` f32[N, e] and `labels` i64[N]; outputs `losses` f64[P] in
    nats, `correct` i64[P] images, `digest`, and with `logits` also `logits` f32[P, N, C].
    """
    g, model, texts = _embed_tokens(bundle)
    scoring, constants = scoring_nodes(bundle.logit_scale, bundle.logit_bias)
    g.node("Identity", [texts], "texts")
    # An error unless there is one label per image: a single label would be broadcast.
    size = g.constant([bundle.embed_dim], np.int64)
    shape = g.node("Concat", [g.node("Shape", ["labels"]), size], axis=0)
    g.node("Reshape", ["features", shape], "images", allowzero=1)
    scoring_of = {"labels": _or_beyond(g, "labels", g.node("Shape", ["tokens"], start=0, end=1))}
    for node in scoring:
        node.input[:] = [scoring_of.get(name, name) for name in node.input]
    g.nodes.extend(scoring)
    g.constants.extend(constants)
    hits = g.node("Cast", ["right"], to=_INT64)
    g.node("ReduceSum", [hits, g.constant([1, 2], np.int64)], "correct", keepdims=0)
    inputs = [
        *_text_inputs(bundle),
        _value("features", _FLOAT, "N", bundle.embed_dim),
        _value("labels", _INT64, "N"),
    ]
    outputs = [_value("losses", _DOUBLE, "P"), _value("correct", _INT64, "P")]
    if logits:
        outputs.append(_value("logits", _FLOAT, "P", "N", "C"))
    return _finish(bundle, g, model, inputs, outputs)


def client_graph(bundle: Bundle) -> ModelProto:
    """Return `slice` i64[2] (start, length) to `bytes` u8[length] of the client half.

    The half is the concatenation of `bundle.client_files`; `sizes` i64[files] are their bytes.
    Slices are truncated at the end.
    """
    parts = [read_client_file(bundle, name) for name in bundle.client_files]
    g = Nodes("client")
    content = g.constant(np.frombuffer(b"".join(parts), dtype=np.uint8), np.uint8)
    start = g.node("Gather", ["slice", g.constant([0], np.int64)], axis=0)
    length = g.node("Gather", ["slice", g.constant([1], np.int64)], axis=0)
    g.node("Slice", [content, start, g.node("Add", [start, length])], "bytes")
    g.node("Identity", [g.constant([len(part) for part in parts], np.int64)], "sizes")
    outputs = [_value("bytes", _UINT8, "length"), _value("sizes", _INT64, len(parts))]
    model = helper.make_model(
        helper.make_graph([], "client", [], []),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
    )
    return _finish(bundle, g, model, [_value("slice", _INT64, 2)], outputs)


def _embed_tokens(bundle: Bundle) -> tuple[Nodes, ModelProto, str]:
    """Return the prompt graph with token ids as input: its nodes, model and output name."""
    model = read_graph(bundle.file("prompt.onnx"))
    tower = Subgraph(model.graph, "prompt.")
    g = Nodes("served")
    table = g.constant(np.asarray(token_table(bundle)))
    tokens = _checked_tokens(g, bundle)
    make = _prefix_feeds if bundle.text.graph == "prefix" else _sequence_feeds
    feeds = make(g, bundle, table, tokens)
    given = [value.name for value in model.graph.input]
    features = tower.insert(g, "prompt.", ["contexts", *(feeds[name] for name in given[1:])])
    # Keep shape information: without it ONNX Runtime skips some fusions, and a server would round
    # differently from a bundle on the same machine.
    for value in model.graph.input[1:]:
        value.name = feeds[value.name]
    for value in [*model.graph.value_info, *model.graph.output]:
        value.name = f"prompt.{value.name}"
    model.graph.value_info.extend([*model.graph.input[1:], *model.graph.output])
    return g, model, features


def _checked_tokens(g: Nodes, bundle: Bundle) -> str:
    """Return `tokens`, with an error where a row is not ids and then -1, or is too long.

    An invalid id becomes one beyond the table, so that looking it up is an error on a CPU.
    """
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    first, second = g.constant([0], np.int64), g.constant([1], np.int64)
    n_classes = g.node("Shape", ["tokens"], start=0, end=1)
    n = g.node("Shape", ["tokens"], start=1, end=2)
    n_context = g.node("Shape", ["contexts"], start=1, end=2)
    most = g.constant([bundle.text.context_length - len(bundle.text.prefix_ids)], np.int64)
    # Negative, so that Expand is an error, if a row is too long or empty.
    n_left = g.node("Sub", [g.node("Sub", [most, n_context]), n])
    n_more = g.node("Min", [n_left, g.node("Sub", [n, second])])
    size = g.node("Concat", [n_classes, n_more], axis=0)
    more = g.node("Expand", [g.constant(-1, np.int64), size])
    wide = g.node("Concat", ["tokens", more], axis=1)
    tokens = g.node("Slice", [wide, first, n, second])
    real = g.node("GreaterOrEqual", [tokens, zero])
    n_real = g.node("ReduceSum", [g.node("Cast", [real], to=_INT64), second], keepdims=1)
    columns = g.node("Range", [zero, g.node("Squeeze", [n, first]), one])
    # An empty row is expected to have one id.
    expected = g.node("Less", [columns, g.node("Max", [n_real, one])])
    odd = g.node("Xor", [real, expected])
    invalid = g.node("Or", [odd, g.node("Less", [tokens, g.constant(-1, np.int64)])])
    return g.node("Where", [invalid, g.constant(len(token_table(bundle)), np.int64), tokens])


def _prefix_feeds(g: Nodes, bundle: Bundle, table: str, tokens: str) -> dict[str, str]:
    """Build the feeds of a prefix graph from class tokens, like runtimes.prompts."""
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    first, flat = g.constant([0], np.int64), g.constant([-1], np.int64)
    real = g.node("GreaterOrEqual", [tokens, zero])  # [C, n]
    real_flat = g.node("Reshape", [real, flat])
    shape = g.node("Shape", [tokens])
    n = g.node("Squeeze", [g.node("Shape", [tokens], start=1, end=2), first])
    columns = g.node("Range", [zero, n, one])
    lengths = g.node(
        "ReduceSum",
        [g.node("Cast", [real], to=_INT64), g.constant([1], np.int64)],
        keepdims=0,
    )
    starts = g.node("CumSum", [lengths, zero], exclusive=1)
    rows = g.node("Add", [g.node("Unsqueeze", [starts, g.constant([1], np.int64)]), columns])
    everywhere = g.node("Reshape", [g.node("Expand", [columns, shape]), flat])
    places = g.node("Range", [zero, g.node("Size", [tokens]), one])
    packed = g.node("Compress", [g.node("Reshape", [tokens, flat]), real_flat], axis=0)
    return {
        "name_embeddings": g.node("Gather", [table, packed], axis=0),
        "name_positions": g.node("Compress", [everywhere, real_flat], axis=0),
        "pad_index": g.node("Where", [real, rows, zero]),
        "unpad_index": g.node("Compress", [places, real_flat], axis=0),
        "eot_index": g.node("Sub", [g.node("Add", [starts, lengths]), one]),
    }


def _sequence_feeds(g: Nodes, bundle: Bundle, table: str, tokens: str) -> dict[str, str]:
    """Build the feeds of a sequence graph from class tokens, like runtimes.prompts."""
    spec = bundle.text
    zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
    length = g.constant([spec.context_length], np.int64)
    n_classes = g.node("Shape", [tokens], start=0, end=1)
    n_context = g.node("Shape", ["contexts"], start=1, end=2)

    def column(value: int | list[list[int]], width: str) -> str:
        size = g.node("Concat", [n_classes, width], axis=0)
        return g.node("Expand", [g.constant(value, np.int64), size])

    n_prefix = g.constant([len(spec.prefix_ids)], np.int64)
    n_name = g.node("Shape", [tokens], start=1, end=2)
    n_before = g.node("Add", [n_prefix, n_context])
    # Negative if a sequence is too long: an error, never truncated.
    n_padding = g.node("Sub", [length, g.node("Add", [n_before, n_name])])
    parts = [column(placeholder_id(spec), n_context), tokens, column(-1, n_padding)]
    if spec.prefix_ids:
        parts.insert(0, column([list(spec.prefix_ids)], n_prefix))
    whole = g.node("Concat", parts, axis=1)  # [C, L]
    ids = g.node("Where", [g.node("Less", [whole, zero]), g.constant(spec.pad_id, np.int64), whole])
    # Each id that occurs is looked up once, as on the host.
    g.nodes.append(helper.make_node("Unique", [ids], ["ids.used", "", "ids.place"], sorted=1))
    shape = g.node("Shape", [ids])
    place = g.node("Add", [g.node("Reshape", ["ids.place", shape]), n_context])
    # At the context's positions are the context's rows: 0 ... m - 1.
    before = g.constant(len(spec.prefix_ids), np.int64)
    steps = g.node("Range", [zero, g.constant(spec.context_length, np.int64), one])
    within = g.node("Sub", [steps, before])
    inside = g.node(
        "And",
        [g.node("GreaterOrEqual", [within, zero]), g.node("Less", [within, n_context])],
    )
    return {
        "name_embeddings": g.node("Gather", [table, "ids.used"], axis=0),
        "sequence_index": g.node("Where", [inside, within, place]),
        "tokens": ids,
    }


def _text_inputs(bundle: Bundle) -> list[Any]:
    return [
        _value("contexts", _FLOAT, "P", "m", bundle.text.width),
        _value("tokens", _INT64, "C", "n"),
    ]


def _finish(
    bundle: Bundle, g: Nodes, model: ModelProto, inputs: list[Any], outputs: list[Any]
) -> ModelProto:
    """Replace the model's nodes, inputs and outputs; add the digest."""
    g.node("Identity", [g.constant(_digest(bundle), np.uint8)], "digest")
    graph = model.graph
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(g.nodes)
    graph.initializer.extend(g.constants)
    graph.input.extend(inputs)
    graph.output.extend([*outputs, _value("digest", _UINT8, 32)])
    return model


def _digest(bundle: Bundle) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex(bundle.digest), dtype=np.uint8)


def _value(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)

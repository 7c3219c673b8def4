"""Convert a graph to mixed precision: matrix products in fp16, sums and normalisation in fp32.

`onnxruntime.transformers.float16` rounds to fp16 and back between operators that it keeps in fp32.
That would put the residual stream, which carries small differences of losses, into fp16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ztune.errors import ZtuneError

_PRODUCTS = {"MatMul", "Gemm", "Conv"}
# Operators that only move values; all but Concat take them as first input.
_MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
# Activations between two products.
_ACTIVATIONS = {"Gelu", "Relu", "Sigmoid"}


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its products and the operators between them in fp16.

    Inputs, outputs, normalisation, softmax, masks, positions, the residual stream, the projection
    and the unit features stay in fp32.

    Raises: ZtuneError when the graph has functions or branches, or a weight exceeds fp16.
    """
    if model.functions or any(a.HasField("g") for n in model.graph.node for a in n.attribute):
        raise ZtuneError("the graph has functions or branches: it cannot be converted to fp16")
    graph = _Graph(model)
    return graph.convert(graph.select_nodes())


class _Graph:
    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self.weights = {
            w.name: w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT
        }
        self.producers = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.consumers.setdefault(name, []).append(i)
        self.outputs = {output.name for output in model.graph.output}

    def value_inputs(self, node: Any) -> list[int]:
        """Return the places of a node's inputs that are values rather than shapes."""
        every = node.op_type not in _MOVES or node.op_type == "Concat"
        given = [place for place, name in enumerate(node.input) if name]
        return given if every else given[:1]

    def select_nodes(self) -> set[int]:
        """Return the nodes to run in fp16."""
        half = self._select_products()
        while True:
            before = len(half)
            for i, node in enumerate(self.nodes):
                if (
                    i not in half
                    and not self.outputs & set(node.output)
                    and self._can_join(i, half)
                ):
                    half.add(i)
            if len(half) == before:
                return half

    def _select_products(self) -> set[int]:
        """Return the products before the last normalisation or, without one, the last product."""
        ends = [i for i, node in enumerate(self.nodes) if node.op_type == "LayerNormalization"]
        if not ends:
            ends = [i for i, node in enumerate(self.nodes) if node.op_type in _PRODUCTS][-1:]
        before, todo = set(ends), list(ends)
        while todo:
            for name in self.nodes[todo.pop()].input:
                producer = self.producers.get(name)
                if producer is not None and producer not in before:
                    before.add(producer)
                    todo.append(producer)
        before -= set(ends)
        return {i for i in before if self.nodes[i].op_type in _PRODUCTS}

    def _can_join(self, i: int, half: set[int]) -> bool:
        """Return whether a node can run in fp16 too, given those that do."""
        node = self.nodes[i]
        names = [node.input[place] for place in self.value_inputs(node)]
        made = [self.producers.get(name, -1) in half for name in names]
        if node.op_type in _MOVES:
            # After a product, or only before products.
            after = any(made) and all(
                m or name in self.weights for m, name in zip(made, names, strict=True)
            )
            return after or self._feeds_only(node, half)
        if node.op_type in _ACTIVATIONS:
            return all(made)
        if node.op_type == "Mul":  # by a scale, or an activation by itself
            return any(made) and all(
                m or self._is_small(name, 1) for m, name in zip(made, names, strict=True)
            )
        if node.op_type == "Add":  # a bias; a sum of two products that feeds a third
            if all(made):
                return self._feeds_only(node, half)
            return any(made) and any(
                self._is_small(name) for m, name in zip(made, names, strict=True) if not m
            )
        return False

    def _feeds_only(self, node: Any, half: set[int]) -> bool:
        """Return whether every consumer takes a node's output as values and runs in fp16."""
        users = [(j, name) for name in node.output for j in self.consumers.get(name, [])]
        return bool(users) and all(
            j in half
            and all(
                place in self.value_inputs(self.nodes[j])
                for place, given in enumerate(self.nodes[j].input)
                if given == name
            )
            for j, name in users
        )

    def _is_small(self, name: str, most: int | None = None) -> bool:
        """Return whether a weight is a vector or scalar of at most `most` values."""
        weight = self.weights.get(name)
        if weight is None or len(weight.dims) > 1:
            return False
        return most is None or int(np.prod(weight.dims)) <= most

    def convert(self, half: set[int]) -> onnx.ModelProto:
        """Return the model with the nodes of `half` in fp16, and casts where precision changes."""
        made_half = {name for i in half for name in self.nodes[i].output}
        casts: dict[str, str] = {}
        halves: dict[str, onnx.TensorProto] = {}
        nodes: list[onnx.NodeProto] = []

        def cast(name: str, kind: int) -> str:
            if name not in casts:
                casts[name] = f"{name}_as_{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
                nodes.append(helper.make_node("Cast", [name], [casts[name]], to=kind))
            return casts[name]

        for i, node in enumerate(self.nodes):
            new = onnx.NodeProto()
            new.CopyFrom(node)
            if i in half:
                for place in self.value_inputs(node):
                    name = node.input[place]
                    if name in self.weights:
                        if name not in halves:
                            halves[name] = _weight_to_half(self.weights[name])
                        new.input[place] = halves[name].name
                    elif name not in made_half:
                        new.input[place] = cast(name, TensorProto.FLOAT16)
            else:
                for place, name in enumerate(node.input):
                    if name in made_half:
                        new.input[place] = cast(name, TensorProto.FLOAT)
            nodes.append(new)
        used = {name for node in nodes for name in node.input}
        kept = [w for w in self.model.graph.initializer if w.name in used]
        own = self.model.graph
        graph = helper.make_graph(nodes, own.name, own.input, own.output, [*kept, *halves.values()])
        return helper.make_model(
            graph,
            producer_name=self.model.producer_name,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
        )


def _weight_to_half(weight: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(weight)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if np.isinf(rounded).any():
        raise ZtuneError(
            f"weight {weight.name} has values up to {np.abs(values).max():.3g}, above the fp16 "
            "maximum of 65504: this model cannot be converted to fp16"
        )
    return numpy_helper.from_array(rounded, f"{weight.name}_as_fp16")

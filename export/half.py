"""A graph in mixed precision: matrix products in 16 bit, all that sums up or normalises in 32.

`onnxruntime.transformers.float16` is not used: between two operators that it leaves in 32 bit it
rounds to 16 and back, so that the residual stream, where a small difference of losses lives, would
be in 16 bit all the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ztune.errors import ZtuneError

_PRODUCTS = {"MatMul", "Gemm", "Conv"}
# Operators that carry numbers elsewhere, as they are; all but Concat take them first.
_MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
# Activations between two products.
_ACTIVATIONS = {"Gelu", "Relu", "Sigmoid"}


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its products and what lies between them in 16 bit.

    In 32 bit stay inputs and outputs, normalisation, softmax, masks, positions, the residual
    stream, and all after the last normalisation: the projection and the unit features.

    Raises: ZtuneError when the graph has parts of its own, or a weight is beyond 16 bit.
    """
    if model.functions or any(a.HasField("g") for n in model.graph.node for a in n.attribute):
        raise ZtuneError("the graph has functions or branches: it cannot be converted to 16 bit")
    graph = _Graph(model)
    return graph.converted(graph.in_half())


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

    def numbers(self, node: Any) -> list[int]:
        """Return which inputs of a node that is to run in 16 bit are numbers, not shapes."""
        every = node.op_type not in _MOVES or node.op_type == "Concat"
        given = [place for place, name in enumerate(node.input) if name]
        return given if every else given[:1]

    def in_half(self) -> set[int]:
        """Return the nodes to run in 16 bit."""
        half = self._products()
        while True:
            before = len(half)
            for i, node in enumerate(self.nodes):
                if i not in half and not self.outputs & set(node.output) and self._joins(i, half):
                    half.add(i)
            if len(half) == before:
                return half

    def _products(self) -> set[int]:
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

    def _joins(self, i: int, half: set[int]) -> bool:
        """Return whether a node runs in 16 bit beside those that do."""
        node = self.nodes[i]
        names = [node.input[place] for place in self.numbers(node)]
        made = [self.producers.get(name, -1) in half for name in names]
        if node.op_type in _MOVES:
            # After a product, or with nothing but products behind it.
            after = any(made) and all(
                m or name in self.weights for m, name in zip(made, names, strict=True)
            )
            return after or self._only_for(node, half)
        if node.op_type in _ACTIVATIONS:
            return all(made)
        if node.op_type == "Mul":  # by a scale, or an activation by itself
            return any(made) and all(
                m or self._is_small(name, 1) for m, name in zip(made, names, strict=True)
            )
        if node.op_type == "Add":  # a bias; a sum of two products where it goes into a third
            if all(made):
                return self._only_for(node, half)
            return any(made) and any(
                self._is_small(name) for m, name in zip(made, names, strict=True) if not m
            )
        return False

    def _only_for(self, node: Any, half: set[int]) -> bool:
        """Return whether all that takes a node's output as numbers runs in 16 bit."""
        users = [(j, name) for name in node.output for j in self.consumers.get(name, [])]
        return bool(users) and all(
            j in half
            and all(
                place in self.numbers(self.nodes[j])
                for place, given in enumerate(self.nodes[j].input)
                if given == name
            )
            for j, name in users
        )

    def _is_small(self, name: str, most: int | None = None) -> bool:
        """Return whether a weight is a vector or scalar, with at most so many values."""
        weight = self.weights.get(name)
        if weight is None or len(weight.dims) > 1:
            return False
        return most is None or int(np.prod(weight.dims)) <= most

    def converted(self, half: set[int]) -> onnx.ModelProto:
        """Return the model with the nodes of `half` in 16 bit, and casts at the borders."""
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
                for place in self.numbers(node):
                    name = node.input[place]
                    if name in self.weights:
                        if name not in halves:
                            halves[name] = _in_half(self.weights[name])
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


def _in_half(weight: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(weight)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if np.isinf(rounded).any():
        raise ZtuneError(
            f"weight {weight.name} goes up to {np.abs(values).max():.3g}, 16 bit end at 65504: "
            "this model cannot be converted to fp16"
        )
    return numpy_helper.from_array(rounded, f"{weight.name}_as_fp16")

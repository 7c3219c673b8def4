"""Check an untrusted graph before ONNX Runtime opens it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ztune.errors import FormatError
from ztune.io.files import open_regular

# Untrusted graphs must terminate and read no other file; ztune uses only standard operators.
_STANDARD = ("", "ai.onnx")
"""Allowed operator domains; others have loops without a subgraph, or load files."""
_BYTES = 2  # the wire type of messages, strings and bytes
_FIXED = {1: 8, 5: 4}
_LONGEST_NUMBER = 10  # bytes
# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_WEIGHT, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def check_graph(graph: Path, allowed: str | None) -> None:
    """Refuse a graph that may not terminate, or with external data in a file other than `allowed`.

    Raises: FormatError for control flow (a subgraph), a function, an operator of another domain
        than ONNX's, external data elsewhere, or a file that is not an ONNX graph; OSError.
    """
    with open_regular(graph) as file:
        if graph.stat().st_size == 0:
            raise FormatError(f"{graph} is empty")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            _Walk(view, graph, allowed).model()


class _Walk:
    """One pass over a graph in protobuf's wire format, where a span is a message's start and end.

    It skips weights, which a parser would hold in memory.
    """

    def __init__(self, content: memoryview, path: Path, allowed: str | None):
        self._content, self._path, self._allowed = content, path, allowed

    def model(self) -> None:
        found = False
        for number, span in self._fields((0, len(self._content))):
            if number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
                raise self._refusal("has functions")
            if number == _MODEL_GRAPH:
                self._graph(span)
                found = True
        if not found:
            raise self._damaged()

    def _graph(self, graph: tuple[int, int]) -> None:
        for number, span in self._fields(graph):
            if number == _GRAPH_NODE:
                self._node(span)
            elif number == _GRAPH_WEIGHT:
                self._tensor(span)
            elif number == _GRAPH_SPARSE:
                self._sparse(span)

    def _node(self, node: tuple[int, int]) -> None:
        operator = ""
        for number, span in self._fields(node):
            if number == _NODE_OPERATOR:
                operator = self._text(span)
            elif number == _NODE_DOMAIN and (domain := self._text(span)) not in _STANDARD:
                raise self._refusal(f"has an operator of the domain {domain!r}")
            elif number == _NODE_ATTRIBUTE:
                self._attribute(span, operator)

    def _attribute(self, attribute: tuple[int, int], operator: str) -> None:
        for number, span in self._fields(attribute):
            if number in _ATTRIBUTE_GRAPHS:
                raise self._refusal(f"has control flow (operator {operator or 'unknown'!r})")
            if number in _ATTRIBUTE_TENSORS:
                self._tensor(span)
            elif number in _ATTRIBUTE_SPARSE:
                self._sparse(span)

    def _sparse(self, sparse: tuple[int, int]) -> None:
        for number, span in self._fields(sparse):
            if number in _SPARSE_TENSORS:
                self._tensor(span)

    def _tensor(self, tensor: tuple[int, int]) -> None:
        for number, span in self._fields(tensor):
            if number == _TENSOR_EXTERNAL:
                entry = [(part, self._text(text)) for part, text in self._fields(span)]
                if (_ENTRY_KEY, "location") not in entry:
                    continue
                for location in (text for part, text in entry if part == _ENTRY_VALUE):
                    if location != self._allowed:
                        raise FormatError(
                            f"{self._path} stores tensors in {location!r}, "
                            f"expected {self._allowed or 'all in one file'} (export again)"
                        )

    def _fields(self, message: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield number and span of a message's fields that hold bytes."""
        place, end = message
        while place < end:
            tag, place = self._number(place, end)
            kind, start = tag & 7, place
            if kind == _BYTES:
                length, start = self._number(place, end)
                place = start + length
            elif kind == 0:
                _, place = self._number(place, end)
            elif kind in _FIXED:
                place += _FIXED[kind]
            else:  # groups, which ONNX does not have
                raise self._damaged()
            if place > end or not 8 <= tag < 1 << 32:  # protobuf would cut off the bits above
                raise self._damaged()
            if kind == _BYTES:
                yield tag >> 3, (start, place)

    def _number(self, place: int, end: int) -> tuple[int, int]:
        """Return a varint and the place after it."""
        value = 0
        for position in range(min(_LONGEST_NUMBER, end - place)):
            byte = self._content[place + position]
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                return value, place + position + 1
        raise self._damaged()

    def _text(self, span: tuple[int, int]) -> str:
        return bytes(self._content[slice(*span)]).decode(errors="backslashreplace")

    def _refusal(self, what: str) -> FormatError:
        return FormatError(
            f"{self._path} {what}, expected a graph of standard ONNX operators without control "
            "flow, which always terminates (export again)"
        )

    def _damaged(self) -> FormatError:
        return FormatError(
            f"{self._path} cannot be opened: it is not an ONNX graph (corrupted or replaced)"
        )

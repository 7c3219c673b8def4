"""Check an untrusted graph before ONNX Runtime opens it."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from ztune.errors import FormatError
from ztune.io.files import open_regular

# Untrusted graphs must terminate and read no other file; ztune uses only standard operators.
_STANDARD = ("", "ai.onnx")
"""Allowed operator domains; others have loops without a subgraph, or load files."""
_INTEGER, _BYTES = 0, 2  # wire types; messages, strings and bytes have the same
_FIXED = {1: 8, 5: 4}
_LONGEST_NUMBER = 10  # bytes
# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_WEIGHT, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_EXTERNAL = 1, 2, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# Bytes of a value, by ONNX's number of its type; others are never stored outside of a graph.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_DECIMAL = re.compile(r"[0-9]{1,19}")


def check_graph(graph: Path, allowed: str | None) -> list[tuple[int, int]]:
    """Refuse a graph that may not terminate, or with external data outside of the file `allowed`.

    Returns the offset and length in bytes of every tensor in that file.

    Raises: FormatError for control flow (a subgraph), a function, an operator of another domain
        than ONNX's, external data elsewhere or beyond the file's end, or a file that is not an ONNX
        graph; OSError.
    """
    with open_regular(graph) as file:
        if graph.stat().st_size == 0:
            raise FormatError(f"{graph} is empty")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            return _Walk(view, graph, allowed).model()


class _Walk:
    """One pass over a graph in protobuf's wire format, where a span is a message's start and end.

    It skips weights, which a parser would hold in memory.
    """

    def __init__(self, content: memoryview, path: Path, allowed: str | None):
        self._content, self._path, self._allowed = content, path, allowed
        self._spans: list[tuple[int, int]] = []

    def model(self) -> list[tuple[int, int]]:
        found = False
        for number, span in self._fields((0, len(self._content))):
            if number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
                raise self._refusal("has functions")
            if number == _MODEL_GRAPH:
                self._graph(span)
                found = True
        if not found:
            raise self._damaged()
        return self._spans

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
        dims: list[int] = []
        kind, entries = 0, dict[str, str]()
        for number, value in self._parts(tensor):
            if number == _TENSOR_DIMS:
                dims += [value] if isinstance(value, int) else self._integers(value)
            elif number == _TENSOR_TYPE and isinstance(value, int):
                kind = value
            elif number == _TENSOR_EXTERNAL and not isinstance(value, int):
                key, text = self._entry(value)
                if key in entries:
                    raise self._damaged()
                entries[key] = text
        if entries:
            self._external(entries, dims, _ITEM_BYTES.get(kind, 0))

    def _entry(self, span: tuple[int, int]) -> tuple[str, str]:
        parts = [(number, self._text(text)) for number, text in self._fields(span)]
        if sorted(number for number, _ in parts) != [_ENTRY_KEY, _ENTRY_VALUE]:
            raise self._damaged()
        (_, key), (_, value) = sorted(parts)
        return key, value

    def _external(self, entries: dict[str, str], dims: list[int], n_bytes: int) -> None:
        """Check where a tensor of these dimensions and bytes per value is stored."""
        location = entries.pop("location", "")
        if location != self._allowed:
            raise FormatError(
                f"{self._path} stores tensors in {location!r}, "
                f"expected {self._allowed or 'all in one file'} (export again)"
            )
        offset, length = entries.pop("offset", "0"), entries.pop("length", None)
        size = (self._path.parent / location).stat().st_size
        for dim in dims:
            n_bytes *= dim
            if n_bytes > size:  # before it becomes a number of many digits
                break
        entries.pop("checksum", None)
        fits = (
            not entries
            and n_bytes > 0
            and (length is None or length == str(n_bytes))
            and _DECIMAL.fullmatch(offset)
            and int(offset) + n_bytes <= size
        )
        if not fits:
            raise FormatError(
                f"{self._path} has a tensor {dims[:8]} at offset {offset[:20]}, length "
                f"{(length or 'unknown')[:20]} of {location}, expected it to be within the file's "
                f"{size} bytes (export again)"
            )
        self._spans.append((int(offset), n_bytes))

    def _fields(self, message: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield number and span of a message's fields that hold bytes."""
        for number, value in self._parts(message):
            if not isinstance(value, int):
                yield number, value

    def _parts(self, message: tuple[int, int]) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """Yield the number of a message's fields, and an integer or the span of its bytes."""
        place, end = message
        while place < end:
            tag, place = self._number(place, end)
            kind, start, value = tag & 7, place, 0
            if kind == _BYTES:
                length, start = self._number(place, end)
                place = start + length
            elif kind == _INTEGER:
                value, place = self._number(place, end)
            elif kind in _FIXED:
                place += _FIXED[kind]
            else:  # groups, which ONNX does not have
                raise self._damaged()
            if place > end or not 8 <= tag < 1 << 32:  # protobuf would cut off the bits above
                raise self._damaged()
            if kind == _BYTES:
                yield tag >> 3, (start, place)
            elif kind == _INTEGER:
                yield tag >> 3, value

    def _integers(self, span: tuple[int, int]) -> Iterator[int]:
        """Yield the integers of a packed field."""
        place, end = span
        while place < end:
            value, place = self._number(place, end)
            yield value

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

"""The sizes of a parquet file's pages, read from their headers before anything is unpacked.

A file's metadata also state sizes, but readers allocate what the page headers say. They are Thrift
structs in the compact protocol; fields 2 and 3 are the unpacked and the packed size.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

_UNPACKED, _PACKED = 2, 3
_STOP, _BYTE, _DOUBLE, _BINARY, _MAP, _STRUCT = 0, 3, 7, 8, 11, 12
_BOOLS, _INTEGERS, _LISTS = (1, 2), (4, 5, 6), (9, 10)


def page_sizes(file: bytes | mmap.mmap, start: int, end: int) -> Iterator[int]:
    """Yield the unpacked bytes of each page of a column's part of a file.

    Raises: ValueError, IndexError for a damaged header.
    """
    while start < end:
        header = _Header(file, start)
        unpacked, packed = (header.integers.get(field, -1) for field in (_UNPACKED, _PACKED))
        if unpacked < 0 or packed < 0:
            raise ValueError("a page without its size")
        yield unpacked
        start = header.at + packed


class _Header:
    """A page's header; `at` is the index after it."""

    def __init__(self, file: bytes | mmap.mmap, at: int):
        self._file, self.at = file, at
        self.integers: dict[int, int] = {}
        """The struct's own integers by field."""
        self._struct(self.integers, 0)

    def _byte(self) -> int:
        self.at += 1
        return self._file[self.at - 1]

    def _number(self) -> int:
        """Return an unsigned variable-length integer of at most 64 bits."""
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("an integer of more than 64 bits")

    def _signed(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)

    def _struct(self, integers: dict[int, int], depth: int) -> None:
        field = 0
        while (start := self._byte()) & 15 != _STOP:
            field = field + (start >> 4) if start >> 4 else self._signed()
            kind = start & 15
            if kind in _INTEGERS:
                integers[field] = self._signed()
            elif kind not in _BOOLS:  # whose value is the kind
                self._skip(kind, depth + 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > 16 or self.at > len(self._file):
            raise ValueError("deeply nested, or larger than the file")
        if kind in (*_BOOLS, _BYTE):  # in a list or map
            self.at += 1
        elif kind in _INTEGERS:
            self._number()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            n_bytes = self._number()
            self.at += n_bytes
        elif kind in _LISTS:
            start = self._byte()
            for _ in range(self._number() if start >> 4 == 15 else start >> 4):
                self._skip(start & 15, depth + 1)
        elif kind == _MAP:
            n_pairs = self._number()
            kinds = self._byte() if n_pairs else 0
            for _ in range(n_pairs):
                self._skip(kinds >> 4, depth + 1)
                self._skip(kinds & 15, depth + 1)
        elif kind == _STRUCT:
            self._struct({}, depth)
        else:
            raise ValueError(f"a field of kind {kind}")

"""`weights.bin`: the weights of a bundle, which its graphs and its token table share."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from ztune.errors import FormatError
from ztune.io.files import open_regular
from ztune.io.schema import Count, Sha256
from ztune.types import TokenRows

WEIGHTS = "weights.bin"
TABLE = "token_table.bin"
"""The token table in a client half, which has no weights."""
BLOCK = 1 << 21
"""Bytes that one digest covers: a graph is opened after checking only the blocks that it reads."""
_BUFFER = 1 << 18  # bytes; stays in a processor's cache
# A file that was just written could be replaced without a change of its time stamps.
_LEAST_AGE_NS = 2_000_000_000
_checked: set[str] = set()
"""Blocks whose digests this process has checked."""


@dataclass(frozen=True)
class TokenTable:
    """Where the token embeddings [vocabulary, d] are in `weights.bin`."""

    offset: Count
    shape: tuple[
        Annotated[int, Meta(ge=1, le=1 << 24)],
        Annotated[int, Meta(ge=1, le=65536)],
    ]
    dtype: Literal["float32", "float16"]
    sha256: Sha256
    """Of the table's bytes."""

    @property
    def span(self) -> tuple[int, int]:
        """Offset and length in bytes."""
        return self.offset, self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    def map(self, path: Path, offset: int) -> TokenRows:
        """Return the table in a file, memory-mapped."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        table: TokenRows
        table = np.memmap(path, dtype, mode="r", offset=offset, shape=self.shape)
        return table


def block_digests(path: Path) -> tuple[str, ...]:
    """Return the SHA-256 of every 2 MiB of a file."""
    with open_regular(path) as file:
        return tuple(
            hashlib.sha256(block).hexdigest() for block in iter(lambda: file.read(BLOCK), b"")
        )


def check_blocks(
    path: Path, digests: tuple[str, ...], spans: Iterable[tuple[int, int]], where: str
) -> None:
    """Check the blocks of a file that hold the given spans, each once while the file is unchanged.

    Raises: FormatError naming `where`; OSError.
    """
    touched = {
        number
        for offset, length in spans
        for number in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }
    buffer = memoryview(bytearray(min(_BUFFER, BLOCK)))
    with open_regular(path) as file:
        found = os.fstat(file.fileno())
        old_enough = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _LEAST_AGE_NS
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for number in sorted(touched):
            key = f"{state} {number} {digests[number]}"
            if key in _checked:
                continue
            digest = hashlib.sha256()
            file.seek(number * BLOCK)
            for _ in range(BLOCK // len(buffer)):
                digest.update(buffer[: file.readinto(buffer)])
            if digest.hexdigest() != digests[number]:
                raise FormatError(
                    f"{where}: SHA-256 of block {number} differs from bundle.json (corrupted or "
                    "replaced; export again)"
                )
            if old_enough:
                _checked.add(key)

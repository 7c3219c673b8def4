"""Write the weights of several graphs to one file, equal ones once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import set_external_data

from runtimes.weights import TokenTable, block_digests
from ztune.io.schema import plain
from ztune.types import Json, TokenRows

# Bytes: smaller tensors stay in the graph, since shape inference needs some of them.
LEAST = 1024
# Bytes: weights are aligned to pages for memory mapping.
_PAGE = 4096


class SharedWeights:
    """The external data file of the graphs in its folder; equal bytes are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[bytes, int] = {}

    def add(self, content: bytes) -> int:
        """Store a tensor's bytes unless they are in the file; return their offset."""
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % _PAGE))
                self._offsets[digest] = file.tell()
                file.write(content)
        return self._offsets[digest]

    def move(self, model: ModelProto) -> None:
        """Move the weights of a graph in memory to the file."""
        for weight in model.graph.initializer:
            if len(weight.raw_data) >= LEAST:
                offset = self.add(weight.raw_data)
                set_external_data(weight, self.path.name, offset, len(weight.raw_data))
                weight.ClearField("raw_data")
                weight.data_location = TensorProto.EXTERNAL

    def finish(self, table: TokenRows) -> dict[str, Json]:
        """Store the token table; return the manifest's entries of the file.

        The table is usually a weight of `text.onnx`, and then already there.
        """
        kind = table.dtype.newbyteorder("<")
        content = np.ascontiguousarray(table, kind).tobytes()
        entry = TokenTable(
            self.add(content),
            table.shape,
            "float16" if table.dtype == np.float16 else "float32",
            hashlib.sha256(content).hexdigest(),
        )
        return {"token_table": plain(entry), "weight_blocks": list(block_digests(self.path))}

"""Tensors through system shared memory instead of the wire, where client and server share a host.

A request that got no answer may still be at work on the server, and write its answer later: after
a failure its regions are never used again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtimes.transport import Array, CallError, Region, Request, Transport

_ALIGNMENT = 64
_LEAST = 1 << 20
_NUMPY: Mapping[str, Any] = {
    "FP32": np.float32,
    "FP64": np.float64,
    "INT64": np.int64,
    "UINT8": np.uint8,
}


@dataclass(frozen=True)
class Expected:
    """The datatype and shape of an output, known before it is asked for."""

    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return np.dtype(_NUMPY[self.datatype])

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass
class _Pair:
    """A thread's own region: inputs first, outputs behind them."""

    name: str
    handle: Any
    n_bytes: int


class SharedMemory:
    """Asks one server through regions that both have open."""

    def __init__(self, transport: Transport):
        from tritonclient.utils import shared_memory

        self._transport = transport
        self._module = shared_memory
        self._own = threading.local()
        self._open: list[_Pair] = []

    def infer(
        self, request: Request, expected: Mapping[str, Expected], seconds: float
    ) -> dict[str, Array]:
        """Return all outputs, copied out of the region.

        Raises: CallError.
        """
        until = time.monotonic() + seconds
        places, total = {}, 0
        sizes = {f"input {k}": v.nbytes for k, v in request.inputs.items()}
        sizes |= {f"output {k}": v.n_bytes for k, v in expected.items()}
        for name, n_bytes in sizes.items():
            places[name] = total
            total += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        pair = self._region(total, seconds)
        shared = replace(
            request,
            inputs_at={
                k: Region(pair.name, v.nbytes, places[f"input {k}"])
                for k, v in request.inputs.items()
            },
            outputs_at={
                k: Region(pair.name, v.n_bytes, places[f"output {k}"]) for k, v in expected.items()
            },
        )
        try:
            for name, array in request.inputs.items():
                self._module.set_shared_memory_region(
                    pair.handle, [np.ascontiguousarray(array)], places[f"input {name}"]
                )
            self._transport.infer(shared, max(0.001, until - time.monotonic()))
            return {
                name: np.array(
                    self._module.get_contents_as_numpy(
                        pair.handle, output.dtype, list(output.shape), places[f"output {name}"]
                    )
                )
                for name, output in expected.items()
            }
        except BaseException:
            self._leave(pair)
            raise

    def close(self) -> None:
        """Give all regions back."""
        for pair in list(self._open):
            with contextlib.suppress(CallError):
                self._transport.unshare(pair.name, 1.0)
            self._leave(pair)

    def _region(self, n_bytes: int, seconds: float) -> _Pair:
        pair: _Pair | None = getattr(self._own, "pair", None)
        if pair is not None and pair in self._open and pair.n_bytes >= n_bytes:
            return pair
        if pair is not None and pair in self._open:
            with contextlib.suppress(CallError):
                self._transport.unshare(pair.name, seconds)
            self._leave(pair)
        size = max(_LEAST, 1 << (n_bytes - 1).bit_length())
        name = f"ztune_{os.getpid()}_{uuid.uuid4().hex[:12]}"
        try:
            handle = self._module.create_shared_memory_region(name, f"/{name}", size)
        except Exception as error:  # tritonclient's own kind
            raise CallError(f"no shared memory of {size} bytes ({error})", "refused") from None
        pair = _Pair(name, handle, size)
        self._open.append(pair)
        self._own.pair = pair
        try:
            self._transport.share(name, f"/{name}", size, seconds)
        except BaseException:
            self._leave(pair)
            raise
        return pair

    def _leave(self, pair: _Pair) -> None:
        """Unlink a region; what the server still has open goes when it does."""
        if pair in self._open:
            self._open.remove(pair)
            with contextlib.suppress(Exception):  # tritonclient's own kind: it is gone already
                self._module.destroy_shared_memory_region(pair.handle)

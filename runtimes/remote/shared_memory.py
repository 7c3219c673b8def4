"""Tensors through system shared memory instead of the wire, where client and server share a host.

A request that got no answer may still be at work on the server, and write its answer later: after
a failure its region is never used again. The server is told to close it when it has said itself
that it is done with the request, or else long after: what it holds open is memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.remote.transport import NUMPY_TYPES, Array, CallError, Region, Request, Transport

_ALIGNMENT = 64
_MEGABYTE = 1 << 20
# Kinds of failures after which a server no longer reads or writes.
_DONE = ("refused", "missing", "forgotten")
# Seconds after which a server without an answer is taken to be done; a newer Triton refuses to
# close what it still uses.
_LATE = 60.0


@dataclass(frozen=True)
class Expected:
    """The datatype and shape of an output, known before it is asked for."""

    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return NUMPY_TYPES[self.datatype]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(eq=False)
class _Pair:
    """A thread's own region: inputs first, outputs behind them."""

    name: str
    handle: Any
    n_bytes: int
    busy: bool = False
    """Whether a thread is using it."""


class SharedMemory:
    """Asks one server through regions that both have open."""

    def __init__(self, transport: Transport):
        from tritonclient.utils import shared_memory

        self._transport = transport
        self._module = shared_memory
        self._own = threading.local()
        self._lock = threading.Lock()
        self._open: list[_Pair] = []
        self._left: list[tuple[float, _Pair]] = []
        """Regions that the server may have open still, and since when they are not used."""
        self._closed = False

    def infer(
        self, request: Request, expected: Mapping[str, Expected], seconds: float
    ) -> dict[str, Array]:
        """Return all outputs, copied out of the region.

        One that the server says is of another type or shape than expected is given as it says, as
        zeros.

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
            told = self._transport.infer(shared, max(0.001, until - time.monotonic()))
            answer = {
                name: np.array(
                    self._module.get_contents_as_numpy(
                        pair.handle, output.dtype, list(output.shape), places[f"output {name}"]
                    )
                )
                for name, output in expected.items()
                # Of another type or shape than expected, what the server says is told, not this.
                if (told[name].dtype, told[name].shape) == (output.dtype, output.shape)
            }
        except BaseException as error:
            if isinstance(error, CallError) and error.kind in _DONE:
                self._unshare(pair, 1.0)
            else:
                with self._lock:
                    self._left.append((time.monotonic(), pair))
            self._leave(pair)
            raise
        with self._lock:
            pair.busy = False
            closed = self._closed
        if closed:
            self._leave(pair)
        return {**told, **answer}

    def close(self) -> None:
        """Give all regions back; one that is in use goes when its request ends."""
        with self._lock:
            self._closed = True
            idle = [pair for pair in self._open if not pair.busy]
        reachable = True
        for pair in [*self._late(), *idle]:
            if reachable:
                reachable = self._unshare(pair, 1.0)
            self._leave(pair)

    def _region(self, n_bytes: int, seconds: float) -> _Pair:
        """Return this thread's region, of at least as many bytes, as one that is in use."""
        pair: _Pair | None = getattr(self._own, "pair", None)
        with self._lock:
            if self._closed:
                raise CallError("shared memory was given up", "away")
            if pair is not None and pair not in self._open:
                pair = None
            if pair is not None and pair.n_bytes >= n_bytes:
                pair.busy = True
                return pair
        if pair is not None:
            self._unshare(pair, seconds)
            self._leave(pair)
        for late in self._late():
            self._unshare(late, 1.0)
        size = -(-n_bytes // _MEGABYTE) * _MEGABYTE
        name = f"ztune_{os.getpid()}_{uuid.uuid4().hex[:12]}"
        try:
            handle = self._module.create_shared_memory_region(name, f"/{name}", size)
        except Exception as error:  # tritonclient's own kind
            raise CallError(f"no shared memory of {size} bytes ({error})", "refused") from None
        pair = _Pair(name, handle, size, busy=True)
        with self._lock:
            self._open.append(pair)
        self._own.pair = pair
        try:
            _take(name, size)
            self._transport.share(name, f"/{name}", size, seconds)
        except BaseException:
            self._leave(pair)
            raise
        return pair

    def _late(self) -> list[_Pair]:
        """Return, once, the regions that a server must be done with by now."""
        with self._lock:
            since = time.monotonic() - _LATE
            late = [pair for left_at, pair in self._left if left_at <= since]
            self._left = [one for one in self._left if one[0] > since]
        return late

    def _unshare(self, pair: _Pair, seconds: float) -> bool:
        """Have the server close a region; return whether it could be told."""
        try:
            self._transport.unshare(pair.name, seconds)
        except CallError as error:
            return error.kind not in ("away", "foreign")
        return True

    def _leave(self, pair: _Pair) -> None:
        """Unlink a region; what the server still has open goes when it does."""
        with self._lock:
            if pair not in self._open:
                return
            self._open.remove(pair)
        with contextlib.suppress(Exception):  # tritonclient's own kind: it is gone already
            self._module.destroy_shared_memory_region(pair.handle)


def _take(name: str, size: int) -> None:
    """Have the system find the memory now; writing to what is not there would kill the process.

    Raises: CallError.
    """
    path = Path("/dev/shm") / name
    if not (hasattr(os, "posix_fallocate") and path.exists()):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise CallError(
                f"no shared memory of {size} bytes ({error.strerror})", "refused"
            ) from None

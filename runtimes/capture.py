"""Capture a candidate batch's call as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtimes.binding import BoundCall
from ztune.errors import ZtuneError
from ztune.types import F32

CAPTURED = "captured"
# Largest allowed difference between a replay and an ordinary call, for unit features.
_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}


def symbolic_sizes(session: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the size of each symbolic dimension of an open session, given its inputs' shapes."""
    return {
        name: size
        for given in session.get_inputs()
        for name, size in zip(given.shape, shapes[given.name], strict=True)
        if isinstance(name, str)
    }


def capture(
    bind: Callable[[], BoundCall], contexts: F32, expected: F32, precision: str
) -> tuple[BoundCall | None, str]:
    """Return the captured call and "captured", or None and the reason.

    `bind` opens a session with capture and binds its call; `expected` are an ordinary call's
    features f32[P, C, e] of `contexts`. The captured call gets other contexts, which reveals a
    replay that ignores its input.
    """
    try:
        call = bind()
        # Not a constant, which layer norms would remove.
        ramp = np.linspace(-1, 1, contexts.shape[-1], dtype=np.float32)
        call.run({"contexts": contexts + ramp})
        replayed = call({"contexts": contexts})
    except ZtuneError as error:
        return None, f"not captured: {error}"
    difference = float(np.abs(replayed - expected).max())
    if not difference <= _TOLERANCE[precision]:
        return None, f"not captured: a replay differs from an ordinary call by {difference:.1e}"
    return call, CAPTURED

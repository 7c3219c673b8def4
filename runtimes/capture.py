"""A CUDA graph of the one call that a round of candidates takes, where it can be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtimes.binding import BoundCall
from ztune.errors import ZtuneError
from ztune.types import F32

CAPTURED = "captured"
# Largest difference of a replay from an ordinary call, as values of unit features.
_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}


def dimensions(session: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
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
    """Return the captured call and "captured", or None and the reason why it is not.

    `bind` opens a session with capture and binds its call; `expected` are an ordinary call's
    features f32[P, C, e] of `contexts`. A replay that ignored its input would go on giving the
    features of the call that was captured: that one sees other contexts.
    """
    try:
        call = bind()
        # No constant is added: layer norms would take it away again.
        ramp = np.linspace(-1, 1, contexts.shape[-1], dtype=np.float32)
        call.run({"contexts": contexts + ramp})
        replayed = call({"contexts": contexts})
    except ZtuneError as error:
        return None, f"not captured: {error}"
    difference = float(np.abs(replayed - expected).max())
    if not difference <= _TOLERANCE[precision]:
        return None, f"not captured: a replay differs from an ordinary call by {difference:.1e}"
    return call, CAPTURED

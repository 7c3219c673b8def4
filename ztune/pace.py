"""How long a query takes, as `ztune doctor` says it of a bundle and of a server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from runtimes.runtime import PromptGraph

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CONTEXT, _CANDIDATES, _CALLS = 8, 10, 5


def seconds_per_query(graph: PromptGraph, width: int) -> tuple[float, str]:
    """Return the median of some calls over their candidates, in seconds, and what was timed."""
    encoder = graph.encoder(_WORDS, _CONTEXT, _CANDIDATES)
    contexts = np.zeros((_CANDIDATES, _CONTEXT, width), dtype=np.float32)
    encoder.encode(contexts)
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        encoder.encode(contexts)
        times.append(time.perf_counter() - started)
    what = f"{len(_WORDS)} classes, {_CONTEXT} context tokens, text side"
    return float(np.median(times)) / _CANDIDATES, what

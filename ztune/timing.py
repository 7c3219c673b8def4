"""Timing of text queries, for `ztune doctor` and `ztune compare`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.runtime import PromptGraph

N_CONTEXT, N_CANDIDATES = 8, 10
_LEAST_CALLS, _LEAST_SECONDS = 3, 0.5


@dataclass(frozen=True)
class TextTime:
    """Seconds per round of N_CANDIDATES candidates with N_CONTEXT context tokens."""

    first: float
    """The first round, including the graph's preparation."""
    later: float
    """The median of the later rounds."""

    @property
    def per_query(self) -> float:
        return self.later / N_CANDIDATES


def time_text_queries(graph: PromptGraph, classes: Sequence[str], width: int) -> TextTime:
    """Time rounds of candidates on these classes; `width` is the token embedding's."""
    contexts = np.zeros((N_CANDIDATES, N_CONTEXT, width), dtype=np.float32)
    started = time.perf_counter()
    encoder = graph.encoder(tuple(classes), N_CONTEXT, N_CANDIDATES)
    encoder.encode(contexts)
    first = time.perf_counter() - started
    later: list[float] = []
    while len(later) < _LEAST_CALLS or sum(later) < _LEAST_SECONDS:
        started = time.perf_counter()
        encoder.encode(contexts)
        later.append(time.perf_counter() - started)
    return TextTime(first, float(np.median(later)))

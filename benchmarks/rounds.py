"""Run a method's main path in this process on random unit features, and time the graph's part."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from runtimes.ort import OrtPromptEncoder, OrtPromptGraph
from runtimes.providers import Execution
from ztune.budget import Budget
from ztune.loop import Observer, Tuning, tune
from ztune.methods.base import TunedConfig
from ztune.model import Model
from ztune.objective import BatchSampler, FewShotObjective, NumpyScores
from ztune.system import one_blas_thread
from ztune.types import F32, Mixing, PromptEncoder, Scorer

SHOTS = 16
_SCALE = 100.0


class _Timed:
    """A prompt encoder that measures its time."""

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder
        self.seconds = 0.0

    def encode(self, contexts: F32) -> F32:
        start = time.perf_counter()
        texts = self._encoder.encode(contexts)
        self.seconds += time.perf_counter() - start
        return texts


class Rounds:
    """A text prompt method as run by `ztune tune`, on random features, without output files."""

    def __init__(
        self,
        graph: OrtPromptGraph,
        classes: Sequence[str],
        config: TunedConfig,
        n_images: int | None = None,
        score_with: Callable[[OrtPromptEncoder, F32], Scorer] | None = None,
    ):
        """Take an open graph; defaults: 16 images per class, scored by numpy."""
        bundle = graph.bundle
        random = np.random.default_rng(0)
        n_images = n_images or SHOTS * len(classes)
        shape = (1, n_images, bundle.embed_dim)
        features = random.standard_normal(shape, dtype=np.float32)
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        self.n_candidates = config.step_queries()
        towers = Model(bundle, Execution()).spec(bundle.embed_dim, n_images)
        self._map, self._optimizer = config.build(towers, queries=5000, seed=0)
        contexts = self._map(self._optimizer.ask().points[:1]).contexts
        assert contexts is not None
        self.encoder = graph.encoder(classes, contexts.shape[1], config.round_size)
        self._timed = _Timed(self.encoder)
        scorer: Scorer = NumpyScores(self._timed, features, _SCALE)
        if score_with is not None:
            scorer = score_with(self.encoder, features)
        self._oracle = FewShotObjective(scorer, np.arange(n_images) % len(classes))
        batch_size = config.images_of(n_images, len(classes))
        self._sampler = BatchSampler(n_images, batch_size, 1, random)
        self._n_classes = len(classes)
        self.plan = self.encoder.plan

    def steps(self, n_steps: int) -> dict[str, float]:
        """Run steps; return medians: seconds per step, seconds in the graph, numpy's share."""
        found: list[tuple[float, float]] = []
        before, spent = time.perf_counter(), self._timed.seconds

        def observe(_: Tuning, __: object) -> None:
            nonlocal before, spent
            found.append((time.perf_counter() - before, self._timed.seconds - spent))
            before, spent = time.perf_counter(), self._timed.seconds

        self._tune(n_steps * self.n_candidates, observe)
        return {
            "step": statistics.median(step for step, _ in found),
            "graph": statistics.median(graph for _, graph in found),
            "numpy_share": statistics.median((step - graph) / step for step, graph in found),
        }

    def run(self, n_queries: int) -> float:
        """Spend `n_queries` queries; return the wall-clock seconds."""
        start = time.perf_counter()
        self._tune(n_queries, lambda *_: None)
        return time.perf_counter() - start

    def whole(self, n_queries: int) -> dict[str, float]:
        """Spend `n_queries` queries and choose a result; return seconds and numpy's share."""
        start, spent = time.perf_counter(), self._timed.seconds

        def observe(*_: object) -> None:
            if isinstance(self._optimizer, Mixing):
                self._optimizer.fitted()  # as a run's history has it

        self._tune(n_queries, observe)
        if isinstance(self._optimizer, Mixing):
            self._optimizer.mixture()
        seconds, graph = time.perf_counter() - start, self._timed.seconds - spent
        return {"seconds": seconds, "graph": graph, "numpy_share": (seconds - graph) / seconds}

    def _tune(self, n_queries: int, observe: Observer) -> None:
        tuning = Tuning(self._optimizer, self._sampler, Budget(n_queries), time.monotonic())
        with one_blas_thread():
            tune(tuning, self._map, self._oracle, self._n_classes, observe)

"""Candidates that are evaluated on every batch of an epoch, at one query each.

    optimizer = Epochs(Cma(CmaConfig(population=15), start, rng), n_batches=12, most_candidates=416)

The inner optimizer gets the mean loss of the batches.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ztune.errors import ConfigError
from ztune.io.saved import Saved
from ztune.optim.nested import put_state
from ztune.types import F64, Evaluation, Json, Optimizer, Proposal, State

KEEPS = ("best", "mean", "running", "last")
BUDGET, CANDIDATES = "budget", "candidates"
"""Reasons of the end."""


class Epochs(Optimizer):
    """Evaluates a generation on `n_batches` batches, one proposal each, then tells the means.

    After `most_candidates` the run ends, for `stop_reason`; the last generation may have fewer,
    which the inner optimizer is not told. The recommendation is by `keep`:

    - best: the candidate with the lowest mean loss;
    - running: the one with the lowest running mean after any of its batches, as in the published
      BPT-VLM of ZIP's comparison, which compares after every batch;
    - last: the candidate evaluated last;
    - mean: that of the inner optimizer.
    """

    def __init__(
        self,
        inner: Optimizer,
        n_batches: int,
        most_candidates: int,
        keep: str = "best",
        stop_reason: str = CANDIDATES,
    ):
        if n_batches < 1 or most_candidates < 1:
            raise ConfigError(
                f"n_batches is {n_batches} and most_candidates {most_candidates}, expected at "
                "least 1"
            )
        if keep not in KEEPS:
            raise ConfigError(f'keep is "{keep}", expected one of {", ".join(KEEPS)}')
        self._inner, self._n_batches, self._keep = inner, n_batches, keep
        self._most, self._stop_reason = most_candidates, stop_reason
        self._n_candidates = 0
        self._kept = inner.recommend()
        self._lowest: float | None = None
        self._begin()

    def _begin(self) -> None:
        points = self._inner.ask().points
        self._points = points[: self._most - self._n_candidates]
        self._full = len(self._points) == len(points)
        self._n_done = 0  # batches
        self._sums = np.zeros(len(self._points))
        self._least = np.full(len(self._points), np.inf)  # running means

    def ask(self) -> Proposal:
        return Proposal(self._points.copy(), mid_step=self._n_done > 0)

    def tell(self, evaluation: Evaluation) -> None:
        self._n_done += 1
        self._sums += evaluation.losses
        means = self._sums / self._n_done
        self._least = np.minimum(self._least, means)
        if self._n_done < self._n_batches:
            return
        self._n_candidates += len(means)
        self._choose(self._least if self._keep == "running" else means)
        if self._full:
            self._inner.tell(replace(evaluation, losses=means, logits=None))
        if self.finished() is None:
            self._begin()

    def _choose(self, losses: F64) -> None:
        best = int(losses.argmin())
        if self._keep == "last":
            self._kept = self._points[-1].copy()
        elif self._lowest is None or losses[best] < self._lowest:
            self._kept, self._lowest = self._points[best].copy(), float(losses[best])

    def finished(self) -> str | None:
        return self._stop_reason if self._n_candidates >= self._most else None

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        return self._inner.probes(n_directions, rng)

    def recommend(self) -> F64:
        return self._inner.recommend() if self._keep == "mean" else np.array(self._kept)

    def state(self) -> State:
        arrays, values = put_state("inner", self._inner.state())
        arrays |= {"kept": self._kept.copy(), "sums": self._sums.copy()}
        # Infinite before the first batch, and a saved state is finite.
        arrays["least"] = np.where(np.isfinite(self._least), self._least, 0.0)
        more: dict[str, Json] = {
            "n_candidates": self._n_candidates,
            "n_done": self._n_done,
            "lowest": self._lowest,
        }
        return arrays, values | more

    def restore(self, state: State) -> None:
        saved = Saved(state)
        self._inner.restore(saved.inner("inner").state)
        self._n_candidates = saved.count("n_candidates", most=self._most)
        self._kept = saved.f64("kept", len(self._kept))
        self._lowest = None if saved.is_null("lowest") else saved.number("lowest")
        if self.finished() is not None:
            return
        self._begin()
        self._n_done = saved.count("n_done", most=self._n_batches - 1)
        if self._n_done:
            self._sums = saved.f64("sums", len(self._points))
            self._least = saved.f64("least", len(self._points))

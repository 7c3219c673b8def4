"""Signal against error: whether a method's differences of losses survive a precision's rounding.

A zeroth-order method lives off differences f(+) − f(−) of two computed losses (Spall 1992), and a
computed function is noisy (Moré and Wild 2011). Over random directions, at the method's own start,
perturbation and distribution, with f̂ as computed in the precision that tunes and f by a reference:

    signal = rms [f(+) − f(−)]      error = rms [(f̂(+) − f̂(−)) − (f(+) − f(−))]      both in nats

An estimate's variance grows by the factor 1 + (error / signal)², so the ratio says what a precision
costs: at 10 one query in a hundred, at 1 every other one. The signal is proportional to the
perturbation as long as that is small; the error hardly depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ztune.answers import top_k_logits
from ztune.objective import cross_entropy
from ztune.types import F32, F64, I64, Batch, Json, Optimizer, Oracle, PromptMap

N_DIRECTIONS = 8
"""Directions at least; whole rounds of the method's own size are measured."""
# Found by tuning at ratios from 0.1 to 10⁶ (benchmarks/signal.py, docs/precision.md): from 10 on
# every run came to what fp32 comes to, below 6 some did not; a ratio varies by two between seeds.
LIMIT = 10.0
# Beyond it losses bend: in the same measurements the ratio falls again, and tuning at 0.1 is worse
# in every precision.
_LARGEST_ADVISED = 0.03


@dataclass(frozen=True)
class Signal:
    """What one measurement gave."""

    n_directions: int
    signal: float
    """In nats."""
    error: float
    """In nats."""
    limit: float = LIMIT

    @property
    def ratio(self) -> float:
        return self.signal / self.error

    @property
    def passed(self) -> bool:
        return self.ratio >= self.limit

    @property
    def verdict(self) -> str:
        return "passed" if self.passed else "too weak"

    def perturbation_needed(self, perturbation: float) -> float | None:
        """Return an estimate of the perturbation that gives twice the limit, rounded up.

        None where even the limit takes one so large that the loss is not linear over it.
        """
        if not self.ratio > 0 or perturbation * self.limit / self.ratio > _LARGEST_ADVISED:
            return None
        wanted = perturbation * 2 * self.limit / self.ratio
        digit = 10.0 ** math.floor(math.log10(wanted))
        rounded = float(f"{math.ceil(wanted / digit * (1 - 1e-12)) * digit:.0e}")
        return min(rounded, _LARGEST_ADVISED)

    def to_json(self) -> dict[str, Json]:
        return {
            "n_directions": self.n_directions,
            "signal": self.signal,
            "error": self.error,
            "ratio": self.ratio,
            "limit": self.limit,
            "verdict": self.verdict,
        }


def compared(computed: F64, reference: F64) -> Signal:
    """Return the signal of losses f64[2 D], each direction's + before its −."""
    n_directions = len(reference) // 2
    exact = reference[0::2] - reference[1::2]
    error = _rms(computed[0::2] - computed[1::2] - exact)
    # No difference of two losses is known better than their own spacing.
    least = float(np.spacing(np.abs(reference).max()))
    return Signal(n_directions, _rms(exact), max(error, least))


def _rms(values: F64) -> float:
    return float(np.sqrt(np.mean(values**2)))


def measure(
    optimizer: Optimizer,
    prompt_map: PromptMap,
    oracle: Oracle,
    reference: Callable[[F32], F64],
    batch: Batch,
    rng: np.random.Generator,
) -> Signal:
    """Probe the first step's own perturbations, drawn from `rng`, on one batch.

    The optimizer stays as it is. `reference` returns the losses f64[P] of contexts f32[P, m, d] on
    the same batch, as exactly as they are to be had.
    """
    rounds = [prompt_map(points) for points in optimizer.probes(N_DIRECTIONS, rng)]
    computed = np.concatenate([oracle(prompts, batch).losses for prompts in rounds])
    contexts = [prompts.contexts for prompts in rounds if prompts.contexts is not None]
    return compared(computed, reference(np.concatenate(contexts)))


def probe_batch(n_pictures: int, batch_size: int, rng: np.random.Generator) -> Batch:
    """Return all pictures where they fit a batch, else a random one, in their first view."""
    n = min(n_pictures, batch_size)
    pictures = np.arange(n_pictures) if n == n_pictures else rng.permutation(n_pictures)[:n]
    return Batch(pictures.astype(np.int64), np.zeros(n, dtype=np.int64), 0)


def exact_losses(
    features: F32,
    labels: I64,
    texts: F64,
    logit_scale: float,
    logit_bias: float,
    top_classes: int | None = None,
) -> F64:
    """Return f64[P], the mean cross-entropy in nats, in double precision throughout.

    Shapes: features f32[N, e], labels i64[N], texts f64[P, C, e]. `top_classes` is of how many
    classes an answer tells the probabilities, where it is not of all.
    """
    wide = features.astype(np.float64)
    losses = []
    for text in texts:
        logits = logit_scale * (wide @ text.T) + logit_bias
        if top_classes is not None:
            logits = top_k_logits(logits, top_classes)
        losses.append(cross_entropy(logits, labels).mean())
    return np.array(losses)

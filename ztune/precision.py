"""Whether a precision leaves a signal: a method's differences of losses, against their rounding.


A zeroth-order method lives off differences f(+) − f(−) of two computed losses (Spall 1992), and a
computed function is noisy (Moré and Wild 2011). Over random directions, at the method's own start,
perturbation and distribution, with f̂ as computed in the precision that tunes and f by a reference:

    signal = rms [f(+) − f(−)]      error = rms [(f̂(+) − f̂(−)) − (f(+) − f(−))]      both in nats

An estimate's variance grows by the factor 1 + (error / signal)², so the ratio says what a precision
costs: at 10 one query in a hundred, at 1 every other one. The signal is proportional to the
perturbation as long as that is small; the error hardly depends on it.

A run below fp32 measures it before its first step, `ztune doctor` for any precision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import name_tokens
from runtimes.reference import REFERENCE_PRECISION, reference_features
from ztune.answers import top_k_logits
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.methods.base import TunedConfig
from ztune.model import Model
from ztune.objective import cross_entropy
from ztune.progress import Progress, warn
from ztune.types import F32, F64, I64, Batch, Json, Optimizer, Oracle, PromptMap

N_DIRECTIONS = 8
"""Directions at least; whole rounds of the method's own size are measured."""
# Found by tuning at ratios from 0.1 to 10⁶ (benchmarks/signal.py, docs/precision.md): from 10 on
# every run came to what fp32 comes to, below 6 some did not; a ratio varies by two between seeds.
LIMIT = 10.0
# Beyond it losses bend: in the same measurements the ratio falls again, and tuning at 0.1 is worse
# in every precision.
_LARGEST_ADVISED = 0.03
# At this ratio the differences are rounding and nothing else.
_NO_SIGNAL = 1.5


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


def probe_batch(n_images: int, batch_size: int, rng: np.random.Generator) -> Batch:
    """Return all images where they fit a batch, else a random one, in their first view."""
    n = min(n_images, batch_size)
    images = np.arange(n_images) if n == n_images else rng.permutation(n_images)[:n]
    return Batch(images.astype(np.int64), np.zeros(n, dtype=np.int64), 0)


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


@dataclass(frozen=True)
class SignalCheck:
    """What the signal is measured with besides the method's own parts."""

    model: Model
    classes: tuple[str, ...]
    seed: int
    reference: Bundle | None
    """Answers as it is; None: the bundle's own graph in higher precision."""

    def measure(
        self,
        config: TunedConfig,
        optimizer: Optimizer,
        prompt_map: PromptMap,
        oracle: Oracle,
        features: F32,
        labels: I64,
    ) -> tuple[Signal, dict[str, Json]]:
        """Return the signal on one batch of images f32[V, N, e], and what run.json keeps of it.

        Draws from a generator of its own: no other result depends on whether this was done.

        Raises: ZtuneError when the reference cannot be had.
        """
        started = time.monotonic()
        bundle = self.model.bundle
        rng = np.random.default_rng([self.seed, 4])
        n_images = config.images_of(len(labels), len(self.classes))
        batch = probe_batch(len(labels), n_images, rng)
        n_candidates = 0

        def exact(contexts: F32) -> F64:
            nonlocal n_candidates
            n_candidates = len(contexts)
            names = name_tokens(bundle.text, self.model.tokenizer, self.classes, contexts.shape[1])
            self.model.progress.remark("measuring the signal that tuning would live off")
            try:
                texts = reference_features(
                    self.reference or bundle,
                    names,
                    contexts,
                    config.round_size,
                    self.model.execution,
                    bundle_precision=self.reference is not None,
                )
            except ZtuneError as error:
                raise NoReferenceError(str(error)) from None
            seen = features[batch.views, batch.images]
            return exact_losses(
                seen,
                labels[batch.images],
                texts,
                bundle.logit_scale,
                bundle.logit_bias,
                config.top_classes,
            )

        signal = measure(optimizer, prompt_map, oracle, exact, batch, rng)
        finer = REFERENCE_PRECISION[bundle.precision]
        assert config.finest is not None
        setting, perturbation = config.finest
        return signal, {
            **signal.to_json(),
            "setting": setting,
            "perturbation": perturbation,
            "precision": bundle.precision,
            "provider": self.model.execution.provider,
            "reference": str(self.reference.path) if self.reference else f"own graph in {finer}",
            "probe_queries": n_candidates,
            "reference_forwards": n_candidates * len(self.classes),
            "seconds": round(time.monotonic() - started, 3),
        }


def open_reference(path: str | None, bundle: Bundle) -> Bundle | None:
    """Return the bundle that the signal is measured against, None for the bundle's own graph.

    Raises: ConfigError when it is another model's, not fp32, or nothing finer than `bundle`.
    """
    if path is None:
        return None
    try:
        reference = load_bundle(Path(path))
        reference.file("prompt.onnx")
    except FormatError as error:
        raise ConfigError(f"`reference`: {error}") from None
    if reference.model_id != bundle.model_id:
        raise ConfigError(
            f'`reference` "{path}" is of another model than "{bundle.path}" (name the fp32 bundle '
            "that it was derived from, or leave it out)"
        )
    if reference.precision != "fp32" or bundle.precision == "fp32":
        raise ConfigError(
            f'`reference` "{path}" is {reference.precision} for a bundle in {bundle.precision}, '
            "expected fp32 for one in int8 or fp16 (leave it out to use the bundle's own graph)"
        )
    return reference


def described(signal: Signal, document: Mapping[str, Any]) -> str:
    """Return the line that a person reads."""
    return (
        f"signal-to-noise {signal.ratio:.2g} in {document['precision']} ({signal.n_directions} "
        f"directions, {document['setting']} {document['perturbation']:g}; limit {signal.limit:g})"
    )


def advice(signal: Signal, document: Mapping[str, Any], published: float) -> str:
    """Return what to do about a signal below the limit; `published` is the setting's default."""
    setting, perturbation = document["setting"], document["perturbation"]
    ways = []
    if signal.ratio <= _NO_SIGNAL and perturbation < published:
        # Losses that differ by rounding alone do not say how far they would have to be apart.
        ways.append(f"the published {setting} (`settings` {setting}={published:g})")
    elif enough := signal.perturbation_needed(perturbation):
        ways.append(f"a larger {setting} (`settings` {setting}={enough:g})")
    if document["precision"] != "fp32":
        ways.append("the fp32 bundle")
    return f"use {' or '.join(ways)}" if ways else "no perturbation is likely to be large enough"


def require_signal(
    measured: Callable[[], tuple[Signal, dict[str, Json]]],
    *,
    published: float,
    force: bool,
    progress: Progress,
) -> dict[str, Json]:
    """Return what run.json keeps of the signal that `measured` gives; see `SignalCheck.measure`.

    `published` is the default of the setting that the signal depends on.

    Raises: RefusedError where it is below the limit or cannot be measured, and nobody forces it.
    """
    try:
        signal, document = measured()
    except NoReferenceError as error:
        document = {"verdict": "not measured", "reason": str(error), "forced": force}
        if not force:
            raise RefusedError(f"{error} (go on without it with `force`)", document) from None
        warn(f"signal-to-noise was not measured: {error}")
        return document
    progress.remark(described(signal, document))
    document["forced"] = force and not signal.passed
    if signal.passed:
        return document
    weak = (
        f"signal-to-noise is {signal.ratio:.2g} in {document['precision']}, below the limit of "
        f"{signal.limit:g}: rounding errors would steer the steps "
        f"({advice(signal, document, published)}"
    )
    if not force:
        raise RefusedError(f"{weak}, or go on with `force`)", document)
    warn(f"{weak})")
    return document


# Why a signal is not measured, and what to do about it.
ENCODED_ANEW = (
    "the signal of images that are encoded anew cannot be measured",
    "use the fp32 bundle",
)
SERVED = (
    "the signal of a server's model cannot be measured without a bundle here",
    "name the fp32 bundle with `reference`",
)


def unmeasured(reason: str, remedy: str, precision: str, *, force: bool) -> dict[str, Json]:
    """Return what run.json keeps of a signal that is not measured, and why.

    Raises: RefusedError below fp32, where rounding errors might steer, and nobody forces it.
    """
    document: dict[str, Json] = {"verdict": "not measured", "reason": reason, "forced": False}
    if precision == "fp32":
        return document
    if not force:
        raise RefusedError(
            f"{reason}, and the bundle is {precision} ({remedy}, or go on with `force`)",
            document,
        )
    warn(f"{reason}, and the bundle is {precision}")
    return {**document, "forced": True}


# Why none has to be measured.
NO_DIFFERENCES = "the method takes no differences of losses"
FULL_PRECISION = "fp32 leaves a signal far above the limit"


def leaves_enough(precision: str, provider: str, perturbation: float, published: float) -> bool:
    """Return whether a precision is known to leave enough signal at a perturbation.

    In fp32 the least ratio of any method at its published setting was 705 (rgf on the digits),
    against a limit of 10; it is proportional to the setting as long as that is small
    (docs/precision.md). TensorRT computes fp32 in TF32.
    """
    full = precision == "fp32" and provider in ("cpu", "cuda")
    return full and perturbation >= published / 10


def not_needed(reason: str) -> dict[str, Json]:
    """Return what run.json keeps of a signal that nobody need measure, and why."""
    return {"verdict": "not needed", "reason": reason, "forced": False}


class NoReferenceError(ZtuneError):
    """The reference could not be computed: nothing is known of the signal."""


class RefusedError(ZtuneError):
    """A run whose signal is too weak or unknown, with what was measured."""

    def __init__(self, message: str, document: dict[str, Json]):
        super().__init__(message)
        self.document = document

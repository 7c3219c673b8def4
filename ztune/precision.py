"""The signal-to-noise ratio of a precision: a method's loss differences against rounding errors.

A zeroth-order method uses differences f(+) − f(−) of two computed losses (Spall 1992), and a
computed function is noisy (Moré and Wild 2011). Over random directions, at the method's own start,
perturbation and distribution, with f̂ in the precision of tuning and f by a reference:

    signal = rms [f(+) − f(−)]      error = rms [(f̂(+) − f̂(−)) − (f(+) − f(−))]      both in nats

An estimate's variance grows by the factor 1 + (error / signal)², so the ratio gives the cost of a
precision: at 10 one query in a hundred, at 1 every other one. The signal is proportional to a small
perturbation; the error hardly depends on it.

A run below fp32 measures the ratio before its first step; `ztune doctor` for any precision.
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
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.methods.base import TunedConfig
from ztune.model import Model
from ztune.objective import cross_entropy
from ztune.progress import Progress, warn
from ztune.top_classes import top_k_logits
from ztune.types import F32, F64, I64, Batch, Json, Optimizer, Oracle, PromptMap

N_DIRECTIONS = 8
"""Minimum number of directions; whole rounds of the method are measured."""
# From tuning at ratios from 0.1 to 10⁶ (benchmarks/signal.py, docs/precision.md): from 10 every run
# reached fp32's result, below 6 some did not; a ratio varies by a factor of two between seeds.
LIMIT = 10.0
# Losses are not linear above it: in the same measurements the ratio falls again, and tuning at 0.1
# is worse in every precision.
_LARGEST_ADVISED = 0.03
# At this ratio the differences are rounding errors only.
_NO_SIGNAL = 1.5


@dataclass(frozen=True)
class Signal:
    """The result of one measurement."""

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
        """Estimate the perturbation for twice the limit, rounded up.

        None if even the limit needs one so large that the loss is not linear over it.
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


def compare_losses(computed: F64, reference: F64) -> Signal:
    """Return the signal of losses f64[2 D], + before − for each direction."""
    n_directions = len(reference) // 2
    exact = reference[0::2] - reference[1::2]
    error = _rms(computed[0::2] - computed[1::2] - exact)
    # A difference of two losses has at least the error of their floating-point spacing.
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
    """Measure the signal of the first step's perturbations, drawn from `rng`, on one batch.

    The optimizer does not change. `reference` returns the most precise losses f64[P] of contexts
    f32[P, m, d] on the same batch.
    """
    rounds = [prompt_map(points) for points in optimizer.probes(N_DIRECTIONS, rng)]
    computed = np.concatenate([oracle(prompts, batch).losses for prompts in rounds])
    contexts = [prompts.contexts for prompts in rounds if prompts.contexts is not None]
    return compare_losses(computed, reference(np.concatenate(contexts)))


def probe_batch(n_images: int, batch_size: int, rng: np.random.Generator) -> Batch:
    """Return a batch of all images, or random ones if they exceed the batch size, first view."""
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
    """Return the mean cross-entropy f64[P] in nats, computed in float64.

    Shapes: features f32[N, e], labels i64[N], texts f64[P, C, e]. `top_classes` is the number of
    classes whose probabilities an answer has; None: all.
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
    """Measures the signal of a method on a model."""

    model: Model
    classes: tuple[str, ...]
    seed: int
    reference: Bundle | None
    """The reference bundle; None: the bundle's own graph in higher precision."""

    def measure(
        self,
        config: TunedConfig,
        optimizer: Optimizer,
        prompt_map: PromptMap,
        oracle: Oracle,
        features: F32,
        labels: I64,
    ) -> tuple[Signal, dict[str, Json]]:
        """Return the signal on one batch of images f32[V, N, e], and its entry in run.json.

        It uses its own random generator, so other results do not depend on it.

        Raises: ZtuneError if the reference is not available.
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
            self.model.progress.remark("measuring the signal-to-noise ratio")
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
        assert config.perturbation_setting is not None
        setting, perturbation = config.perturbation_setting
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
    """Return the reference bundle of the signal, None for the bundle's own graph.

    Raises: ConfigError if it is another model's, not fp32, or not more precise than `bundle`.
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
            f'`reference` "{path}" has another model than "{bundle.path}" (name the fp32 bundle '
            "that it was derived from, or leave it out)"
        )
    if reference.precision != "fp32" or bundle.precision == "fp32":
        raise ConfigError(
            f'`reference` "{path}" is {reference.precision} for a bundle in {bundle.precision}, '
            "expected fp32 for one in int8 or fp16 (leave it out to use the bundle's own graph)"
        )
    return reference


def describe_signal(signal: Signal, document: Mapping[str, Any]) -> str:
    """Return the signal as a line of text."""
    return (
        f"signal-to-noise {signal.ratio:.2g} in {document['precision']} ({signal.n_directions} "
        f"directions, {document['setting']} {document['perturbation']:g}; limit {signal.limit:g})"
    )


def advice(signal: Signal, document: Mapping[str, Any], published: float) -> str:
    """Return a remedy for a signal below the limit; `published` is the setting's default."""
    setting, perturbation = document["setting"], document["perturbation"]
    ways = []
    if signal.ratio <= _NO_SIGNAL and perturbation < published:
        # Pure rounding errors do not allow an estimate of the perturbation needed.
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
    """Return the entry in run.json of the signal from `measured` (`SignalCheck.measure`).

    `published` is the default of the setting that the signal depends on.

    Raises: RefusedError if it is below the limit or cannot be measured, unless `force`.
    """
    try:
        signal, document = measured()
    except NoReferenceError as error:
        document = {"verdict": "not measured", "reason": str(error), "forced": force}
        if not force:
            raise RefusedError(f"{error} (continue without it with `force`)", document) from None
        warn(f"signal-to-noise was not measured: {error}")
        return document
    progress.remark(describe_signal(signal, document))
    document["forced"] = force and not signal.passed
    if signal.passed:
        return document
    weak = (
        f"signal-to-noise is {signal.ratio:.2g} in {document['precision']}, below the limit of "
        f"{signal.limit:g}: rounding errors would dominate the steps "
        f"({advice(signal, document, published)}"
    )
    if not force:
        raise RefusedError(f"{weak}, or continue with `force`)", document)
    warn(f"{weak})")
    return document


# Reasons for not measuring a signal, and remedies.
IMAGES_REENCODED = (
    "the signal cannot be measured when images are re-encoded",
    "use the fp32 bundle",
)
SERVED = (
    "the signal of a server's model cannot be measured without a local bundle",
    "name the fp32 bundle with `reference`",
)


def signal_unmeasured(reason: str, remedy: str, precision: str, *, force: bool) -> dict[str, Json]:
    """Return the entry in run.json of a signal that is not measured.

    Raises: RefusedError below fp32, where rounding errors might dominate, unless `force`.
    """
    document: dict[str, Json] = {"verdict": "not measured", "reason": reason, "forced": False}
    if precision == "fp32":
        return document
    if not force:
        raise RefusedError(
            f"{reason}, and the bundle is {precision} ({remedy}, or continue with `force`)",
            document,
        )
    warn(f"{reason}, and the bundle is {precision}")
    return {**document, "forced": True}


# Reasons for needing no measurement.
NO_DIFFERENCES = "the method uses no differences of losses"
FULL_PRECISION = "the signal in fp32 is far above the limit"


def precision_suffices(
    precision: str, provider: str, perturbation: float, published: float
) -> bool:
    """Return whether a precision is known to give enough signal at a perturbation.

    In fp32 the lowest ratio of any method at its published setting was 705 (rgf on the digits),
    against a limit of 10; it is proportional to small values of the setting (docs/precision.md).
    TensorRT computes fp32 in TF32.
    """
    full = precision == "fp32" and provider in ("cpu", "cuda")
    return full and perturbation >= published / 10


def signal_not_needed(reason: str) -> dict[str, Json]:
    """Return the entry in run.json of a signal that needs no measurement."""
    return {"verdict": "not needed", "reason": reason, "forced": False}


class NoReferenceError(ZtuneError):
    """The reference could not be computed, so the signal is unknown."""


class RefusedError(ZtuneError):
    """A run whose signal is too weak or unknown, with the measurement."""

    def __init__(self, message: str, document: dict[str, Json]):
        super().__init__(message)
        self.document = document

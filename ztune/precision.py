"""The signal gate: the first step's differences of losses, against a finer graph's, on the task.

`ztune tune` passes it before the first step, `ztune doctor` reports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import name_tokens
from runtimes.reference import FINER, reference_features
from ztune.compositions.base import TunedConfig
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.model import Workbench
from ztune.progress import Progress, warn
from ztune.signal import Signal, exact_losses, measure, probe_batch
from ztune.types import F32, F64, I64, Json, Optimizer, Oracle, PromptMap

# At this ratio the differences are rounding and nothing else.
_NO_SIGNAL = 1.5


@dataclass(frozen=True)
class Gate:
    """What the signal is measured with besides the method's own parts."""

    bench: Workbench
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
        """Return the signal on one batch of pictures f32[V, N, e], and what run.json keeps of it.

        Draws from a generator of its own: no other result depends on whether this was done.

        Raises: ZtuneError when the reference cannot be had.
        """
        started = time.monotonic()
        bundle = self.bench.bundle
        rng = np.random.default_rng([self.seed, 4])
        n_pictures = config.pictures_of(len(labels), len(self.classes))
        batch = probe_batch(len(labels), n_pictures, rng)
        n_candidates = 0

        def exact(contexts: F32) -> F64:
            nonlocal n_candidates
            n_candidates = len(contexts)
            names = name_tokens(bundle.text, self.bench.tokenizer, self.classes, contexts.shape[1])
            self.bench.progress.remark("measuring the signal that tuning would live off")
            try:
                texts = reference_features(
                    self.reference or bundle,
                    names,
                    contexts,
                    config.round_size,
                    self.bench.execution,
                    as_it_is=self.reference is not None,
                )
            except ZtuneError as error:
                raise NoReferenceError(str(error)) from None
            seen = features[batch.views, batch.pictures]
            return exact_losses(
                seen,
                labels[batch.pictures],
                texts,
                bundle.logit_scale,
                bundle.logit_bias,
                config.top_classes,
            )

        signal = measure(optimizer, prompt_map, oracle, exact, batch, rng)
        finer = FINER[bundle.precision]
        assert config.finest is not None
        setting, perturbation = config.finest
        return signal, {
            **signal.to_json(),
            "setting": setting,
            "perturbation": perturbation,
            "precision": bundle.precision,
            "provider": self.bench.execution.provider,
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
        raise ConfigError(f"--reference: {error}") from None
    if reference.model_id != bundle.model_id:
        raise ConfigError(
            f'--reference "{path}" is of another model than "{bundle.path}" (name the fp32 bundle '
            "that it was derived from, or leave it out)"
        )
    if reference.precision != "fp32" or bundle.precision == "fp32":
        raise ConfigError(
            f'--reference "{path}" is {reference.precision} for a bundle in {bundle.precision}, '
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
        ways.append(f"the published {setting} (--set {setting}={published:g})")
    elif enough := signal.perturbation_needed(perturbation):
        ways.append(f"a larger {setting} (--set {setting}={enough:g})")
    if document["precision"] != "fp32":
        ways.append("the fp32 bundle")
    return f"use {' or '.join(ways)}" if ways else "no perturbation is likely to be large enough"


def pass_gate(
    measured: Callable[[], tuple[Signal, dict[str, Json]]],
    *,
    published: float,
    force: bool,
    progress: Progress,
) -> dict[str, Json]:
    """Return what run.json keeps of the signal that `measured` gives; see `Gate.measure`.

    `published` is the default of the setting that the signal depends on.

    Raises: RefusedError where it is below the limit or cannot be measured, and nobody forces it.
    """
    try:
        signal, document = measured()
    except NoReferenceError as error:
        document = {"verdict": "not measured", "reason": str(error), "forced": force}
        if not force:
            raise RefusedError(f"{error} (go on without it with --force)", document) from None
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
        raise RefusedError(f"{weak}, or go on with --force)", document)
    warn(f"{weak})")
    return document


# Why a signal is not measured, and what to do about it.
ENCODED_ANEW = (
    "the signal of pictures that are encoded anew cannot be measured",
    "use the fp32 bundle",
)
SERVED = (
    "the signal of a server's model cannot be measured without a bundle here",
    "name the fp32 bundle with --reference",
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
            f"{reason}, and the bundle is {precision} ({remedy}, or go on with --force)",
            document,
        )
    warn(f"{reason}, and the bundle is {precision}")
    return {**document, "forced": True}


def no_differences() -> dict[str, Json]:
    """Return what run.json keeps of a method that compares no neighbouring points."""
    reason = "the method takes no differences of losses"
    return {"verdict": "not needed", "reason": reason, "forced": False}


class NoReferenceError(ZtuneError):
    """The reference could not be computed: nothing is known of the signal."""


class RefusedError(ZtuneError):
    """A run whose signal is too weak or unknown, with what was measured."""

    def __init__(self, message: str, document: dict[str, Json]):
        super().__init__(message)
        self.document = document

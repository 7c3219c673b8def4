"""The zero-shot classifier of the templates, the baseline of all methods."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.heads import Fitted, Shots, classifier_of
from ztune.methods.base import HeadMethod


@dataclass(frozen=True)
class ZeroShotConfig:
    """No settings."""


def fit_zero_shot(config: ZeroShotConfig, shots: Shots, seed: int) -> Fitted:
    """Return logits `scale f tᵀ + bias`, without using images or labels."""
    bias = np.full(shots.n_classes, shots.logit_bias)
    return Fitted(classifier_of(shots.zero_shot, bias), {})


METHOD = HeadMethod(
    name="zero-shot",
    title="hand-written prompts, one or an ensemble: nothing is tuned",
    paper="Radford et al., ICML 2021 (arXiv 2103.00020)",
    config=ZeroShotConfig,
    fit=fit_zero_shot,
    uses_images=False,
)

"""The best classifier that the images allow: an ensemble of heads and a mixture of prompts.

A mixture of random prompts is fitted to the images as in `ogn`. Its text features and the
hand-written ones are the priors of Gaussian discriminant analysis and of kernel ridge regression;
the four are calibrated on images that they were not fitted to, and averaged (`ztune.ensemble`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ztune.capabilities import CONTEXTS, FEATURES, LOGITS, LOSS, TEXTS
from ztune.errors import ConfigError
from ztune.methods.base import TunedMethod
from ztune.methods.ogn import OgnConfig


@dataclass(frozen=True)
class AutoConfig(OgnConfig):
    """Settings of the mixture; the heads choose their own on held-out images."""

    most_prompts: int | None = 300
    """Prompts after which the run ends; none: when the budget is spent."""
    needs = frozenset((LOSS, CONTEXTS, LOGITS, TEXTS, FEATURES))
    ensembles = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers != "logits":
            raise ConfigError(
                f"answers is {self.answers}, but auto reads features (use `method=ogn`)"
            )


METHOD = TunedMethod(
    name="auto",
    title="an ensemble of calibrated heads on features and a mixture of prompts",
    paper="ours (docs/research/auto.md)",
    config=AutoConfig,
)

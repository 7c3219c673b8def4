"""SPSA with gradient correction, the optimizer of BlackVIP, on the context's own values.

Source: Oh et al., "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", CVPR 2023
(arXiv 2303.14773).
"""

from __future__ import annotations

from dataclasses import dataclass

from ztune.methods.base import TunedMethod
from ztune.methods.spsa import DirectSpsaConfig


@dataclass(frozen=True)
class SpsaGcConfig(DirectSpsaConfig):
    """SPSA with gradient correction (BlackVIP's optimizer) on the context's values."""

    step_decay: float = 0.4
    perturbation_decay: float = 0.1
    momentum: float = 0.8


METHOD = TunedMethod(
    name="spsa-gc",
    title="simultaneous perturbation of the context's own values with gradient correction",
    paper="optimizer of BlackVIP, CVPR 2023 (arXiv 2303.14773)",
    config=SpsaGcConfig,
)

"""BlackVIP: an image-dependent visual prompt from a small decoder, tuned by SPSA-GC.

Source: Oh et al., "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning", CVPR 2023
(arXiv 2303.14773), with the settings of its comparison in ZIP (arXiv 2504.06838). The decoder is in
`runtimes/decoder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.capabilities import FEATURES, LOSS, PIXELS
from ztune.io.config import require
from ztune.maps import Pixels
from ztune.methods.base import (
    INITIAL,
    STEPS,
    Composition,
    ModelSpec,
    Preset,
    TunedConfig,
    TunedMethod,
)
from ztune.optim.spsa import Spsa, SpsaConfig


@dataclass(frozen=True)
class BlackVipConfig(SpsaConfig, TunedConfig):
    """SPSA with gradient correction, and without ZIP's clipping."""

    clip: bool = False
    momentum: float = 0.8
    batch_size: int | None = 128
    extractor: str | None = None
    """The decoder's feature extractor, an ONNX file; None: the bundle's image tower."""
    needs = frozenset((LOSS, PIXELS, FEATURES))
    program = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "batch_size")

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        start = spec.decoder_start(np.random.default_rng([seed, INITIAL]))
        return Pixels(start.shape), Spsa(self, start, np.random.default_rng([seed, STEPS]))


METHOD = TunedMethod(
    name="blackvip",
    title="an image-dependent visual prompt from a small decoder",
    paper="BlackVIP, CVPR 2023 (arXiv 2303.14773), with the settings of its comparison in ZIP",
    config=BlackVipConfig,
    presets={"published": Preset(views=16)},
)

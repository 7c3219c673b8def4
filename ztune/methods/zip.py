"""ZIP: SPSA on a low-rank latent, spread over each context token by its own Fastfood transform.

Source: Park et al., "ZIP: An Efficient Zeroth-order Prompt Tuning for Black-box Vision-Language
Models", ICLR 2025 (arXiv 2504.06838); Fastfood: Le, Sarlós, Smola, ICML 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.methods.base import MAP, STEPS, Composition, ModelSpec, Preset, TextStart, TunedMethod
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.types import F32, F64, I64, Prompts

_MOST_PER_TOKEN = 4096


def walsh_hadamard(x: F64) -> F64:
    """Return H x along the last axis, H un-normalised: H(Hx) = n x.

    Shape: f64[..., n] with n a power of two.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"Walsh-Hadamard needs a power of two, got {n}")
    out: F64 = x.copy()
    half = 1
    while half < n:
        pairs = out.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        left, right = pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]
        out = np.stack([left, right], axis=-2).reshape(x.shape)
        half *= 2
    return out


def fastfood(x: F64, signs: F64, permutation: I64, gaussian: F64, width: int) -> F64:
    """Return the first `width` values of H G Π H B x, scaled to keep norms in the mean.

    Shapes: x f64[..., q], signs B, permutation Π and gaussian G each [D], D >= q a power of two;
    returns f64[..., width].
    """
    D = len(signs)
    padded = np.zeros((*x.shape[:-1], D))
    padded[..., : x.shape[-1]] = x
    product = gaussian * walsh_hadamard(signs * padded)[..., permutation]
    divisor = np.sqrt(D * np.sum(gaussian**2)) * np.sqrt(width / D)
    return np.asarray(walsh_hadamard(product)[..., :width] / divisor)


class ZipMap:
    """W = U diag(s) Vᵀ + 1 vᵀ, then context_i = initial_i + Fastfood_i(W_i).

    The point is U f64[m, r], s f64[r], V f64[q, r], v f64[q] in this order, q = ⌊intrinsic/m⌋.
    """

    def __init__(self, initial: F32, intrinsic_dim: int, rank: int, rng: np.random.Generator):
        """Draw the fixed transforms for `initial` f32[m, d].

        Raises: ConfigError if intrinsic_dim gives no value per token, or too many.
        """
        m, d = initial.shape
        q = intrinsic_dim // m
        if not 1 <= q <= _MOST_PER_TOKEN:
            raise ConfigError(
                f"intrinsic_dim {intrinsic_dim} gives {q} values for each of {m} context tokens, "
                f"expected 1 to {_MOST_PER_TOKEN} (set intrinsic_dim between {m} and "
                f"{m * _MOST_PER_TOKEN})"
            )
        # The next power of two >= d, as published; q may be larger in a narrow tower.
        D = 1 << (max(d, q) - 1).bit_length()
        if rank < 1:
            raise ConfigError(f"rank is {rank}, expected at least 1")
        self.m, self.q, self.rank = m, q, rank
        self._initial = initial.astype(np.float64)
        # Fastfood is linear and fixed: its matrix is computed once, and a step is one product.
        self._basis = np.empty((m, q, d))
        for i in range(m):
            signs = rng.choice([-1.0, 1.0], size=D)
            permutation = rng.permutation(D)
            gaussian = rng.standard_normal(D)
            self._basis[i] = fastfood(np.eye(q), signs, permutation, gaussian, d)
        self._start_V = rng.standard_normal((q, rank))

    @property
    def dim(self) -> int:
        return int((self.m + 1 + self.q) * self.rank + self.q)

    def start(self) -> F64:
        """Return f64[dim] with U = 0, s = 1, V ~ N(0, 1), v = 0: the initial context itself."""
        zeros = np.zeros
        return np.concatenate(
            [zeros(self.m * self.rank), np.ones(self.rank), self._start_V.ravel(), zeros(self.q)]
        )

    def __call__(self, points: F64) -> Prompts:
        P, m, q, r = len(points), self.m, self.q, self.rank
        U, s, V, v = np.split(points, np.cumsum([m * r, r, q * r]), axis=1)
        scaled = U.reshape(P, m, r) * s[:, None, :]
        W = scaled @ V.reshape(P, q, r).transpose(0, 2, 1) + v[:, None, :]
        moved = np.matmul(W.transpose(1, 0, 2), self._basis).transpose(1, 0, 2)
        return Prompts(contexts=np.asarray(self._initial + moved, dtype=np.float32))


@dataclass(frozen=True)
class ZipConfig(SpsaConfig, TextStart):
    """ZIP's settings, with those of SpsaConfig."""

    n_context: int = 8
    init: str = "random"
    batch_size: int | None = 128
    intrinsic_dim: int = 500
    """Values before the low-rank split; q = ⌊intrinsic_dim / m⌋ per token."""
    rank: int = 5

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        SpsaConfig.__post_init__(self)
        require(self, 1, "rank", "intrinsic_dim")

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        rng = np.random.default_rng([seed, MAP])
        prompt_map = ZipMap(self.initial(spec, seed), self.intrinsic_dim, self.rank, rng)
        return prompt_map, Spsa(self, prompt_map.start(), np.random.default_rng([seed, STEPS]))


METHOD = TunedMethod(
    name="zip",
    title="low-rank, intrinsically clipped zeroth-order prompt tuning",
    paper="ZIP, ICLR 2025 (arXiv 2504.06838)",
    config=ZipConfig,
    presets={"published": Preset(views=16)},
)

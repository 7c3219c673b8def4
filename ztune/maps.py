"""Maps shared by several methods: onto contexts, and onto values that change pixels."""

from __future__ import annotations

import numpy as np

from ztune.errors import ConfigError
from ztune.types import F32, F64, Prompts

_MOST_BYTES = 4e9


def require_room(dim: int, n_outputs: int) -> None:
    """Check that a projection f64[dim, n_outputs] fits in memory.

    Raises: ConfigError.
    """
    n_bytes = 8.0 * dim * n_outputs
    if n_bytes > _MOST_BYTES:
        raise ConfigError(
            f"projecting {dim} values onto {n_outputs} takes {n_bytes / 1e9:.1f} GB, too much "
            "(use fewer values or tokens)"
        )


class DirectContext:
    """The identity: the point is the flattened context, f64[m · d]."""

    def __init__(self, initial: F32):
        """Start from `initial` f32[m, d]."""
        self._initial = initial

    @property
    def dim(self) -> int:
        return int(self._initial.size)

    def start(self) -> F64:
        return self._initial.astype(np.float64).ravel()

    def __call__(self, points: F64) -> Prompts:
        shape = (len(points), *self._initial.shape)
        return Prompts(contexts=points.reshape(shape).astype(np.float32))


class LinearContext:
    """context = initial + reshape(A z) with A f64[m · d, dim] fixed, N(0, std²).

    Source: Sun et al., "Black-Box Tuning for Language-Model-as-a-Service", ICML 2022, section 3.2.
    """

    def __init__(self, initial: F32, dim: int, std: float, rng: np.random.Generator):
        require_room(dim, initial.size)
        self._initial = initial.astype(np.float64)
        self._matrix = std * rng.standard_normal((dim, initial.size))  # Aᵀ

    @property
    def dim(self) -> int:
        return len(self._matrix)

    def start(self) -> F64:
        return np.zeros(self.dim)

    def __call__(self, points: F64) -> Prompts:
        moved = (points @ self._matrix).reshape(len(points), *self._initial.shape)
        return Prompts(contexts=(self._initial + moved).astype(np.float32))


class Pixels:
    """The point, reshaped to a border or a decoder's values."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape

    @property
    def dim(self) -> int:
        return int(np.prod(self._shape))

    def __call__(self, points: F64) -> Prompts:
        visual: F32 = points.reshape(len(points), *self._shape).astype(np.float32)
        return Prompts(visual=visual)

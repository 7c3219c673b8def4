"""Maps onto visual prompts: extra image tokens, or values that act on pixels as they are."""

from __future__ import annotations

import numpy as np

from ztune.maps.context import require_room
from ztune.types import F32, F64, PromptMap, Prompts


class LinearTokens:
    """tokens = reshape(A z) with A f64[n · w, dim] fixed, N(mean, std²).

    Source: Yu et al., "Black-Box Prompt Tuning for Vision-Language Model as a Service", IJCAI 2023.
    """

    def __init__(
        self, n_tokens: int, width: int, dim: int, mean: float, std: float, rng: np.random.Generator
    ):
        require_room(dim, n_tokens * width)
        self._shape = (n_tokens, width)
        self._matrix = mean + std * rng.standard_normal((dim, n_tokens * width))  # Aᵀ

    @property
    def dim(self) -> int:
        return len(self._matrix)

    def __call__(self, points: F64) -> Prompts:
        tokens = (points @ self._matrix).reshape(len(points), *self._shape)
        return Prompts(visual=tokens.astype(np.float32))


class Pixels:
    """The point itself, in the shape that acts on images: a border or a decoder's values."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape

    @property
    def dim(self) -> int:
        return int(np.prod(self._shape))

    def __call__(self, points: F64) -> Prompts:
        visual: F32 = points.reshape(len(points), *self._shape).astype(np.float32)
        return Prompts(visual=visual)


class TextAndImage:
    """A text map on the first values of the point, an image map on the others."""

    def __init__(self, text: PromptMap, image: PromptMap):
        self._text, self._image = text, image

    @property
    def dim(self) -> int:
        return self._text.dim + self._image.dim

    def __call__(self, points: F64) -> Prompts:
        text, image = np.split(points, [self._text.dim], axis=1)
        return Prompts(self._text(text).contexts, self._image(image).visual)

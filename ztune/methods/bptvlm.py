"""BPT-VLM: CMA-ES on a projected context and projected image tokens at once.

Source: Yu et al., "Black-Box Prompt Tuning for Vision-Language Model as a Service", IJCAI 2023,
with the settings of its comparison in ZIP (arXiv 2504.06838).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.artifact import MOST_TOKENS
from ztune.capabilities import CONTEXTS, IMAGE_TOKENS, LOSS, PIXELS
from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.maps import LinearContext, require_room
from ztune.methods.base import MAP, Composition, Generations, ModelSpec, Preset, TunedMethod
from ztune.types import F64, PromptMap, Prompts


class LinearTokens:
    """tokens = reshape(A z) with A f64[n · w, dim] fixed, N(mean, std²)."""

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


class TextAndImage:
    """A text map on the first values of the point and an image map on the others."""

    def __init__(self, text: PromptMap, image: PromptMap):
        self._text, self._image = text, image

    @property
    def dim(self) -> int:
        return self._text.dim + self._image.dim

    def __call__(self, points: F64) -> Prompts:
        text, image = np.split(points, [self._text.dim], axis=1)
        return Prompts(self._text(text).contexts, self._image(image).visual)


@dataclass(frozen=True)
class BptVlmConfig(Generations):
    """A generation of 15 over 2 · 2,000 values."""

    part: str = "both"
    """text, vision or both."""
    n_context: int = 5
    n_tokens: int = 5
    """Extra image tokens, after the patches."""
    text_dim: int = 2000
    vision_dim: int = 2000
    patch_values: int | None = 3072
    """Values of a patch in the scale of the image projection, those of a ViT-B/32 whatever the
    model; None: the model's own."""
    population: int | None = 15
    covariance: str = "separable"
    """The full covariance takes minutes per generation at 4,000 values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in ("text", "vision", "both"):
            raise ConfigError(f'part is "{self.part}", expected text, vision or both')
        require(self, 1, "n_context", "n_tokens", "text_dim", "vision_dim", "patch_values")
        if self.n_tokens > MOST_TOKENS:
            raise ConfigError(f"n_tokens is {self.n_tokens}, expected at most {MOST_TOKENS}")

    @property
    def needs(self) -> frozenset[str]:
        text = () if self.part == "vision" else (CONTEXTS,)
        image = () if self.part == "text" else (PIXELS, IMAGE_TOKENS)
        return frozenset((LOSS, *text, *image))

    @property
    def program(self) -> str | None:
        return None if self.part == "text" else "tokens"

    @property
    def n_values(self) -> int:
        text = 0 if self.part == "vision" else self.text_dim
        return text + (0 if self.part == "text" else self.vision_dim)

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        self.check_reach(queries)
        text, image = np.random.default_rng([seed, MAP]).spawn(2)
        maps: list[PromptMap] = []
        if self.part != "vision":
            no_prompt = np.zeros((self.n_context, spec.text_width), dtype=np.float32)
            std = spec.token_std / np.sqrt(self.text_dim)
            maps.append(LinearContext(no_prompt, self.text_dim, std, text))
        if self.part != "text":
            patches = spec.patches
            if patches is None:
                raise ConfigError(
                    "the image tower takes no extra tokens (export it with `image_tokens`)"
                )
            ratio = (self.patch_values or patches.n_values) / self.vision_dim
            mean, std = patches.mean * ratio, patches.std * np.sqrt(ratio)
            width = patches.width
            maps.append(LinearTokens(self.n_tokens, width, self.vision_dim, mean, std, image))
        prompt_map = TextAndImage(*maps) if len(maps) == 2 else maps[0]
        start = np.zeros(prompt_map.dim)
        return prompt_map, self.optimizer(start, spec.n_images, queries, seed)


METHOD = TunedMethod(
    name="bptvlm",
    title="CMA-ES on projected contexts and image tokens",
    paper="BPT-VLM, IJCAI 2023, with the settings of its comparison in ZIP",
    config=BptVlmConfig,
    # At most 1,000 epochs of one candidate, and their last generation to its end.
    presets={
        "published": Preset(
            {"batch_size": 128, "keep": "running", "most_candidates": 1005}, views=16
        )
    },
)

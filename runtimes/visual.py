"""Images under visual prompts: each candidate changes them, and they are encoded anew.

Calls hold so many images that memory stays bounded, and as many whatever the number of
candidates, so that a candidate's features do not depend on its company: a last call is filled up
with its own first image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from runtimes.bundle import IMAGE_PROMPTED, Bundle, ImageSpec
from runtimes.decoder import Decoder
from runtimes.ort import Graph
from runtimes.preprocess import normalise
from runtimes.providers import Execution, run_graph
from ztune.errors import ConfigError, FormatError
from ztune.types import F32, I64, U8, Batch

# Images of a call: their states take memory, and a GPU is to be kept busy.
_CHUNK_CPU, _CHUNK_GPU = 32, 128


class VisualPrompts(Protocol):
    """The image tower of a bundle under one kind of visual prompt."""

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        """Return unit features f32[P, N, e] of pixels u8[N, S, S, 3] as P candidates change them.

        `features` f32[N, k] are what a frozen extractor says of the images.

        Raises: ConfigError when a candidate has another shape than the model takes.
        """


def inner_side(size: int) -> int:
    """Return the side of the image inside a border: 194 of 224 (BAR), with equal margins."""
    return size - 2 * max(1, round(size * 15 / 224))


def normalised_border(visual: F32, spec: ImageSpec) -> F32:
    """Return the frame f32[3, S, S] of values f32[3, S, S]: sigmoid in 0…1, then normalised."""
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (spec.mean, spec.std))
    with np.errstate(over="ignore"):
        fraction = 1 / (1 + np.exp(-visual.astype(np.float64)))
    return np.asarray((fraction - mean) / std, dtype=np.float32)


def limits(spec: ImageSpec) -> tuple[F32, F32]:
    """Return black and white as the tower sees them, f32[3, 1, 1] each."""
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (spec.mean, spec.std))
    return np.asarray(-mean / std, np.float32), np.asarray((1 - mean) / std, np.float32)


class _Tower:
    """An image graph of the bundle, opened with the first images that it must see."""

    def __init__(self, bundle: Bundle, execution: Execution, name: str = "image"):
        self._bundle, self._execution, self._name = bundle, execution, name
        self._graph: Graph | None = None
        self._chunk = _CHUNK_CPU if execution.provider == "cpu" else _CHUNK_GPU
        if bundle.precision == "int8":
            # Activations are scaled over a whole call: an image has no company.
            self._chunk = 1

    def calls(self, n_images: int) -> Iterator[tuple[I64, I64]]:
        """Yield the images of one call after the other, bare and filled up to the usual size."""
        n_calls = -(-n_images // self._chunk)
        size = -(-n_images // n_calls)
        for first in range(0, n_images, size):
            filled = np.arange(first, first + size)
            rows = filled[filled < n_images]
            yield rows, np.where(filled < n_images, filled, first)

    def room(self, n_candidates: int, n_images: int) -> F32:
        """Return f32[P, N, e] to be filled."""
        return np.empty((n_candidates, n_images, self._bundle.embed_dim), dtype=np.float32)

    def __call__(self, pixels: F32, **others: F32) -> F32:
        """Return the graph's features of normalised pixels f32[N, 3, S, S] and its other inputs."""
        feeds = {"pixels": pixels, **others}
        if self._graph is None:
            calls = [
                {**feeds, "pixels": np.zeros((n, *pixels.shape[1:]), dtype=np.float32)}
                for n in (self._chunk, 1)
            ]
            self._graph = Graph(self._bundle, self._name, self._execution, calls)
        return run_graph(self._graph.session, self._graph.path, ["features"], feeds)[0]


class BorderPrompts:
    """A smaller image in the middle of tuned pixels f32[P, 3, S, S].

    Source: Tsai et al., "Transfer Learning without Knowing: Reprogramming Black-box Machine
    Learning Models with Scarce Data and Limited Resources" (BAR), ICML 2020.
    """

    def __init__(self, bundle: Bundle, execution: Execution):
        self._spec = bundle.image
        size = bundle.image.size
        self._margin = (size - inner_side(size)) // 2
        self._tower = _Tower(bundle, execution)

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        size = self._spec.size
        if visual.shape[1:] != (3, size, size):
            raise ConfigError(
                f"borders are f32{list(visual.shape)}, expected [P, 3, {size}, {size}]"
            )
        inside = slice(self._margin, size - self._margin)
        borders = [normalised_border(border, self._spec) for border in visual]
        encoded = self._tower.room(len(visual), len(pixels))
        for rows, filled in self._tower.calls(len(pixels)):
            shrunk = _shrunk(pixels[filled], size - 2 * self._margin, self._spec)
            small = normalise(shrunk, self._spec)
            canvas = np.empty((len(filled), 3, size, size), dtype=np.float32)
            for candidate, border in enumerate(borders):
                canvas[:] = border
                canvas[:, :, inside, inside] = small
                encoded[candidate, rows] = self._tower(canvas)[: len(rows)]
        return encoded


class DecoderPrompts:
    """What a decoder with tuned values f32[P, n] makes of a feature, added to its image.

    Source: Oh et al., "BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning",
    CVPR 2023: x' = clip(x + p), in normalised pixels.
    """

    def __init__(
        self,
        bundle: Bundle,
        execution: Execution,
        extractor_dim: int,
        statistics: F32 | None = None,
    ):
        """Open tower and decoder; its normalisation goes by `statistics` f32[2, 144].

        None: by the images of each call of `encode`, on which features then depend.
        """
        self._spec = bundle.image
        self._fixed = statistics
        self._decoder = Decoder(extractor_dim, bundle.image.size, execution)
        self._tower = _Tower(bundle, execution)

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        encoded = self._tower.room(len(visual), len(pixels))
        black, white = limits(self._spec)
        for candidate, values in enumerate(visual):
            added = self._added(values, features)
            for rows, filled in self._tower.calls(len(pixels)):
                changed = added(rows) + normalise(pixels[rows], self._spec)
                np.clip(changed, black, white, out=changed)
                changed = changed[filled - filled[0]]
                encoded[candidate, rows] = self._tower(changed)[: len(rows)]
        return encoded

    def fixed(self, statistics: F32) -> DecoderPrompts:
        """Return the same tower and decoder, normalising by `statistics` f32[2, 144]."""
        other = copy.copy(self)
        other._fixed = statistics
        return other

    def _added(self, values: F32, features: F32) -> Callable[[I64], F32]:
        """Return what gives the decoder's images f32[n, 3, S, S] of n rows of the features."""
        statistics = self._fixed
        if statistics is None and self._decoder.at_once(len(features)):
            return self._decoder.by_batch(values, features).__getitem__
        if statistics is None:
            statistics = self._decoder.statistics(values, features)
        return lambda rows: self._decoder(values, features[rows], statistics)

    def statistics(self, values: F32, features: F32) -> F32:
        """Return the normalisation f32[2, 144] of a decoder f32[n] over features f32[N, k]."""
        return self._decoder.statistics(values, features)


class TokenPrompts:
    """Tuned tokens f32[P, n, w] beside those of the image's patches.

    Source: Yu et al., "Black-Box Prompt Tuning for Vision-Language Model as a Service" (BPT-VLM),
    IJCAI 2023.
    """

    def __init__(self, bundle: Bundle, execution: Execution):
        """Open the image graph that takes tokens.

        Raises: FormatError when the bundle has none.
        """
        if bundle.visual is None:
            raise FormatError(
                f'bundle "{bundle.path}" has no {IMAGE_PROMPTED}: its image tower takes no tokens '
                "(export the model again with `image_tokens`)"
            )
        self._spec, self._width = bundle.image, bundle.visual.width
        self._tower = _Tower(bundle, execution, "image_prompted")

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        if not (visual.ndim == 3 and visual.shape[1] and visual.shape[2] == self._width):
            raise ConfigError(
                f"image tokens are f32{list(visual.shape)}, expected [P, n, {self._width}]"
            )
        encoded = self._tower.room(len(visual), len(pixels))
        for rows, filled in self._tower.calls(len(pixels)):
            ready = normalise(pixels[filled], self._spec)
            for candidate in range(len(visual)):
                tokens = np.ascontiguousarray(visual[candidate : candidate + 1], dtype=np.float32)
                encoded[candidate, rows] = self._tower(ready, tokens=tokens)[0, : len(rows)]
        return encoded


@dataclass(frozen=True)
class PromptedViews:
    """The images of a run and their views under visual prompts (a PromptedImages)."""

    prompts: VisualPrompts
    pixels: U8
    """u8[V, N, S, S, 3]"""
    features: F32
    """f32[V, N, k], a frozen extractor's."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        views, images = batch.views, batch.images
        return self.prompts.encode(visual, self.pixels[views, images], self.features[views, images])


@dataclass(frozen=True)
class DeployedImages:
    """Images under decoders as they would be deployed (a PromptedImages).

    A decoder then normalises by the images that it was tuned on, not by those that it sees.
    """

    prompts: DecoderPrompts
    pixels: U8
    """u8[V, N, S, S, 3]"""
    features: F32
    """f32[V, N, k], a frozen extractor's."""
    tuned_on: F32
    """f32[n, k], the same of the images that it is tuned on."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        encoded = []
        for values in visual:
            fixed = self.prompts.fixed(self.prompts.statistics(values, self.tuned_on))
            own = PromptedViews(fixed, self.pixels, self.features)
            encoded.append(own.encode(values[None], batch))
        return np.concatenate(encoded)


def _shrunk(pixels: U8, side: int, spec: ImageSpec) -> U8:
    """Return u8[N, side, side, 3] of u8[N, S, S, 3] by the model's own filter."""
    resample = Image.Resampling[spec.interpolation.upper()]
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((side, side), resample)) for one in pixels]
    )

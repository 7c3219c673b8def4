"""Encode images with visual prompts: each candidate changes the images before encoding.

The batch size bounds memory and does not depend on the number of candidates, so a candidate's
features do not depend on others; the last batch is padded with its first image.
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
from runtimes.preprocess import normalise, resize
from runtimes.providers import Execution, run_graph
from ztune.errors import ConfigError, FormatError
from ztune.types import F32, I64, U8, Batch

# Images per call.
_CHUNK_CPU, _CHUNK_GPU = 32, 128


class VisualPrompts(Protocol):
    """The image tower of a bundle with one kind of visual prompt."""

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        """Return unit features f32[P, N, e] of pixels u8[N, S, S, 3] with P visual prompts.

        `features` f32[N, k] are a frozen extractor's features of the images.

        Raises: ConfigError when a candidate has the wrong shape.
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
    """Return normalised black and white, f32[3, 1, 1] each."""
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (spec.mean, spec.std))
    return np.asarray(-mean / std, np.float32), np.asarray((1 - mean) / std, np.float32)


class _ImageTower:
    """An image graph of the bundle, opened with the first batch."""

    def __init__(self, bundle: Bundle, execution: Execution, name: str = "image"):
        self._bundle, self._execution, self._name = bundle, execution, name
        self._graph: Graph | None = None
        self._chunk = _CHUNK_CPU if execution.provider == "cpu" else _CHUNK_GPU
        if bundle.precision == "int8":
            # Activations are scaled over a whole call: encode images one at a time.
            self._chunk = 1

    def batches(self, n_images: int) -> Iterator[tuple[I64, I64]]:
        """Yield each batch's image indices, without and with padding to the batch size."""
        n_calls = -(-n_images // self._chunk)
        size = -(-n_images // n_calls)
        for first in range(0, n_images, size):
            filled = np.arange(first, first + size)
            rows = filled[filled < n_images]
            yield rows, np.where(filled < n_images, filled, first)

    def allocate(self, n_candidates: int, n_images: int) -> F32:
        """Return an uninitialised array f32[P, N, e]."""
        return np.empty((n_candidates, n_images, self._bundle.embed_dim), dtype=np.float32)

    def __call__(self, pixels: F32, **others: F32) -> F32:
        """Return the features of normalised pixels f32[N, 3, S, S] and other inputs."""
        feeds = {"pixels": pixels, **others}
        if self._graph is None:
            calls = [
                {**feeds, "pixels": np.zeros((n, *pixels.shape[1:]), dtype=np.float32)}
                for n in (self._chunk, 1)
            ]
            self._graph = Graph(self._bundle, self._name, self._execution, calls)
        return run_graph(self._graph.session, self._graph.path, ["features"], feeds)[0]


class BorderPrompts:
    """A shrunk image at the centre of tuned pixels f32[P, 3, S, S].

    Source: Tsai et al., "Transfer Learning without Knowing: Reprogramming Black-box Machine
    Learning Models with Scarce Data and Limited Resources" (BAR), ICML 2020.
    """

    def __init__(self, bundle: Bundle, execution: Execution):
        self._spec = bundle.image
        size = bundle.image.size
        self._margin = (size - inner_side(size)) // 2
        self._tower = _ImageTower(bundle, execution)

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        size = self._spec.size
        if visual.shape[1:] != (3, size, size):
            raise ConfigError(
                f"borders are f32{list(visual.shape)}, expected [P, 3, {size}, {size}]"
            )
        inside = slice(self._margin, size - self._margin)
        borders = [normalised_border(border, self._spec) for border in visual]
        encoded = self._tower.allocate(len(visual), len(pixels))
        for rows, filled in self._tower.batches(len(pixels)):
            shrunk = _shrink(pixels[filled], size - 2 * self._margin, self._spec)
            small = normalise(shrunk, self._spec)
            canvas = np.empty((len(filled), 3, size, size), dtype=np.float32)
            for candidate, border in enumerate(borders):
                canvas[:] = border
                canvas[:, :, inside, inside] = small
                encoded[candidate, rows] = self._tower(canvas)[: len(rows)]
        return encoded


class DecoderPrompts:
    """A perturbation of each image by a decoder with tuned values f32[P, n].

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
        """Open tower and decoder, which normalises by `statistics` f32[2, 144].

        None: by the images of each call of `encode`, on which features then depend.
        """
        self._spec = bundle.image
        self._statistics = statistics
        self._decoder = Decoder(extractor_dim, bundle.image.size, execution)
        self._tower = _ImageTower(bundle, execution)

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        encoded = self._tower.allocate(len(visual), len(pixels))
        black, white = limits(self._spec)
        for candidate, values in enumerate(visual):
            added = self._perturb(values, features)
            for rows, filled in self._tower.batches(len(pixels)):
                changed = added(rows) + normalise(pixels[rows], self._spec)
                np.clip(changed, black, white, out=changed)
                changed = changed[filled - filled[0]]
                encoded[candidate, rows] = self._tower(changed)[: len(rows)]
        return encoded

    def with_statistics(self, statistics: F32) -> DecoderPrompts:
        """Return a copy that normalises by `statistics` f32[2, 144]."""
        other = copy.copy(self)
        other._statistics = statistics
        return other

    def _perturb(self, values: F32, features: F32) -> Callable[[I64], F32]:
        """Return a function from n feature rows to the decoder's perturbations f32[n, 3, S, S]."""
        statistics = self._statistics
        if statistics is None and self._decoder.fits_one_call(len(features)):
            return self._decoder.decode_batch(values, features).__getitem__
        if statistics is None:
            statistics = self._decoder.statistics(values, features)
        return lambda rows: self._decoder(values, features[rows], statistics)

    def statistics(self, values: F32, features: F32) -> F32:
        """Return the normalisation f32[2, 144] of a decoder f32[n] over features f32[N, k]."""
        return self._decoder.statistics(values, features)


class TokenPrompts:
    """Tuned tokens f32[P, n, w] appended to those of the image's patches.

    Source: Yu et al., "Black-Box Prompt Tuning for Vision-Language Model as a Service" (BPT-VLM),
    IJCAI 2023.
    """

    def __init__(self, bundle: Bundle, execution: Execution):
        """Open the image graph that takes tokens.

        Raises: FormatError when the bundle has none.
        """
        if bundle.visual is None:
            raise FormatError(
                f'bundle "{bundle.path}" has no {IMAGE_PROMPTED} '
                "(export the model again with `image_tokens`)"
            )
        self._spec, self._width = bundle.image, bundle.visual.width
        self._tower = _ImageTower(bundle, execution, "image_prompted")

    def encode(self, visual: F32, pixels: U8, features: F32) -> F32:
        if not (visual.ndim == 3 and visual.shape[1] and visual.shape[2] == self._width):
            raise ConfigError(
                f"image tokens are f32{list(visual.shape)}, expected [P, n, {self._width}]"
            )
        encoded = self._tower.allocate(len(visual), len(pixels))
        for rows, filled in self._tower.batches(len(pixels)):
            ready = normalise(pixels[filled], self._spec)
            for candidate in range(len(visual)):
                tokens = np.ascontiguousarray(visual[candidate : candidate + 1], dtype=np.float32)
                encoded[candidate, rows] = self._tower(ready, tokens=tokens)[0, : len(rows)]
        return encoded


@dataclass(frozen=True)
class PromptedViews:
    """The images of a run and their views with visual prompts (a PromptedImages)."""

    prompts: VisualPrompts
    pixels: U8
    """u8[V, N, S, S, 3]"""
    features: F32
    """f32[V, N, k] of a frozen extractor."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        views, images = batch.views, batch.images
        return self.prompts.encode(visual, self.pixels[views, images], self.features[views, images])


@dataclass(frozen=True)
class DeployedImages:
    """Images with decoders as deployed (a PromptedImages).

    A deployed decoder normalises by the images that it was tuned on, not by its input.
    """

    prompts: DecoderPrompts
    pixels: U8
    """u8[V, N, S, S, 3]"""
    features: F32
    """f32[V, N, k] of a frozen extractor."""
    tuning_features: F32
    """f32[n, k] of the images that it is tuned on."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        encoded = []
        for values in visual:
            fixed = self.prompts.with_statistics(
                self.prompts.statistics(values, self.tuning_features)
            )
            own = PromptedViews(fixed, self.pixels, self.features)
            encoded.append(own.encode(values[None], batch))
        return np.concatenate(encoded)


def _shrink(pixels: U8, side: int, spec: ImageSpec) -> U8:
    """Resize u8[N, S, S, 3] to u8[N, side, side, 3] with the model's filter."""
    return np.stack([np.asarray(resize(Image.fromarray(one), side, side, spec)) for one in pixels])

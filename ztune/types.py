"""Array aliases and the interfaces as protocols; no logic.

Shapes are written `f32[P, C, e]` with P candidates, C classes, N images, m context tokens, d the
text width, e the embedding size, V cached views of an image and S the side of a square image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
TokenRows = NDArray[np.float32] | NDArray[np.float16]
"""A token table [vocabulary, d]."""
if TYPE_CHECKING:
    Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
else:
    Json = Any  # msgspec takes no recursive type


LEAST_AREA = 0.08
"""Torchvision's default, as in CoOp and ZIP."""


@dataclass(frozen=True)
class RandomView:
    """A random crop and flip of an image."""

    rng: np.random.Generator
    least_area: float = LEAST_AREA
    """The smallest share of the image's area."""


class ImageEncoder(Protocol):
    """Encodes images to unit features; the bytes do not depend on the other images of a call."""

    @property
    def identity(self) -> str:
        """All that affects features: weights, preprocessing, provider, precision, version."""

    def read(self, path: Path, view: RandomView | None) -> U8:
        """Return u8[S, S, 3]: the centre crop, or a random crop and flip drawn by `view`."""

    def encode(self, pixels: U8) -> F32:
        """Return unit features f32[N, e] of pixels u8[N, S, S, 3]."""


class PromptEncoder(Protocol):
    """Encodes contexts to the unit text features of fixed classes."""

    def encode(self, contexts: F32) -> F32:
        """Return f32[P, C, e] for contexts f32[P, m, d]."""


@dataclass(frozen=True)
class Prompts:
    """P candidates' inputs to the text tower, the image tower or both."""

    contexts: F32 | None = None
    """f32[P, m, d] before every class name; None: templates are used."""
    visual: F32 | None = None
    """f32[P, ...] under which images are re-encoded: image tokens [P, n, w], a border [P, 3, S, S]
    or a decoder's values [P, n]. None: images are unchanged."""

    def __len__(self) -> int:
        part = self.contexts if self.contexts is not None else self.visual
        return 0 if part is None else len(part)


class PromptedImages(Protocol):
    """The training images under visual prompts."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        """Return unit features f32[P, N, e] of a batch's images under each candidate."""


class PromptMap(Protocol):
    """Maps optimised values to prompts."""

    @property
    def dim(self) -> int:
        """The number of optimised values (δ in the papers)."""

    def __call__(self, points: F64) -> Prompts:
        """Return the prompts of P points f64[P, dim]."""


@dataclass(frozen=True)
class Proposal:
    """Points to evaluate on the same images, in one call."""

    points: F64
    """f64[P, dim], a copy of the optimizer's."""
    same_batch: bool = False
    """Keep the images of the previous round (a line search)."""
    mid_step: bool = False
    """Part of an unfinished step: the optimizer still recommends the previous point."""
    validation: bool = False
    """Evaluate on all validation images instead, as a charged validation pass."""


@dataclass(frozen=True)
class Batch:
    """The cached images of a step."""

    images: I64
    """i64[N]: rows of the feature table."""
    views: I64
    """i64[N]: the cached view of each."""
    number: int
    """The batch's number, from 1."""


@dataclass(frozen=True)
class Evaluation:
    """An oracle's answer to one proposal."""

    losses: F64
    """f64[P] in nats, mean over the images of the batch."""
    accuracies: F64
    """f64[P] in 0…1 on the images of the batch."""
    labels: I64
    """i64[N]."""
    batch_number: int
    logits: F32 | None = None
    """f32[P, N, C], or None if the oracle does not return them."""


@dataclass(frozen=True)
class Scores:
    """Losses and accuracies of candidates on one batch."""

    losses: F64
    """f64[P] in nats, mean over the images of the batch; not finite for a failed candidate."""
    accuracies: F64
    """f64[P] in 0…1."""
    logits: F32 | None = None
    """f32[P, N, C] if computed on the host."""


class Scorer(Protocol):
    """Computes losses of prompts: forward passes, then text against image features."""

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        """Score P candidates on a batch whose images have the labels i64[N]."""


class Oracle(Protocol):
    """Evaluates prompts with forward passes; the only access of a tuned method to the model."""

    def __call__(self, prompts: Prompts, batch: Batch) -> Evaluation:
        """Evaluate P candidates on one batch."""


@dataclass(frozen=True)
class Mixture:
    """A classifier of several prompts: its text features are Σ_j weights_j T(points_j)."""

    points: F64
    """f64[K, dim]"""
    weights: F64
    """f64[K], of any sign and sum."""


@dataclass(frozen=True)
class HeldOutWeights:
    """What a mixture's weights would be without some of the images they were fitted to."""

    weights: F64
    """f64[F, K]: without the images of each fold."""
    folds: I64
    """i64[N]: the fold of every image of the batch."""


State = tuple[Mapping[str, NDArray[Any]], Mapping[str, Json]]
"""The complete state of an optimizer or sampler: arrays by name and plain values by name."""


class Optimizer(Protocol):
    """Ask for points, tell their losses."""

    def ask(self) -> Proposal:
        """Return the next points; asking again gives the same."""

    def tell(self, evaluation: Evaluation) -> None:
        """Take the losses, in the order of `ask`."""

    def finished(self) -> str | None:
        """Return the stop reason, or None if there is more to ask."""
        return None

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        """Return rounds f64[R, P, dim] distributed as the next `ask`, drawn from `rng`.

        Each has pairs of points, + before −, whose loss differences the method uses; at least
        `n_directions` pairs in total. The optimizer does not change.
        """

    def recommend(self) -> F64:
        """Return f64[dim], the method's published choice."""

    def state(self) -> State:
        """Return the state for an exact resume."""

    def restore(self, state: State) -> None:
        """Restore a state saved by `state` with the same configuration."""


@runtime_checkable
class Mixing(Protocol):
    """An optimizer whose result is a mixture of points."""

    def mixture(self) -> Mixture:
        """Return the method's choice."""

    def held_out(self) -> HeldOutWeights | None:
        """Return the weights without each fold of the images; None if nothing can be held out."""

    def held_out_logits(self) -> tuple[F32, I64] | None:
        """Return each image's logits f32[N, C] by weights without it, and labels i64[N].

        None if nothing can be held out.
        """

    def fitted(self) -> tuple[float, float] | None:
        """Return training loss (nats) and accuracy of the last choice, if new."""

"""Array aliases and the seams of the house as protocols; no logic.

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
if TYPE_CHECKING:
    Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
else:
    Json = Any  # what reads documents takes no type that refers to itself


class ImageEncoder(Protocol):
    """Images to unit features, the same bytes whatever images share a call."""

    @property
    def identity(self) -> str:
        """All that changes a feature: weights, preprocessing, provider, precision, version."""

    def read(self, path: Path, view: np.random.Generator | None) -> U8:
        """Return u8[S, S, 3]: the centre crop, or a random crop and flip drawn from `view`."""

    def encode(self, pixels: U8) -> F32:
        """Return unit features f32[N, e] of pixels u8[N, S, S, 3]."""


class PromptEncoder(Protocol):
    """Contexts to the unit text features of the classes it was made for."""

    def encode(self, contexts: F32) -> F32:
        """Return f32[P, C, e] for contexts f32[P, m, d]."""


@dataclass(frozen=True)
class Prompts:
    """What P candidates change: the text tower's input, the image tower's, or both."""

    contexts: F32 | None = None
    """f32[P, m, d] before every class name; None where hand-written sentences stand instead."""
    visual: F32 | None = None
    """f32[P, ...] that changes the images, so that they are encoded anew: image tokens [P, n, w],
    a border [P, 3, S, S] or a decoder's values [P, n]. None leaves them as they are."""

    def __len__(self) -> int:
        part = self.contexts if self.contexts is not None else self.visual
        return 0 if part is None else len(part)


class PromptedImages(Protocol):
    """The training images under visual prompts."""

    def encode(self, visual: F32, batch: Batch) -> F32:
        """Return unit features f32[P, N, e] of a batch's images under each candidate."""


class PromptMap(Protocol):
    """From the optimised values to what is sent."""

    @property
    def dim(self) -> int:
        """How many values are optimised (δ in the papers)."""

    def __call__(self, points: F64) -> Prompts:
        """Return what P points f64[P, dim] send."""


@dataclass(frozen=True)
class Proposal:
    """Points to evaluate on the same images, in one call."""

    points: F64
    """f64[P, dim], a copy of the optimizer's own."""
    same_batch: bool = False
    """Keep the images of the round before (a line search)."""
    mid_step: bool = False
    """More of a step that was begun: what the optimizer recommends is still the point before it."""
    validation: bool = False
    """Evaluate on all validation images instead: a pass that steers, and is charged."""


@dataclass(frozen=True)
class Batch:
    """Which cached images a step sees."""

    images: I64
    """i64[N]: rows of the feature table."""
    views: I64
    """i64[N]: which cached view of each."""
    number: int
    """Counts the batches drawn, from 1."""


@dataclass(frozen=True)
class Evaluation:
    """What an oracle answers to one proposal."""

    losses: F64
    """f64[P] in nats, mean over the images of the batch."""
    accuracies: F64
    """f64[P] in 0…1 on the images of the batch."""
    labels: I64
    """i64[N]."""
    batch_number: int
    logits: F32 | None = None
    """f32[P, N, C] where the oracle gives them."""


@dataclass(frozen=True)
class Scores:
    """How well candidates classify one batch."""

    losses: F64
    """f64[P] in nats, mean over the images of the batch; not finite where a candidate broke."""
    accuracies: F64
    """f64[P] in 0…1."""
    logits: F32 | None = None
    """f32[P, N, C] where they were computed on the host."""


class Scorer(Protocol):
    """Prompts to losses: the forward passes, and the comparison of texts with images."""

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        """Score P candidates on a batch whose images have the labels i64[N]."""


class Oracle(Protocol):
    """Forward passes behind losses: the only thing that a tuned method may ask."""

    def __call__(self, prompts: Prompts, batch: Batch) -> Evaluation:
        """Evaluate P candidates on one batch."""


@dataclass(frozen=True)
class Mixture:
    """A classifier of several prompts: its text features are Σ_j weights_j T(points_j)."""

    points: F64
    """f64[K, dim]"""
    weights: F64
    """f64[K], of any sign and sum."""


State = tuple[Mapping[str, NDArray[Any]], Mapping[str, Json]]
"""Arrays by name and plain values by name: all of an optimizer or sampler, its generator too."""


class Optimizer(Protocol):
    """Ask for points, tell their losses; nothing else is known of the function."""

    def ask(self) -> Proposal:
        """Return the next points; asking again gives the same."""

    def tell(self, evaluation: Evaluation) -> None:
        """Take the answers in the order of ask."""

    def finished(self) -> str | None:
        """Return why there is nothing more to ask, None while there is."""
        return None

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        """Return rounds f64[R, P, dim] such as the next `ask` may give, drawn from `rng` instead.

        Each is pairs of points whose difference in loss the method lives off, + before −; together
        at least `n_directions` of them. The optimizer stays as it is.
        """

    def recommend(self) -> F64:
        """Return f64[dim], the method's published choice."""

    def state(self) -> State:
        """Return all that is needed to go on as if never stopped."""

    def restore(self, state: State) -> None:
        """Take over a state saved by `state` of the same configuration."""


@runtime_checkable
class Mixing(Protocol):
    """What an optimizer has whose result is no single point."""

    def mixture(self) -> Mixture:
        """Return the method's choice."""

    def fitted(self) -> tuple[float, float] | None:
        """Return loss (nats) and accuracy of the last choice on the training images, if new."""

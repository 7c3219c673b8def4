"""The few-shot loss as an oracle: image features against the text features of candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ztune.errors import ConfigError, NotFiniteError
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.types import (
    F32,
    F64,
    I64,
    Batch,
    Evaluation,
    PromptedImages,
    PromptEncoder,
    Prompts,
    Scorer,
    Scores,
    State,
)


def cross_entropy(logits: F32, labels: I64) -> F64:
    """Return f64[..., N]: −log softmax(logits)[label] in nats, computed in float64.

    Shapes: logits f32[..., N, C], labels i64[N].
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    chosen = wide[..., np.arange(len(labels)), labels]
    return np.asarray(np.log(np.exp(wide).sum(axis=-1)) - chosen)


Loss = Callable[[F32, I64], F64]
"""Maps logits f32[..., N, C] and labels i64[N] to losses f64[..., N] in nats."""


def focal_loss(gamma: float) -> Loss:
    """Return the loss −(1 − p)^γ log p of the label's probability p; γ = 0 is cross-entropy.

    Source: Lin et al., ICCV 2017, equation 4 (there with α = 1); BAR tunes with γ = 2.
    """
    return partial(_focal, gamma) if gamma else cross_entropy


def _focal(gamma: float, logits: F32, labels: I64) -> F64:
    losses = cross_entropy(logits, labels)
    return np.asarray((-np.expm1(-losses)) ** gamma * losses)


LOGITS_AT_ONCE = 20_000_000
"""About 25 bytes each during scoring: half a gigabyte. Larger calls return no logits."""


class NumpyScores:
    """Scores computed on the host (a Scorer)."""

    def __init__(
        self,
        encoder: PromptEncoder | F32,
        features: F32 | PromptedImages,
        logit_scale: float,
        logit_bias: float = 0.0,
        loss: Loss = cross_entropy,
    ):
        """Take sources of text and image features; logit_scale multiplies the cosines.

        Texts are an encoder of contexts, or the templates' unit features f32[C, e]; images are
        unit features f32[V, N, e], or an encoder under visual prompts.
        """
        self._texts = encoder
        self._features = features
        self._scale = np.float32(logit_scale)
        self._bias = np.float32(logit_bias)
        self._loss = loss

    @np.errstate(over="ignore", invalid="ignore")  # shows as a loss that is not finite
    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        texts = self._encoded_texts(prompts)
        # Large calls are scored in chunks of candidates and return no logits: those of 1,000
        # classes, 16,000 images and 40 candidates would take gigabytes.
        together = max(1, LOGITS_AT_ONCE // (len(labels) * texts.shape[1]))
        if together >= len(prompts):
            return self._scored(texts, prompts.visual, batch, labels)
        parts = []
        for first in range(0, len(prompts), together):
            some = slice(first, first + together)
            visual = None if prompts.visual is None else prompts.visual[some]
            own = texts if len(texts) == 1 else texts[some]
            parts.append(self._scored(own, visual, batch, labels))
        losses = np.concatenate([part.losses for part in parts])
        return Scores(losses, np.concatenate([part.accuracies for part in parts]))

    def _scored(self, texts: F32, visual: F32 | None, batch: Batch, labels: I64) -> Scores:
        """Score candidates with text features f32[P, C, e], or f32[1, C, e] for all."""
        if isinstance(self._features, np.ndarray):
            images = self._features[batch.views, batch.images]
            # One product for all candidates: with few classes, many small products are slow.
            cosines = images @ texts.reshape(-1, texts.shape[-1]).T
            cosines = cosines.reshape(len(images), *texts.shape[:2]).transpose(1, 0, 2)
        else:
            if visual is None:
                raise ConfigError("a method that changes images gave no visual prompts to score")
            cosines = self._features.encode(visual, batch) @ texts.transpose(0, 2, 1)
        logits = np.ascontiguousarray(self._scale * cosines + self._bias)
        losses = self._loss(logits, labels).mean(axis=-1)
        accuracies = (logits.argmax(axis=-1) == labels).mean(axis=-1)
        return Scores(losses, accuracies, logits)

    def _encoded_texts(self, prompts: Prompts) -> F32:
        """Return f32[P, C, e], or f32[1, C, e] if all candidates share the templates."""
        if isinstance(self._texts, np.ndarray):
            return self._texts[None]
        if prompts.contexts is None:
            raise ConfigError("a method that tunes text gave no contexts to encode")
        return self._texts.encode(prompts.contexts)


class FewShotObjective:
    """Softmax cross-entropy over the classes, whatever loss the model was trained with."""

    def __init__(self, scorer: Scorer, labels: I64):
        """Take a scorer and the labels i64[N] of all its images."""
        self._scorer = scorer
        self._labels = labels

    def __call__(self, prompts: Prompts, batch: Batch) -> Evaluation:
        """Evaluate P candidates on one batch.

        Raises: NotFiniteError naming a candidate whose loss or logits are not finite.
        """
        labels = self._labels[batch.images]
        scores = self._scorer(prompts, batch, labels)
        losses = scores.losses
        if not np.isfinite(losses).all():
            worst = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise NotFiniteError(
                f"batch {batch.number}, candidate {worst + 1} of {len(losses)}: the loss is "
                f"{losses[worst]} (smaller steps, or fp32 graphs, may help; ztune doctor checks "
                "this machine)",
                worst,
            )
        if scores.logits is not None and not np.isfinite(scores.logits).all():
            finite = np.isfinite(scores.logits).all(axis=(1, 2))
            worst = int(np.flatnonzero(~finite)[0])
            raise NotFiniteError(
                f"batch {batch.number}, candidate {worst + 1} of {len(losses)}: its logits are not "
                "finite (matrix products may be wrong on this machine: run ztune doctor)",
                worst,
            )
        return Evaluation(losses, scores.accuracies, labels, batch.number, scores.logits)


def required_logits(evaluation: Evaluation) -> F32:
    """Return the logits f32[P, N, C] of an evaluation.

    Raises: ConfigError if the oracle returned losses only.
    """
    if evaluation.logits is None:
        raise ConfigError("the method needs the logits of every image, got losses only")
    return evaluation.logits


class BatchSampler:
    """Batches of images: all of them if they fit, else a new order each epoch.

    An epoch's incomplete last batch is dropped, as in the published loops.
    """

    def __init__(self, n_images: int, batch_size: int, n_views: int, rng: np.random.Generator):
        self._n_images = n_images
        self._size = min(batch_size, n_images)
        self._n_views = n_views
        self._rng = rng
        self._order = np.arange(n_images, dtype=np.int64)
        self._position = n_images  # the first draw shuffles
        self._number = 0
        self._current: Batch | None = None

    def next(self) -> Batch:
        if self._size < self._n_images and self._position + self._size > self._n_images:
            self._order = self._rng.permutation(self._n_images).astype(np.int64)
            self._position = 0
        start = self._position if self._size < self._n_images else 0
        images = self._order[start : start + self._size].copy()
        self._position = start + self._size
        views = self._rng.integers(self._n_views, size=self._size, dtype=np.int64)
        self._number += 1
        self._current = Batch(images, views, self._number)
        return self._current

    def current(self) -> Batch:
        """Return the last batch again, for a line search."""
        return self._current or self.next()

    def state(self) -> State:
        current = self._current
        arrays = {"order": self._order}
        if current is not None:
            arrays |= {"images": current.images, "views": current.views}
        return arrays, {
            "position": self._position,
            "number": self._number,
            "generator": generator_to_json(self._rng),
        }

    def restore(self, state: State) -> None:
        saved, n = Saved(state), self._n_images
        self._order = saved.indices("order", n, n)
        saved.require(len(np.unique(self._order)) == n, "order", "each image once")
        self._position = saved.count("position", most=n)
        self._number = saved.count("number")
        self._rng = saved.generator()
        if self._number or "images" in saved or "views" in saved:
            images = saved.indices("images", n, self._size)
            views = saved.indices("views", self._n_views, self._size)
            self._current = Batch(images, views, self._number)

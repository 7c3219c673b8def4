"""A mixture of prompts: an exact Gauss–Newton step between prompts instead of along one.

Near a context c, Gauss–Newton replaces the logits of c + Σ_k a_k v_k by Z(c) + Σ_k a_k G_k, which
holds only for short steps, since the text tower is not linear. A classifier of several prompts'
text features has no such limit. With W = Σ_j w_j T(c_j), an image's logits are Σ_j w_j Z(c_j) for
any w, so the weights that minimise the cross-entropy of the labelled images solve a convex problem
on logits queried once (`ztune.optim.convex`). Distant prompts work better than neighbours: they are
random tokens of the vocabulary before the class name, as in Roth et al., "Waffling around for
performance", ICCV 2023, which averages such prompts without labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztune.errors import ConfigError
from ztune.io.config import require
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.methods.answers import AnswersConfig
from ztune.methods.base import STEPS, Composition, ModelSpec, Preset, TunedMethod
from ztune.objective import cross_entropy, required_logits
from ztune.optim.convex import SoftmaxProblem
from ztune.optim.logit_span import LogitSpan
from ztune.optim.ridge_path import cross_validate_ridge, fold_of_each
from ztune.types import (
    F32,
    F64,
    I64,
    Evaluation,
    HeldOutWeights,
    Mixture,
    Prompts,
    Proposal,
    State,
    TokenRows,
)

PROMPTS = "prompts"
"""The stop reason after most_prompts prompts."""
STALLED = "held-out loss"
"""The stop reason when the loss on held-out images no longer falls by least_gain."""
_JUDGED_EVERY = 50  # prompts: a fit takes as long as a few of them
_LOOKS = 2  # without a gain
_SHORT_TOKENS = 0.01  # of a byte-pair vocabulary, at its start, are single characters
_LONG_FIT = 1e9  # products in a curvature: about 20 ms, and a fit has two dozen
_TOKENS = 4  # per random prompt, by default
_LEAST_RANK = 40  # the rank is reduced in favour of images down to this


class VocabularyContext:
    """context = table[point], with integer token ids f64[m]."""

    def __init__(self, table: TokenRows, n_tokens: int):
        """Take the token table [vocabulary, d] and m."""
        self._table = table
        self._n_tokens = n_tokens

    @property
    def dim(self) -> int:
        return self._n_tokens

    def __call__(self, points: F64) -> Prompts:
        return Prompts(contexts=np.asarray(self._table[points.astype(np.int64)], np.float32))


@dataclass(frozen=True)
class OgnConfig(AnswersConfig):
    """Random prompts, weighted by a convex fit to the training images' logits."""

    ridge: float | None = None
    """Ridge on the weights, relative to the logits' mean square; none: by cross-validation."""
    tolerance: float = 2.5
    """Standard errors by which lighter ridges may be worse on held-out images."""
    n_prompts: int = 10
    """Prompts per round; the first round includes the initial prompt."""
    most_prompts: int | None = 1000
    """Prompts after which the run ends; none: when the budget is spent."""
    least_gain: float | None = 0.005
    """Nats by which the held-out loss falls within 100 prompts, else the run ends; none: never."""
    rank: int = 160
    """Dimensions of the span of the prompts' logits in which weights are fitted."""
    memory_mb: float = 512.0
    """Memory of the kept logits in units of 10⁶ bytes; a fit needs about as much again."""
    init: str = "a photo of a"
    """Text of the first prompt; `random`: none."""
    n_context: int | None = None
    """m of the random prompts with init=random; none: 4."""
    batch_size: int | None = None
    """Images, the same in all rounds; none: as many as fit in memory_mb."""
    mixes, perturbation_setting = True, None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 1, "n_prompts", "rank", "most_prompts", "n_context", "batch_size")
        require(self, 0, "memory_mb", "ridge", above=True)
        require(self, 0, "tolerance", "least_gain")
        if self.n_context is not None and self.init != "random":
            raise ConfigError(
                "n_context requires init=random: otherwise the text of init defines it"
            )

    @property
    def round_size(self) -> int:
        return self.n_prompts

    def images_of(self, n_images: int, n_classes: int) -> int:
        rows = 2 * min(self.rank, _LEAST_RANK) + self.n_prompts
        return self.images_within(n_images, n_classes, self.memory_mb, rows)

    def step_queries(self) -> int:
        return self.n_prompts

    def spends(self, queries: int) -> int:
        if self.most_prompts is None:
            return queries
        return min(queries, self.n_prompts * math.ceil(self.most_prompts / self.n_prompts))

    def rank_of(self, n_logits: int) -> int:
        """Return the rank that memory allows for so many logits per prompt."""
        rows = int(self.memory_mb * 1e6) // (4 * max(1, n_logits))
        return max(1, min(self.rank, (rows - self.n_prompts) // 2))

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        words = None if self.init == "random" else spec.ids_of_words(self.init)
        n_tokens = (self.n_context or _TOKENS) if words is None else len(words)
        rng = np.random.default_rng([seed, STEPS])
        budget = self.spends(queries)
        optimizer = PromptMixture(self, words, n_tokens, spec.words(), budget, rng)
        return VocabularyContext(spec.token_table, n_tokens), optimizer


class PromptMixture:
    """Asks for random prompts and fits weights to all of them.

    Points are token ids f64[m]. The first prompt is the initial text, if any. Weights start from
    the mean of that prompt and the mean of all, regularised by the ridge.
    """

    def __init__(
        self,
        config: OgnConfig,
        words: I64 | None,
        n_tokens: int,
        vocabulary: I64,
        budget: int,
        rng: np.random.Generator,
    ):
        """Take the initial text's token ids i64[m] or None, m, and the ids to draw from.

        `budget` defines the last round. `vocabulary` i64[v] is sorted by frequency, as byte-pair
        vocabularies are.
        """
        self._config = config
        self._words = words
        self._n_tokens = n_tokens
        self._vocabulary = vocabulary
        self._n_rounds = budget // config.n_prompts
        self._rng = rng
        self._prompts = np.zeros((0, n_tokens))
        self._span = LogitSpan.empty(config.rank)
        self._first = np.zeros((0, 0), np.float32)
        self._labels: I64 = np.zeros(0, np.int64)
        self._held_out_losses = np.zeros(0)
        self._next = self._drawn()
        self._choice: Choice | None = None

    def _drawn(self) -> F64:
        """Return the token ids f64[P, m] of the next round.

        Log-uniform in the rank, which approximates word frequencies in texts (Zipf).
        """
        shape = (self._config.n_prompts, self._n_tokens)
        least = max(1.0, _SHORT_TOKENS * len(self._vocabulary))
        ranks = np.exp(self._rng.uniform(np.log(least), np.log(len(self._vocabulary)), shape))
        drawn = self._vocabulary[ranks.astype(np.int64)].astype(np.float64)
        if self._words is not None and not len(self._prompts):
            drawn[0] = self._words
        return drawn

    def ask(self) -> Proposal:
        return Proposal(self._next.copy(), same_batch=len(self._prompts) > 0)

    def tell(self, evaluation: Evaluation) -> None:
        logits = required_logits(evaluation)
        if not len(self._prompts):
            self._labels = evaluation.labels.copy()
            self._span = LogitSpan.empty(self._config.rank_of(logits[0].size))
            self._first = logits[0] - logits[0].mean(axis=-1, keepdims=True)
        self._span.add(logits)
        self._prompts = np.concatenate([self._prompts, self._next])
        self._next = self._drawn()
        self._choice = None
        K, P = len(self._prompts), len(logits)
        if self._config.least_gain is not None and K // _JUDGED_EVERY > (K - P) // _JUDGED_EVERY:
            held_out = self._chosen().held_out
            if held_out is not None:
                loss = cross_entropy(held_out, self._labels).mean()
                self._held_out_losses = np.append(self._held_out_losses, loss)

    def finished(self) -> str | None:
        most, least_gain = self._config.most_prompts, self._config.least_gain
        if most is not None and len(self._prompts) >= most:
            return PROMPTS
        before, lately = self._held_out_losses[:-_LOOKS], self._held_out_losses[-_LOOKS:]
        if least_gain is None or not len(before):
            return None
        return STALLED if before.min() - lately.min() < least_gain else None

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        raise ConfigError(
            "a mixture of prompts compares no neighbouring points, so it has no probes"
        )

    def recommend(self) -> F64:
        """Return f64[m], the prompt with the largest weight, which is not the method's result."""
        mixture = self.mixture()
        return np.array(mixture.points[mixture.weights.argmax()])

    def mixture(self) -> Mixture:
        """Return all prompts and their weights; before the first answer the initial prompt."""
        if not len(self._prompts):
            return Mixture(self._next[:1].copy(), np.ones(1))
        return Mixture(self._prompts.copy(), self._chosen().weights.copy())

    def held_out(self) -> HeldOutWeights | None:
        """Return the weights without each fold of the images; None if nothing can be held out."""
        if not len(self._prompts):
            return None
        without, folds = self._chosen().without, fold_of_each(self._labels)
        return None if folds is None else HeldOutWeights(without, folds)

    def held_out_logits(self) -> tuple[F32, I64] | None:
        """Return each image's logits f32[N, C] by weights without it, and labels i64[N].

        Logits have no shift that all classes share. None if nothing can be held out.
        """
        held_out = self._chosen().held_out if len(self._prompts) else None
        return None if held_out is None else (held_out, self._labels.copy())

    def fitted(self) -> tuple[float, float] | None:
        """Return training loss and accuracy after 1, 2, 4, 8… rounds and the last.

        None otherwise, or before the end if a fit would take seconds (many images and classes). For
        an ensemble, which has no curve: after the rounds whose weights were fitted anyway.
        """
        n_rounds = len(self._prompts) // self._config.n_prompts
        r = min(self._span.rank, len(self._prompts))
        long = r * r * self._span.total.size > _LONG_FIT
        ended = n_rounds >= self._n_rounds or self.finished() is not None
        due = not long and not n_rounds & (n_rounds - 1)
        if self._config.ensembles:
            due = self._choice is not None
        if n_rounds == 0 or not (ended or due):
            return None
        choice = self._chosen()
        return choice.loss, choice.accuracy

    def _chosen(self) -> Choice:
        if self._choice is None:
            self._choice = self._fit()
        return self._choice

    def _fit(self) -> Choice:
        n_prompts = len(self._prompts)
        mean = self._span.total / n_prompts
        start = np.full(n_prompts, 1 / n_prompts)
        base = mean
        if self._words is not None:
            base = (base + self._first) / 2
            start /= 2
            start[0] += 0.5
        basis, mixing = self._span.contrasts()
        problem = SoftmaxProblem(base.astype(np.float32), basis, self._labels)
        c = self._config
        found = cross_validate_ridge(problem, self._span.mean_square, c.ridge, c.tolerance)
        logits = problem.logits(found.whole)
        loss = float(cross_entropy(logits, self._labels).mean())
        accuracy = float((logits.argmax(axis=-1) == self._labels).mean())
        without = np.array([start + mixing @ b for b in found.without])
        return Choice(start + mixing @ found.whole, loss, accuracy, without, found.held_out)

    def state(self) -> State:
        span = self._span
        arrays: dict[str, NDArray[Any]] = {
            "prompts": self._prompts,
            "next": self._next,
            "rows": span.rows,
            "mixing": span.mixing,
            "total": span.total,
            "first": self._first,
            "labels": self._labels,
            "held_out_losses": self._held_out_losses,
        }
        return arrays, {"squares": span.squares, "generator": generator_to_json(self._rng)}

    def restore(self, state: State) -> None:
        saved = Saved(state)
        self._prompts = saved.f64("prompts", None, self._n_tokens)
        self._next = saved.f64("next", self._config.n_prompts, self._n_tokens)
        known = self._vocabulary if self._words is None else [*self._vocabulary, *self._words]
        for name, ids in (("prompts", self._prompts), ("next", self._next)):
            saved.require(bool(np.isin(ids, known).all()), name, "token ids of the vocabulary")
        K, P = len(self._prompts), self._config.n_prompts
        saved.require(K % P == 0, "prompts", f"a multiple of {P} prompts")
        total = saved.f64("total", None, None)
        (N, C), rank = total.shape, self._config.rank_of(total.size)
        saved.require((K > 0) == (N > 0) == (C > 0), "total", f"the logits of {K} prompts")
        rows = saved.f32("rows", None, N, C)
        least, most = min(K, 1), min(K, 2 * rank)
        saved.require(least <= len(rows) <= most, "rows", f"{least} to {most} rows")
        mixing = saved.f64("mixing", K, len(rows))
        self._span = LogitSpan(rank, rows, mixing, total, saved.number("squares", 0))
        self._first = saved.f32("first", N, C)
        self._labels = saved.indices("labels", C, N)
        self._held_out_losses = saved.f64("held_out_losses", None)
        n, most = len(self._held_out_losses), K // _JUDGED_EVERY
        saved.require(n <= most, "held_out_losses", f"at most {most} losses")
        self._rng = saved.generator()
        self._choice = None


@dataclass(frozen=True)
class Choice:
    """Weights of all prompts, and their training loss and accuracy."""

    weights: F64
    loss: float
    """In nats."""
    accuracy: float
    without: F64
    """f64[F, K]: the weights without each fold of the images."""
    held_out: F32 | None
    """f32[N, C]: the logits of each image by the weights without it; None without folds."""


METHOD = TunedMethod(
    name="ogn",
    title="random prompts mixed by Gauss–Newton in the space of logits",
    paper="ours (docs/research/ogn.md)",
    config=OgnConfig,
    presets={"tuned": Preset({"init": "random", "n_context": 8})},
)

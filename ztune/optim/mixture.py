"""A mixture of prompts: the Gauss–Newton step taken exactly, between prompts instead of along one.

Near a context c, Gauss–Newton replaces the logits of c + Σ_k a_k v_k by Z(c) + Σ_k a_k G_k, which
is true only for short steps: the text tower bends. A classifier made of several prompts' text
features has no such limit. With W = Σ_j w_j T(c_j), a picture's logits are Σ_j w_j Z(c_j), whatever
w, so the weights that minimise the cross-entropy of the labelled pictures come from a convex
problem on logits that were paid for once (`ztune.optim.convex`). Prompts far apart serve better
than neighbours: they are random tokens of the vocabulary around the class name, as in Roth et al.,
"Waffling around for performance", ICCV 2023, which averages such prompts without labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztune.errors import ConfigError
from ztune.generator import generator_from_json, generator_to_json
from ztune.objective import cross_entropy
from ztune.optim.convex import SoftmaxProblem, Terms, total
from ztune.types import F32, F64, I64, Evaluation, Mixture, Proposal, State

# Relative to the mean square of the prompts' logits; from one where nothing moves to one where the
# training pictures alone decide.
_RIDGES = 10.0 ** np.arange(1, -4.6, -0.5)
_N_FOLDS = 4
_STEPS_PER_RIDGE = 2  # each starts where the heavier ridge's ended
_NEWTON_STEPS = 16  # for a ridge alone
_LONG_FIT = 1e9  # products in a curvature: some 20 ms, of which a fit has two dozen
_WITHOUT_FOLDS = 0.1  # the ridge where a class has one picture
_SHORT_TOKENS = 0.01  # of a byte-pair vocabulary are single characters, at its beginning
_NEGLIGIBLE = 1e-5  # share of the logits' energy outside the basis
_LEAST_ENERGY = 1e-30  # of logits that tell no class from another


@dataclass(frozen=True)
class MixtureConfig:
    """How many prompts a round asks for, and how their weights are found."""

    n_prompts: int = 10
    """Of one round; the first has the words of the start among them."""
    most_prompts: int | None = 1000
    """After which the run ends; none: the budget alone says when."""
    rank: int = 160
    """Dimensions of the span of the prompts' logits that weights are sought in."""
    ridge: float | None = None
    """On the weights, relative to the logits' mean square; none: by cross-validation."""
    tolerance: float = 2.5
    """Standard errors by which lighter ridges may be worse on held-out pictures and still count."""

    def __post_init__(self) -> None:
        for name in ("n_prompts", "rank", "most_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.ridge is not None and not self.ridge > 0:
            raise ConfigError(f"ridge is {self.ridge}, expected more than 0")
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance is {self.tolerance}, expected 0 or more")


@dataclass
class LogitSpan:
    """Logits of K prompts on the same pictures, kept as at most 2 · rank combinations of them."""

    rank: int
    rows: F32
    """f32[R, N, C]: Σ_j mixing[j, r] Z_j, each Z_j centred over the classes."""
    mixing: F64
    """f64[K, R], orthonormal columns."""
    total: F64
    """f64[N, C]: Σ_j Z_j."""
    squares: float
    """Sum of the squares of all logits."""

    @classmethod
    def empty(cls, rank: int) -> LogitSpan:
        return cls(rank, np.zeros((0, 0, 0), np.float32), np.zeros((0, 0)), np.zeros((0, 0)), 0.0)

    def add(self, logits: F32) -> None:
        """Take the logits f32[P, N, C] of further prompts."""
        new = logits - logits.mean(axis=-1, keepdims=True)
        self.squares += float((new.astype(np.float64) ** 2).sum())
        if not len(self.mixing):
            self.total = np.zeros(new.shape[1:])
            self.rows = np.zeros((0, *new.shape[1:]), np.float32)
        self.total = self.total + new.sum(axis=0, dtype=np.float64)
        (K, R), P = self.mixing.shape, len(new)
        mixing = np.zeros((K + P, R + P))
        mixing[:K, :R], mixing[K:, R:] = self.mixing, np.eye(P)
        self.mixing, self.rows = mixing, np.concatenate([self.rows, new])
        if len(self.rows) > 2 * self.rank:
            turn = self._principal()
            self.rows, self.mixing = _combined(turn, self.rows), self.mixing @ turn

    def _principal(self) -> F64:
        """Return f64[R, r], the combinations of rows with the most energy, at most `rank`."""
        flat = self.rows.reshape(len(self.rows), -1)
        values, vectors = np.linalg.eigh((flat @ flat.T).astype(np.float64))
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        left_over = 1 - np.cumsum(values) / max(float(values.sum()), _LEAST_ENERGY)
        enough = int((left_over > _NEGLIGIBLE).sum()) + 1
        return np.ascontiguousarray(vectors[:, : min(self.rank, enough)])

    def reduced(self) -> tuple[F32, F64]:
        """Return the basis f32[r, N, C] and its mixing f64[K, r]."""
        turn = self._principal()
        return _combined(turn, self.rows), self.mixing @ turn

    @property
    def mean_square(self) -> float:
        return self.squares / (len(self.mixing) * self.total.size)


def _combined(turn: F64, rows: F32) -> F32:
    flat = turn.T.astype(np.float32) @ rows.reshape(len(rows), -1)
    return np.asarray(flat.reshape(-1, *rows.shape[1:]))


class PromptMixture:
    """Asks for random prompts; its choice are the weights of all that were answered.

    Points are token ids f64[m]. The first prompt is the start's words, where there are any. Weights
    start from the mean of that prompt and the mean of all, and move from there as far as the ridge
    lets them.
    """

    def __init__(
        self,
        config: MixtureConfig,
        words: I64 | None,
        n_tokens: int,
        vocabulary: I64,
        rng: np.random.Generator,
    ):
        """Take the token ids i64[m] of the start's words or None, m, and the ids to draw from.

        `vocabulary` i64[v] is sorted by frequency, as byte-pair vocabularies are.
        """
        self._config = config
        self._words = words
        self._n_tokens = n_tokens
        self._vocabulary = vocabulary
        self._rng = rng
        self._prompts = np.zeros((0, n_tokens))
        self._span = LogitSpan.empty(config.rank)
        self._first = np.zeros((0, 0), np.float32)
        self._labels: I64 = np.zeros(0, np.int64)
        self._next = self._drawn()
        self._choice: Choice | None = None

    def _drawn(self) -> F64:
        """Return the token ids f64[P, m] of the next round.

        Log-uniform in the rank, which gives every word about the share that it has in texts (Zipf).
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
            self._first = logits[0] - logits[0].mean(axis=-1, keepdims=True)
        self._span.add(logits)
        self._prompts = np.concatenate([self._prompts, self._next])
        self._next = self._drawn()
        self._choice = None

    def finished(self) -> str | None:
        most = self._config.most_prompts
        return "prompts" if most is not None and len(self._prompts) >= most else None

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        raise ConfigError("a mixture of prompts compares no neighbouring points: nothing to probe")

    def recommend(self) -> F64:
        """Return f64[m], the prompt with the largest weight."""
        mixture = self.mixture()
        return np.array(mixture.points[mixture.weights.argmax()])

    def mixture(self) -> Mixture:
        """Return all prompts and their weights; before the first answer the start alone."""
        if not len(self._prompts):
            return Mixture(self._next[:1].copy(), np.ones(1))
        return Mixture(self._prompts.copy(), self._chosen().weights.copy())

    def fitted(self) -> tuple[float, float] | None:
        """Return loss and accuracy on the training pictures, after 1, 2, 4, 8… rounds.

        None in between, and where the fit would take seconds: many pictures and classes.
        """
        n_rounds = len(self._prompts) // self._config.n_prompts
        if n_rounds == 0 or n_rounds & (n_rounds - 1):
            return None
        r = min(self._config.rank, len(self._prompts))
        if r * r * self._span.total.size > _LONG_FIT:
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
        basis, mixing = self._span.reduced()
        problem = SoftmaxProblem(base.astype(np.float32), basis, self._labels)
        b = cross_validated(problem, self._span.mean_square, self._config)
        logits = problem.logits(b)
        loss = float(cross_entropy(logits, self._labels).mean())
        accuracy = float((logits.argmax(axis=-1) == self._labels).mean())
        return Choice(start + mixing @ b, loss, accuracy)

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
        }
        return arrays, {"squares": span.squares, "generator": generator_to_json(self._rng)}

    def restore(self, state: State) -> None:
        arrays, values = state
        self._prompts = np.array(arrays["prompts"], dtype=np.float64)
        self._next = np.array(arrays["next"], dtype=np.float64)
        self._first = np.array(arrays["first"], dtype=np.float32)
        self._labels = np.array(arrays["labels"], dtype=np.int64)
        self._span = LogitSpan(
            self._config.rank,
            np.array(arrays["rows"], dtype=np.float32),
            np.array(arrays["mixing"], dtype=np.float64),
            np.array(arrays["total"], dtype=np.float64),
            float(str(values["squares"])),
        )
        self._rng = generator_from_json(values["generator"])
        self._choice = None


@dataclass(frozen=True)
class Choice:
    """Weights of all prompts, and how well they do on the training pictures."""

    weights: F64
    loss: float
    """In nats."""
    accuracy: float


def required_logits(evaluation: Evaluation) -> F32:
    """Return the logits f32[P, N, C] of an evaluation.

    Raises: ConfigError where the oracle gave losses alone.
    """
    if evaluation.logits is None:
        raise ConfigError("the method needs the logits of every picture, and got losses alone")
    return evaluation.logits


def cross_validated(problem: SoftmaxProblem, unit: float, config: MixtureConfig) -> F64:
    """Return the mean f64[r] of the solutions that held-out pictures cannot tell from the best.

    Ridges are tried from the heaviest on, in units of `unit`, the directions' mean square. What a
    fold's pictures lose when they are left out is estimated by one Newton step away from the
    solution with all pictures (Beirami et al., NeurIPS 2017), which costs no fit for each fold. The
    mean is over the best ridge and all lighter ones whose mean loss is within `tolerance` standard
    errors (paired, over pictures): the heavy end is safe, the light end fits the training pictures.
    """
    r = len(problem.directions)
    eye, a = np.eye(r), np.zeros(r)
    folds = fold_of_each(problem.labels)
    if config.ridge is not None or folds is None:
        share = config.ridge if config.ridge is not None else _WITHOUT_FOLDS
        return problem.minimise(share * unit * eye, a, _NEWTON_STEPS)
    parts = [problem.rows(folds == k) for k in range(int(folds.max()) + 1)]
    terms = [part.terms(a) for part in parts]
    tried: list[tuple[F64, F64]] = []
    for share in _RIDGES:
        ridge = share * unit * eye
        for _ in range(_STEPS_PER_RIDGE):
            a, _ = problem.stepped(a, total(terms), ridge)
            terms = [part.terms(a) for part in parts]
        losses = _held_out_losses(parts, terms, folds, a, ridge)
        tried.append((a, losses))
        best = min((one for _, one in tried), key=lambda one: float(one.mean()))
        if not _within(losses, best, config.tolerance):
            break
    first = next(i for i, (_, losses) in enumerate(tried) if losses is best)
    near = [one for one, losses in tried[first:] if _within(losses, best, config.tolerance)]
    return np.asarray(np.mean(near, axis=0))


def _held_out_losses(
    parts: list[SoftmaxProblem], terms: list[Terms], folds: I64, a: F64, ridge: F64
) -> F64:
    """Return f64[N], the loss of every picture had its fold been left out of the solution a."""
    whole = total(terms)
    losses = np.empty(len(folds))
    for k, (part, own) in enumerate(zip(parts, terms, strict=True)):
        without = a + (whole - own).step(a, ridge)
        losses[folds == k] = cross_entropy(part.logits(without), part.labels)
    return losses


def _within(losses: F64, best: F64, tolerance: float) -> bool:
    """Say whether a ridge is at most `tolerance` standard errors worse than the best."""
    excess = losses - best
    return bool(excess.mean() <= tolerance * excess.std() / np.sqrt(len(excess)))


def fold_of_each(labels: I64) -> I64 | None:
    """Return the fold i64[N] of every picture, as even over the classes as can be.

    None where most classes have a single picture: leaving it out leaves nothing of its class.
    """
    _, counts = np.unique(labels, return_counts=True)
    n_folds = min(_N_FOLDS, int(np.median(counts)))
    if n_folds < 2:
        return None
    folds = np.empty(len(labels), dtype=np.int64)
    # Class by class, so that a class's pictures are spread over the folds.
    folds[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % n_folds
    return folds

"""Gauss–Newton in the space of logits: probes measure the Jacobian, softmax gives the curvature.

The black box returns logits Z(c) of all images, and the loss is their cross-entropy. A round
is two proposals on the same images, K and 3 queries:

1. Probes c + ε v_k, v_k orthonormal and orthogonal to the directions kept, measure rows of the
   Jacobian, G_k = (Z(c + ε v_k) − Z(c)) / ε.
2. Trials c + Σ_k a_k b_k over all directions b kept, one for each of three dampings λ:

       a = argmin meanᵢ CE(Zᵢ + Σ_k a_k G_kᵢ, yᵢ) + ½ aᵀ (λ τ² I + h P) a,

   a convex problem without queries. The best one is accepted if its loss is lower.

Rows of earlier rounds were measured at other points. A Kalman filter updates them: given the
answers, the rows are normal about G, with a covariance P over directions that is the same for each
logit. A step a adds the drift q ‖a‖² I to P. The change of the logits along the best trial measures
and corrects a G (a secant update), and its deviation from the prediction by P and q adapts q.

τ² is the mean square of G, which makes λ dimensionless. h is the mean over the images of
tr(diag p − p pᵀ): ½ h aᵀ P a is the loss from an error of variance aᵀ P a in each logit.

Sources: Cartis and Roberts, Math. Prog. Comp. 11, 2019 (derivative-free Gauss–Newton); Marquardt
1963 (λ); Schraudolph, Neural Computation 14, 2002 (the convex problem); Kalman 1960 (P). The loop:

    optimizer = GaussNewton(OgnContextConfig(), start, np.random.default_rng(1))
    for _ in range(80):
        optimizer.tell(oracle(to_contexts(optimizer.ask().points), batch))
    best = optimizer.recommend()
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztune.errors import ConfigError, FormatError
from ztune.io.config import require
from ztune.io.generator import generator_to_json
from ztune.io.saved import Saved
from ztune.maps import DirectContext
from ztune.methods.answers import AnswersConfig
from ztune.methods.base import STEPS, Composition, ModelSpec, TextStart, TunedMethod
from ztune.objective import required_logits
from ztune.optim.convex import SoftmaxProblem, softmax
from ztune.types import F32, F64, I64, Evaluation, Optimizer, Proposal, State

_TRIALS = ((0.25, 4), (1.0, 2), (4.0, 2))
"""Factor on λ and number of Newton steps per trial; each is warm-started from the last."""
_ROUNDS_KEPT = 4
"""Minimum number of Jacobian rows that the filter needs."""
_REFUSED = 16.0
"""Factor on λ if no trial improved."""
_DAMPINGS = 1e-8, 1e4
_SCALE_MEMORY = 0.7
"""Weight of the old τ² in the new."""
_LEAST_SCALE = 1e-12
"""Minimum of τ²: constant logits would leave the convex problem without curvature."""
_FIRST_DRIFT = 0.3
"""Initial q, as a fraction of τ²."""
_MOST = 1e32
"""Limit of saved numbers, so that their products do not overflow."""
_SURPRISES = 0.25, 4.0
"""Limits of the ratio of a trial's squared error to the prediction."""


@dataclass(frozen=True)
class OgnContextConfig(AnswersConfig, TextStart):
    """Defaults from ztune's measurements; the method is unpublished."""

    n_context: int = 8
    init: str = "random"
    init_std: float = 0.005
    n_directions: int = 10
    """K: probes per round of n_directions + 3 queries (the first: one more)."""
    perturbation: float = 0.01
    """ε: the length of a probe's step."""
    damping: float = 1e-3
    """λ in the first round, in units of the mean square of G."""
    memory: int = 120
    """Maximum number of directions kept, including this round's; those of least variance stay."""
    memory_mb: float = 256.0
    """Limit on G, f32[H, N, C] for H directions, in units of 10⁶ bytes: it reduces H, but not
    below n_directions."""
    kalman: bool = True
    """Keep directions between rounds; otherwise plain Gauss–Newton."""

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        AnswersConfig.__post_init__(self)
        require(self, 1, "n_directions")
        require(self, 0, "perturbation", "damping", "memory_mb", above=True)
        if self.memory < self.n_directions:
            raise ConfigError(
                f"memory is {self.memory}, expected at least n_directions ({self.n_directions})"
            )

    @property
    def perturbation_setting(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return max(self.n_directions + 1, len(_TRIALS))

    def images_of(self, n_images: int, n_classes: int) -> int:
        rows = _ROUNDS_KEPT * self.n_directions
        return self.images_within(n_images, n_classes, self.memory_mb, rows)

    def step_queries(self) -> int:
        return self.n_directions + 1 + len(_TRIALS)

    def build(self, spec: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(spec, seed))
        rng = np.random.default_rng([seed, STEPS])
        return prompt_map, GaussNewton(self, prompt_map.start(), rng)


class GaussNewton(Optimizer):
    """c ← c + Σ_k a_k b_k with a from the convex problem above, if that lowers the loss."""

    def __init__(self, config: OgnContextConfig, start: F64, rng: np.random.Generator):
        self._config = config
        self._rng = rng
        self._n_probes = min(config.n_directions, len(start))
        self._point = start.astype(np.float64)  # c
        self._loss = 0.0
        self._logits: F32 | None = None  # Z f32[N, C], None before the first answer
        self._damping = config.damping  # λ
        self._scale = 0.0  # τ²
        self._drift = 0.0  # q
        self._directions = np.zeros((0, len(start)))  # B f64[H, δ], this round's last
        self._covariance = np.zeros((0, 0))  # P f64[H, H]
        # G f32[capacity, N C], of which H rows are in use; allocated once, since it may be large.
        self._jacobian = np.zeros((0, 0), np.float32)
        self._steps: F64 | None = None  # a f64[trials, H], None while the probes are due
        self._begin_round()

    def _capacity(self) -> int:
        """Return the maximum number of directions in memory."""
        c = self._config
        if self._logits is None or not c.kalman:
            return self._n_probes
        fitting = c.memory_mb * 1e6 / (4 * self._logits.size)
        return max(self._n_probes, int(min(c.memory, fitting, len(self._point))))

    def _begin_round(self) -> None:
        """Drop directions beyond the capacity and draw the next probes."""
        room = self._capacity() - self._n_probes
        if len(self._directions) > room:
            kept = np.sort(np.argsort(np.diag(self._covariance), kind="stable")[:room])
            self._directions = self._directions[kept]
            self._covariance = self._covariance[np.ix_(kept, kept)]
            for new, old in enumerate(kept):  # in place, and new <= old
                self._jacobian[new] = self._jacobian[old]
        drawn = self._draw(self._rng, self._directions)
        self._directions = np.concatenate([self._directions, drawn])
        # No variance: measurements at c are exact.
        self._covariance = np.pad(self._covariance, (0, self._n_probes))
        self._steps = None

    def _draw(self, rng: np.random.Generator, kept: F64) -> F64:
        """Return random orthonormal v f64[K, δ], orthogonal to the kept directions."""
        drawn = rng.standard_normal((self._n_probes, len(self._point)))
        for _ in range(2):  # twice, for rounding errors
            drawn -= drawn @ kept.T @ kept
        return np.ascontiguousarray(np.linalg.qr(drawn.T)[0].T)

    def ask(self) -> Proposal:
        if self._steps is not None:
            points = self._point + self._steps @ self._directions
            return Proposal(points, same_batch=True, mid_step=True)
        moves = self._config.perturbation * self._directions[-self._n_probes :]
        if self._logits is None:
            moves = np.concatenate([np.zeros((1, len(self._point))), moves])
        # Logits are compared across rounds, so all use the images of the first.
        return Proposal(self._point + moves, same_batch=self._logits is not None)

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        kept = self._directions[: -self._n_probes]
        rounds = []
        for _ in range(-(-n_directions // self._n_probes)):
            moved = self._point + self._config.perturbation * self._draw(rng, kept)
            pairs = np.stack([moved, np.broadcast_to(self._point, moved.shape)], axis=1)
            rounds.append(pairs.reshape(-1, len(self._point)))
        return np.stack(rounds)

    def tell(self, evaluation: Evaluation) -> None:
        """Take the answers in the order of `ask`.

        Raises: ConfigError without logits.
        """
        logits = required_logits(evaluation)
        if self._logits is not None and logits.shape[1:] != self._logits.shape:
            raise FormatError(
                f"the saved logits are those of {list(self._logits.shape)} images and classes, "
                f"expected {list(logits.shape[1:])} (state damaged; start a new run)"
            )
        if self._steps is None:
            self._take_probes(evaluation.losses, logits, evaluation.labels)
        else:
            self._take_trials(evaluation.losses, logits, self._steps)

    def _take_probes(self, losses: F64, logits: F32, labels: I64) -> None:
        first = self._logits is None
        if self._logits is None:
            self._loss, self._logits = float(losses[0]), logits[0].copy()
            self._jacobian = np.empty((self._capacity(), self._logits.size), np.float32)
            logits = logits[1:]
        H = len(self._directions)
        measured = self._jacobian[H - self._n_probes : H]
        np.subtract(logits.reshape(measured.shape), self._logits.ravel(), out=measured)
        measured /= self._config.perturbation
        square = max(float(np.square(measured).mean()), _LEAST_SCALE)
        if first:
            self._scale, self._drift = square, _FIRST_DRIFT * square
        self._scale = _SCALE_MEMORY * self._scale + (1 - _SCALE_MEMORY) * square
        self._steps = self._solve(self._logits, labels)

    def _solve(self, logits: F32, labels: I64) -> F64:
        """Return the trials' steps a f64[trials, H], from the smallest damping."""
        H = len(self._directions)
        problem = SoftmaxProblem(logits, self._rows().reshape(H, *logits.shape), labels)
        p = softmax(logits)
        trace = float((p * (1 - p)).sum(axis=1).mean())  # h
        a, steps = np.zeros(H), []
        for factor, n_steps in _TRIALS:
            damping = factor * self._damping * self._scale
            a = problem.minimise(damping * np.eye(H) + trace * self._covariance, a, n_steps)
            steps.append(a)
        return np.stack(steps)

    def _rows(self) -> F32:
        """Return a view of G, f32[H, N C]."""
        return self._jacobian[: len(self._directions)]

    def _take_trials(self, losses: F64, logits: F32, steps: F64) -> None:
        assert self._logits is not None
        best = int(losses.argmin())
        self._correct(steps[best], logits[best] - self._logits)
        if losses[best] < self._loss:
            self._damping = float(np.clip(_TRIALS[best][0] * self._damping, *_DAMPINGS))
            self._point = self.ask().points[best]
            self._loss, self._logits = float(losses[best]), logits[best].copy()
            self._covariance += self._drift * (steps[best] @ steps[best]) * np.eye(steps.shape[1])
        else:
            self._damping = min(_REFUSED * self._damping, _DAMPINGS[1])
        self._begin_round()

    def _correct(self, a: F64, moved: F32) -> None:
        """Update G, P and q by the change of the logits f32[N, C] along a step a f64[H]."""
        square = float(a @ a)
        error = moved.ravel() - a.astype(np.float32) @ self._rows()
        # The mean Jacobian along a is that at its midpoint, ‖a‖ / 2 from where G was measured.
        half = square / 4
        predicted = float(a @ self._covariance @ a) + self._drift * half * square
        ratio = float(np.square(error).mean()) / max(predicted, 1e-30)
        self._drift *= float(np.sqrt(np.clip(ratio, *_SURPRISES)))
        drifted = self._covariance @ a + self._drift * half * a  # P⁺ a
        noise = self._drift * half * square + 1e-12
        gain = drifted / (a @ drifted + noise)
        for row, share in zip(self._rows(), gain.astype(np.float32), strict=True):
            row += share * error
        P = self._covariance - np.outer(gain, drifted)
        P = (P + P.T) / 2
        least = float(np.linalg.eigvalsh(P)[0])
        if least < 0:
            P -= least * np.eye(len(P))
        self._covariance = P

    def recommend(self) -> F64:
        return np.array(self._point)

    def state(self) -> State:
        arrays = {
            "point": self._point.copy(),
            "directions": self._directions.copy(),
            "covariance": self._covariance.copy(),
        }
        if self._logits is not None:
            known = len(self._directions) - (0 if self._steps is not None else self._n_probes)
            arrays |= {"logits": self._logits.copy(), "jacobian": self._jacobian[:known].copy()}
        if self._steps is not None:
            arrays["steps"] = self._steps.copy()
        return arrays, {
            "loss": self._loss,
            "damping": self._damping,
            "scale": self._scale,
            "drift": self._drift,
            "generator": generator_to_json(self._rng),
        }

    def restore(self, state: State) -> None:
        saved, dim = Saved(state), len(self._point)
        self._point = saved.f64("point", dim)
        self._directions = saved.f64("directions", None, dim)
        H = len(self._directions)
        self._covariance = saved.f64("covariance", H, H)
        self._logits = saved.f32("logits", None, None) if "logits" in saved else None
        saved.require(self._logits is None or self._logits.size > 0, "logits", "those of images")
        most = self._n_probes if self._logits is None else self._capacity()
        saved.require(
            self._n_probes <= H <= most, "directions", f"{self._n_probes} to {most} directions"
        )
        # With steps the probes are measured; without them they are due.
        self._steps = saved.f64("steps", len(_TRIALS), H) if "steps" in saved else None
        if self._logits is not None:
            known = H - (0 if self._steps is not None else self._n_probes)
            self._jacobian = np.empty((most, self._logits.size), np.float32)
            self._jacobian[:known] = saved.f32("jacobian", known, self._logits.size)
        else:
            saved.require(self._steps is None, "steps", "none without logits")
            saved.require("jacobian" not in saved, "logits", "those of the jacobian")
        self._loss = saved.number("loss")
        self._damping, self._scale, self._drift = (
            saved.number(name, 0, _MOST) for name in ("damping", "scale", "drift")
        )
        self._rng = saved.generator()


METHOD = TunedMethod(
    name="ogn-context",
    title="a context moved by Gauss–Newton steps in the space of logits",
    paper="ours (docs/research/ogn.md)",
    config=OgnContextConfig,
)

"""Validation passes and early stopping, as wrappers around any optimizer.

optimizer = EarlyStop(Validated(inner, every=500, keep="best"), patience=10)
"""

from __future__ import annotations

import numpy as np

from ztune.errors import ConfigError
from ztune.io.saved import Saved
from ztune.optim.nested import put_state
from ztune.types import F64, Evaluation, Json, Optimizer, Proposal, State

KEEPS = ("best", "last")
# Accuracies are fractions, and 0.57 − 0.56 is slightly less than 0.01 in floating point.
_ROUNDING = 1e-12


class Patience:
    """Counts validations without a gain in accuracy of at least `least_gain`."""

    def __init__(self, patience: int, least_gain: float):
        if patience < 1:
            raise ConfigError(f"patience is {patience}, expected at least 1 validation")
        if not least_gain >= 0:
            raise ConfigError(f"least_gain is {least_gain}, expected 0 or more")
        self._patience = patience
        self._least_gain = least_gain
        self._best: float | None = None
        self._without = 0

    def see(self, accuracy: float) -> None:
        best = self._best
        if best is None or (accuracy > best and accuracy - best >= self._least_gain - _ROUNDING):
            self._best, self._without = accuracy, 0
        else:
            self._without += 1

    @property
    def exhausted(self) -> bool:
        return self._without >= self._patience

    def to_json(self) -> Json:
        return {"best": self._best, "without": self._without}

    def restore(self, saved: Saved) -> None:
        """Restore what `to_json` returned."""
        self._best = None if saved.is_null("best") else saved.number("best", 0, 1)
        self._without = saved.count("without", most=0 if self._best is None else self._patience)


class Validated:
    """Validates the inner recommendation periodically, and keeps the best.

    A pass follows at least `every` queries after the last one, between two steps of the inner
    optimizer. The inner optimizer's own validation passes count too.
    """

    def __init__(self, inner: Optimizer, every: int, keep: str = "best"):
        if every < 1:
            raise ConfigError(f"every is {every}, expected at least 1 query")
        if keep not in KEEPS:
            raise ConfigError(f'keep is "{keep}", expected one of {", ".join(KEEPS)}')
        self._inner = inner
        self._every = every
        self._keep = keep
        self._since = 0  # queries
        self._best: F64 | None = None
        self._best_accuracy = 0.0
        self._best_loss = 0.0

    def _is_due(self, inner: Proposal) -> bool:
        return self._since >= self._every and not (inner.mid_step or inner.validation)

    def ask(self) -> Proposal:
        inner = self._inner.ask()
        if self._is_due(inner):
            return Proposal(points=self._inner.recommend()[None], validation=True)
        return inner

    def tell(self, evaluation: Evaluation) -> None:
        inner = self._inner.ask()
        if self._is_due(inner):
            self._see(self._inner.recommend()[None], evaluation)
            return
        if inner.validation:
            self._see(inner.points, evaluation)
        else:
            self._since += len(inner.points)
        self._inner.tell(evaluation)

    def _see(self, points: F64, evaluation: Evaluation) -> None:
        self._since = 0
        for point, accuracy, loss in zip(
            points, evaluation.accuracies, evaluation.losses, strict=True
        ):
            better = (accuracy, -loss) > (self._best_accuracy, -self._best_loss)
            if self._best is None or better:
                self._best = np.array(point, dtype=np.float64)
                self._best_accuracy, self._best_loss = float(accuracy), float(loss)

    def finished(self) -> str | None:
        return self._inner.finished()

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        return self._inner.probes(n_directions, rng)

    def recommend(self) -> F64:
        if self._keep == "last" or self._best is None:
            return self._inner.recommend()
        return np.array(self._best)

    def state(self) -> State:
        arrays, values = put_state("inner", self._inner.state())
        if self._best is not None:
            arrays["best"] = self._best.copy()
        values |= {
            "since": self._since,
            "best_accuracy": self._best_accuracy,
            "best_loss": self._best_loss,
        }
        return arrays, values

    def restore(self, state: State) -> None:
        saved = Saved(state)
        self._inner.restore(saved.inner("inner").state)
        dim = self._inner.ask().points.shape[1]
        self._best = saved.f64("best", dim) if "best" in saved else None
        self._since = saved.count("since")
        self._best_accuracy = saved.number("best_accuracy", 0, 1)
        self._best_loss = saved.number("best_loss")
        never = self._best_accuracy == self._best_loss == 0
        saved.require(self._best is not None or never, "best", "the best point so far")


class EarlyStop:
    """Finishes after `patience` validation passes in a row without a gain in accuracy."""

    def __init__(self, inner: Optimizer, patience: int, least_gain: float = 0.0):
        self._inner = inner
        self._n_validations = patience
        self._patience = Patience(patience, least_gain)

    def ask(self) -> Proposal:
        return self._inner.ask()

    def tell(self, evaluation: Evaluation) -> None:
        if self._inner.ask().validation:
            self._patience.see(float(evaluation.accuracies.max()))
        self._inner.tell(evaluation)

    def finished(self) -> str | None:
        if self._patience.exhausted:
            plural = "s" if self._n_validations > 1 else ""
            return f"early stop: no gain in {self._n_validations} validation{plural}"
        return self._inner.finished()

    def probes(self, n_directions: int, rng: np.random.Generator) -> F64:
        return self._inner.probes(n_directions, rng)

    def recommend(self) -> F64:
        return self._inner.recommend()

    def state(self) -> State:
        arrays, values = put_state("inner", self._inner.state())
        return arrays, values | {"patience": self._patience.to_json()}

    def restore(self, state: State) -> None:
        saved = Saved(state)
        self._inner.restore(saved.inner("inner").state)
        self._patience.restore(saved.inner("patience"))

"""The main path: ask, map, evaluate, tell, charge, save; until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ztune.budget import Budget
from ztune.objective import BatchSampler
from ztune.types import Evaluation, Optimizer, Oracle, PromptMap


@dataclass
class Tuning:
    """All that changes while a method runs; what a run saves after every step."""

    optimizer: Optimizer
    sampler: BatchSampler
    budget: Budget
    started: float
    """When this process took the run up, by time.monotonic()."""
    step: int = 0
    earlier: float = 0.0
    """Seconds that earlier processes of a resumed run spent, up to the state they saved last."""

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far."""
        return self.earlier + time.monotonic() - self.started


Observer = Callable[[Tuning, Evaluation], None]


def tune(
    tuning: Tuning, prompt_map: PromptMap, oracle: Oracle, n_classes: int, observe: Observer
) -> str:
    """Run until no further step fits the budget; return the stop reason.

    `observe` is called after each step with the state as it is then: it saves and shows, and stops
    the run early by raising.
    """
    while True:
        proposal = tuning.optimizer.ask()
        if not tuning.budget.fits(len(proposal.points)):
            return "budget"
        tuning.budget.reserve(len(proposal.points))
        batch = tuning.sampler.current() if proposal.same_batch else tuning.sampler.next()
        evaluation = oracle(prompt_map(proposal.points), batch)
        tuning.optimizer.tell(evaluation)
        tuning.budget.commit(n_classes)
        tuning.step += 1
        observe(tuning, evaluation)

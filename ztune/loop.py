"""The tuning loop: ask, map, evaluate, tell, charge, save, until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ztune.budget import Budget
from ztune.errors import ConfigError, NotFiniteError
from ztune.objective import BatchSampler
from ztune.types import I64, Batch, Evaluation, Optimizer, Oracle, PromptMap, Prompts


@dataclass
class Tuning:
    """The mutable state of a run, saved after every step."""

    optimizer: Optimizer
    sampler: BatchSampler
    budget: Budget
    started: float
    """Start of this process's part of the run, by time.monotonic(), plus its baselines' seconds."""
    step: int = 0
    earlier: float = 0.0
    """Seconds spent by earlier processes of a resumed run, up to their last saved state."""

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far, without the baselines."""
        return self.earlier + time.monotonic() - self.started


Observer = Callable[[Tuning, Evaluation], None]


@dataclass(frozen=True)
class HeldOut:
    """The validation images of validation passes."""

    oracle: Oracle
    n_images: int

    @property
    def batch(self) -> Batch:
        """All validation images; number 0, since the sampler counts from 1."""
        every: I64 = np.arange(self.n_images, dtype=np.int64)
        return Batch(every, np.zeros_like(every), 0)


def tune(
    tuning: Tuning,
    prompt_map: PromptMap,
    oracle: Oracle,
    n_classes: int,
    observe: Observer,
    held_out: HeldOut | None = None,
    take_n_found: Callable[[], int] = lambda: 0,
) -> str:
    """Run until the optimizer has finished or the budget is spent; return the stop reason.

    `take_n_found` returns how many class prompts were found on disk since its last call.

    `observe` is called with the state after each round, to save and report it; it may raise to stop
    the run.

    Raises: NotFiniteError for a candidate without a loss; the state is that before its round.
    """
    while True:
        reason = tuning.optimizer.finished()
        if reason is not None:
            return reason
        proposal = tuning.optimizer.ask()
        if not tuning.budget.fits(len(proposal.points)):
            return "budget"
        tuning.budget.reserve(len(proposal.points))
        answering, before = oracle, tuning.sampler.state()
        if proposal.validation:
            if held_out is None:
                raise ConfigError("the method needs validation images (`val`), and there are none")
            answering, batch = held_out.oracle, held_out.batch
        else:
            batch = tuning.sampler.current() if proposal.same_batch else tuning.sampler.next()
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # reported in one line instead
                prompts = prompt_map(proposal.points)
            _require_finite(prompts)
            take_n_found()  # leaves out those of a snapshot
            evaluation = answering(prompts, batch)
        except NotFiniteError:
            tuning.sampler.restore(before)  # the state to resume from has not drawn this batch
            raise
        tuning.optimizer.tell(evaluation)
        forwards = forwards_per_query(prompts, n_classes, len(batch.images))
        tuning.budget.commit(*forwards, take_n_found())
        tuning.step += 1
        observe(tuning, evaluation)


def _require_finite(prompts: Prompts) -> None:
    """Check that candidates are finite: a tower may return a loss even for NaN.

    Raises: NotFiniteError naming the first that is not.
    """
    for values in (prompts.contexts, prompts.visual):
        if values is not None and not np.isfinite(values).all():
            finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            first = int(np.flatnonzero(~finite)[0])
            raise NotFiniteError(
                f"candidate {first + 1} of {len(values)}: its values are not finite (smaller steps "
                "may help)",
                first,
            )


def forwards_per_query(prompts: Prompts, n_classes: int, n_images: int) -> tuple[int, int]:
    """Return text and image forwards of one candidate on a batch of `n_images`."""
    texts = n_classes if prompts.contexts is not None else 0
    return texts, n_images if prompts.visual is not None else 0

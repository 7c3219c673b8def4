"""How candidates and classes are cut into calls of the prompt graph, so that its memory is bounded.

A plan is configuration: the same classes, context length and limit give the same calls on every
machine of a kind, because int8 graphs scale their activations over a whole call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.providers import Execution
from ztune.errors import ConfigError
from ztune.types import I64, Json

_MB = 1_000_000
_F32 = 4
# MB above the weights where no limit is given.
_DEFAULT_LIMIT = {"cpu": 250, "cuda": 4000, "tensorrt": 4000}
# Values of token states (rows times width) in one call that keep a CPU's matrix products busy:
# 1,000 rows at ViT-B/32 size. Measured there: up to 3,500 rows an fp32 query costs the same; an
# int8 query gains 2 to 9 % from 1,800 rows, for 40 MB more.
_CPU_VALUES = 512_000


@dataclass(frozen=True)
class Sizes:
    """What the memory of a call depends on besides its classes and candidates."""

    n_context: int
    """m."""
    width: int
    """d of the text tower."""
    embed_dim: int
    """e of the features."""
    prefix: bool
    """Whether the context's rows are shared by the classes (a prefix graph)."""


@dataclass(frozen=True)
class Plan:
    """The calls that one round of candidates takes."""

    n_candidates: int
    """Candidates in one call, at most; even unless it is 1, so that a ± pair is never parted."""
    groups: tuple[I64, ...]
    """Classes by index, i64[C_g] each: those of one call, sorted by length."""
    megabytes: float
    """MB above the weights that a round takes, at most: estimated from measured peaks."""

    def to_json(self) -> dict[str, Json]:
        """Return what run.json keeps of it."""
        return {
            "candidates": self.n_candidates,
            "class_groups": [len(group) for group in self.groups],
            "megabytes": round(self.megabytes, 1),
        }


def make_plan(
    lengths: Sequence[int], sizes: Sizes, n_candidates: int, provider: str, limit: int | None
) -> Plan:
    """Return the plan for classes of `lengths` tokens: the name's, and what closes a text.

    `n_candidates` is how many come in one round; `limit` is in MB, None for the provider's own.

    Raises: ConfigError when one class and one candidate take more than the limit, naming the least
        that works.
    """
    limit = _DEFAULT_LIMIT[provider] if limit is None else limit
    tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(tokens, kind="stable").astype(np.int64)
    kept = _kept_bytes(tokens, sizes, n_candidates)

    def plan(together: int, n_groups: int) -> Plan | None:
        """Return the plan with so many candidates a call and groups, None where it is too large."""
        groups = _cut(order, tokens, n_groups)
        n_bytes = kept + max(call_bytes(tokens[group], sizes, together) for group in groups)
        rows = max(_rows(tokens[group], sizes, together) for group in groups)
        can_be_cut = together > 2 or len(groups) < len(order)
        if n_bytes > limit * _MB or (
            provider == "cpu" and rows * sizes.width > _CPU_VALUES and can_be_cut
        ):
            return None
        return Plan(together, tuple(groups), n_bytes / _MB)

    # All classes in one call where possible, else a ± pair and groups of classes, else one by one.
    whole = [n for n in range(n_candidates, 1, -1) if n % 2 == 0 or n == n_candidates]
    for together in whole:
        if found := plan(together, 1):
            return found
    for together in (2, 1) if whole else (1,):
        for n_groups in _counts(len(order)):
            if found := plan(together, n_groups):
                return found
    least = math.ceil((kept + call_bytes(tokens.max(keepdims=True), sizes, 1)) / _MB)
    raise ConfigError(
        f"`memory_limit` {limit} (MB) is too small for one class and one candidate at a time; the "
        f"least that works for these {len(order)} classes is {least}"
    )


def _counts(most: int) -> Iterator[int]:
    """Yield numbers of groups from 1 to `most`: the first few, then in steps of an eighth."""
    n = 1
    while n < most:
        yield n
        n += 1 + n // 8
    yield most


def _cut(order: I64, tokens: I64, n_groups: int) -> list[I64]:
    """Return the classes in `order` cut into at most `n_groups` with about as many tokens each."""
    if n_groups == len(order):
        return list(order[:, None])
    ordered = tokens[order]
    owner = (np.cumsum(ordered) - ordered) * n_groups // ordered.sum()
    return [order[owner == group] for group in np.unique(owner)]


def _rows(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return how many token states a call computes."""
    if sizes.prefix:
        return n_candidates * (sizes.n_context + int(tokens.sum()))
    return n_candidates * int(tokens.sum())


def call_bytes(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return what the activations of one call take, at most.

    Fitted to the peaks of a ViT-B/32-size tower: per row and width 14 values for the residual
    stream, projections and the hidden layer, 10 more where a class's tokens stand in a grid for
    attention, and three copies of its scores with heads of 32 values or more.
    """
    rows = _rows(tokens, sizes, n_candidates)
    grid = n_candidates * len(tokens) * int(tokens.max())
    seen = int(tokens.max()) + (1 + sizes.n_context if sizes.prefix else 0)
    scores = 3 * grid * seen * max(1, sizes.width // 32)
    return _F32 * (14 * rows * sizes.width + 10 * grid * sizes.width + scores)


def _kept_bytes(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return what stays between calls: the names' embeddings, contexts, features of a round."""
    contexts = n_candidates * sizes.n_context * sizes.width
    features = n_candidates * len(tokens) * sizes.embed_dim
    return _F32 * (int(tokens.sum()) * sizes.width + contexts + 2 * features)


def why_not(plan: Plan, n_candidates: int, execution: Execution) -> str | None:
    """Return why rounds of `n_candidates` cannot be captured; None where it should be tried."""
    if execution.provider != "cuda":
        return f"{execution.provider} replays no CUDA graphs here"
    if not execution.cuda_graph:
        return "switched off"
    n_groups = len(plan.groups)
    if n_groups > 1:
        return f"the classes take {n_groups} calls of different shapes (raise `memory_limit`)"
    if n_candidates % plan.n_candidates:
        return (
            f"{n_candidates} candidates take calls of different shapes, at most "
            f"{plan.n_candidates} each (raise `memory_limit`)"
        )
    return None

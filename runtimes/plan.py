"""Split candidates and classes into calls of the prompt graph with bounded memory.

A plan is configuration: the same classes, context length and limit give the same calls on every
machine with the same provider, because int8 graphs scale activations over a whole call.
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
# Default limit: MB above the weights.
_DEFAULT_LIMIT = {"cpu": 250, "cuda": 4000, "tensorrt": 4000}
# Values of token states (rows times width) per call that saturate a CPU: 1,000 rows at ViT-B/32
# size. Measured there: an fp32 query costs the same up to 3,500 rows; an int8 query gains 2 to 9 %
# from 1,800 rows, for 40 MB more.
_CPU_VALUES = 512_000


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the memory of a call, besides its classes and candidates."""

    n_context: int
    """m."""
    width: int
    """d of the text tower."""
    embed_dim: int
    """e of the features."""
    prefix: bool
    """Whether classes share the context's rows (a prefix graph)."""


@dataclass(frozen=True)
class Plan:
    """The calls for one candidate batch."""

    n_candidates: int
    """Maximum candidates per call; even or 1, so that ± pairs are not split."""
    groups: tuple[I64, ...]
    """Class indices i64[C_g] of each call, sorted by length."""
    megabytes: float
    """Maximum MB above the weights, estimated from measured peaks."""

    def to_json(self) -> dict[str, Json]:
        """Return the plan's entry in run.json."""
        return {
            "candidates": self.n_candidates,
            "class_groups": [len(group) for group in self.groups],
            "megabytes": round(self.megabytes, 1),
        }


def make_plan(
    lengths: Sequence[int], sizes: Sizes, n_candidates: int, provider: str, limit: int | None
) -> Plan:
    """Return the plan for classes of `lengths` tokens (names and suffix).

    `n_candidates` is the size of a candidate batch; `limit` is in MB, None for the provider's
    default.

    Raises: ConfigError when one class and one candidate exceed the limit, naming the minimum.
    """
    limit = _DEFAULT_LIMIT[provider] if limit is None else limit
    tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(tokens, kind="stable").astype(np.int64)
    persistent = _persistent_bytes(tokens, sizes, n_candidates)

    def plan(n_together: int, n_groups: int) -> Plan | None:
        """Return a plan with `n_together` candidates per call, or None if it is too large."""
        groups = _split_classes(order, tokens, n_groups)
        n_bytes = persistent + max(call_bytes(tokens[group], sizes, n_together) for group in groups)
        rows = max(_rows(tokens[group], sizes, n_together) for group in groups)
        can_be_split = n_together > 2 or len(groups) < len(order)
        if n_bytes > limit * _MB or (
            provider == "cpu" and rows * sizes.width > _CPU_VALUES and can_be_split
        ):
            return None
        return Plan(n_together, tuple(groups), n_bytes / _MB)

    # All classes in one call if possible, else a ± pair and groups of classes, else single ones.
    whole = [n for n in range(n_candidates, 1, -1) if n % 2 == 0 or n == n_candidates]
    for n_together in whole:
        if found := plan(n_together, 1):
            return found
    for n_together in (2, 1) if whole else (1,):
        for n_groups in _group_counts(len(order)):
            if found := plan(n_together, n_groups):
                return found
    least = math.ceil((persistent + call_bytes(tokens.max(keepdims=True), sizes, 1)) / _MB)
    raise ConfigError(
        f"`memory_limit` is {limit} (MB), expected at least {least} for these {len(order)} classes"
    )


def _group_counts(most: int) -> Iterator[int]:
    """Yield numbers of groups from 1 to `most`, in steps that grow by an eighth."""
    n = 1
    while n < most:
        yield n
        n += 1 + n // 8
    yield most


def _split_classes(order: I64, tokens: I64, n_groups: int) -> list[I64]:
    """Split the classes in `order` into at most `n_groups` with similar numbers of tokens."""
    if n_groups == len(order):
        return list(order[:, None])
    ordered = tokens[order]
    owner = (np.cumsum(ordered) - ordered) * n_groups // ordered.sum()
    return [order[owner == group] for group in np.unique(owner)]


def _rows(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return the number of token states that a call computes."""
    if sizes.prefix:
        return n_candidates * (sizes.n_context + int(tokens.sum()))
    return n_candidates * int(tokens.sum())


def call_bytes(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return the maximum bytes of the activations of one call.

    Fitted to the peaks of a ViT-B/32-size tower: per row and width 14 values for the residual
    stream, projections and the hidden layer, 10 more for the attention grid of a class's tokens,
    and three copies of its scores with heads of 32 values or more.
    """
    rows = _rows(tokens, sizes, n_candidates)
    grid = n_candidates * len(tokens) * int(tokens.max())
    seen = int(tokens.max()) + (1 + sizes.n_context if sizes.prefix else 0)
    scores = 3 * grid * seen * max(1, sizes.width // 32)
    return _F32 * (14 * rows * sizes.width + 10 * grid * sizes.width + scores)


def _persistent_bytes(tokens: I64, sizes: Sizes, n_candidates: int) -> int:
    """Return the bytes kept between calls: name embeddings, contexts, features."""
    contexts = n_candidates * sizes.n_context * sizes.width
    features = n_candidates * len(tokens) * sizes.embed_dim
    return _F32 * (int(tokens.sum()) * sizes.width + contexts + 2 * features)


def obstacle_to_capture(plan: Plan, n_candidates: int, execution: Execution) -> str | None:
    """Return why candidate batches of `n_candidates` cannot be captured, or None to try."""
    if execution.provider != "cuda":
        return f"provider {execution.provider} does not support CUDA graphs here"
    if not execution.cuda_graph:
        return "disabled"
    n_groups = len(plan.groups)
    if n_groups > 1:
        return f"the classes need {n_groups} calls of different shapes (raise `memory_limit`)"
    if n_candidates % plan.n_candidates:
        return (
            f"{n_candidates} candidates need calls of different shapes, with at most "
            f"{plan.n_candidates} each (raise `memory_limit`)"
        )
    return None

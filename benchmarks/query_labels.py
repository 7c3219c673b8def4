"""The compared methods with their settings, and variants with one changed setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ztune.methods.registry import find_method, method_config, tuned_config
from ztune.types import Json

GRID = (
    0, 10, 25, 50, 75, 100, 150, 200, 250, 350, 500, 700, 1000, 1500, 2000, 3000, 4000, 5000,
)  # fmt: skip
"""Queries at which curves are compared; 0 is a method's start."""
QUERIES = GRID[-1]


@dataclass(frozen=True)
class Label:
    """A method with settings that override its defaults."""

    name: str
    method: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    queries: int = QUERIES
    same_as: str = ""
    """The label with equal results if all training images fit that label's batch."""

    @property
    def batch(self) -> int | None:
        """Images per step; None for all, and for a head."""
        method = find_method(self.method)
        config = tuned_config(method, method_config(method, self.settings))
        return None if config is None else config.batch_size


LABELS = {
    label.name: label
    for label in (
        Label("zero-shot", "zero-shot"),
        Label("gda", "gda"),
        Label("lp++", "lp++"),
        Label("zip-128", "zip"),
        Label("zip-full", "zip", {"batch_size": None}, same_as="zip-128"),
        Label("cma", "cma"),
        Label("spsa", "spsa"),
        Label("sharpzo", "sharpzo"),
        Label("ogn", "ogn"),
        Label("ogn-context", "ogn-context", queries=1000),
    )
}


STUDY_TASKS = (
    "cifar10", "cifar10-negative", "pacs-photo", "pacs-photo-negative", "pacs-sketch", "digits",
)  # fmt: skip
_STUDY_QUERIES = 500
_MIXTURE: dict[str, dict[str, Json]] = {
    "no-words": {"init": "random"},
    "tokens-2": {"init": "random", "n_context": 2},
    "tokens-8": {"init": "random", "n_context": 8},
    "tolerance-0": {"tolerance": 0.0},
    "tolerance-1": {"tolerance": 1.0},
    "tolerance-4": {"tolerance": 4.0},
    "ridge-0.1": {"ridge": 0.1},
    "ridge-0.001": {"ridge": 0.001},
    "rank-40": {"rank": 40},
    "batch-64": {"batch_size": 64},
    "top-5": {"answers": "top-5"},
    "top-2": {"answers": "top-2"},
    "label": {"answers": "label"},
    "loss": {"answers": "loss"},
}
_CONTEXT: dict[str, dict[str, Json]] = {
    "words": {"init": "a photo of a"},
    "std-0.02": {"init_std": 0.02},
    "std-0.08": {"init_std": 0.08},
    "tokens-4": {"n_context": 4},
    "directions-5": {"n_directions": 5},
    "directions-20": {"n_directions": 20},
    "perturbation-0.001": {"perturbation": 0.001},
    "perturbation-0.1": {"perturbation": 0.1},
    "forgetting": {"kalman": False},
    "damping-0.1": {"damping": 0.1},
    "top-5": {"answers": "top-5"},
    "label": {"answers": "label"},
}


def _labels(method: str, changes: Mapping[str, Mapping[str, Json]]) -> dict[str, Label]:
    return {
        f"{method}-{name}": Label(f"{method}-{name}", method, settings, queries=_STUDY_QUERIES)
        for name, settings in changes.items()
    }


VARIANTS = _labels("ogn", _MIXTURE) | _labels("ogn-context", _CONTEXT)
"""The study's labels, each with one setting changed from its method's defaults."""
EVERY = LABELS | VARIANTS

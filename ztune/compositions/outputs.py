"""Methods that read a whole answer, the logits of every image, instead of one loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import cast

import numpy as np

from ztune.access import CONTEXTS, LOGITS, LOSS
from ztune.compositions.base import (
    STEPS,
    Composition,
    Defaults,
    ModelSpec,
    TextStart,
    TunedConfig,
    part_of,
    require_at_least_one,
)
from ztune.compositions.steps import ZipConfig
from ztune.errors import ConfigError
from ztune.maps.context import DirectContext
from ztune.maps.vocabulary import VocabularyContext
from ztune.objective import LOGITS_AT_ONCE
from ztune.optim.gauss_newton import N_TRIALS, GaussNewton, GaussNewtonConfig
from ztune.optim.mixture import MixtureConfig, PromptMixture

_TOKENS = 4  # of a random prompt, unless words or settings say otherwise
_LEAST_RANK = 40  # the rank gives way to images down to here
_ROUNDS_KEPT = 4  # of Jacobian rows, at least: with fewer the filter has nothing to carry on
_TOP = re.compile(r"top-([1-9][0-9]{0,5})")


class LossesOnly(ZipConfig):
    """ZIP, where an endpoint gives losses and nothing else."""

    @property
    def notice(self) -> str:
        return (
            "losses alone leave no outputs to fit (answers=loss): tuning by ZIP's steps instead, "
            "which take many times the queries"
        )


@dataclass(frozen=True)
class Answers(Defaults):
    """How much of its logits the endpoint gives away."""

    answers: str = "logits"
    """logits; top-K: the probabilities of its K most probable classes; label: the most probable
    class and its probability; loss: no more than the loss, so that ZIP's steps are taken."""

    def __post_init__(self) -> None:
        if self.answers not in ("logits", "label", "loss") and not _TOP.fullmatch(self.answers):
            raise ConfigError(
                f'answers is "{self.answers}", expected logits, top-K such as top-5, label or loss'
            )
        if self.answers == "loss":
            changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            changed.remove("answers")
            if changed:
                raise ConfigError(
                    f"answers=loss leaves nothing to fit and takes ZIP's steps: leave out "
                    f"{', '.join(changed)} (or tune with `method=zip` and its settings)"
                )

    @property
    def in_effect(self) -> TunedConfig:
        """The configuration that such answers allow."""
        return LossesOnly() if self.answers == "loss" else cast(TunedConfig, self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset((LOSS, CONTEXTS, LOGITS))

    @property
    def keeps_batch(self) -> bool:
        return True

    @property
    def top_classes(self) -> int | None:
        if self.answers == "label":
            return 1
        found = _TOP.fullmatch(self.answers)
        return int(found[1]) if found else None


def _fitting(n_classes: int, memory_mb: float, rows: int, at_once: int) -> int:
    """Return how many images' logits, f32, fit: `rows` of them kept, `at_once` in an answer."""
    return min(int(1e6 * memory_mb) // (4 * rows), LOGITS_AT_ONCE // at_once) // n_classes


@dataclass(frozen=True)
class OgnConfig(MixtureConfig, Answers):
    """Random prompts mixed by weights from a convex fit to the training images' logits."""

    init: str = "a photo of a"
    """Words of the first prompt; `random`: none."""
    n_context: int | None = None
    """m of the random prompts, with init=random; none: as many as the words have, 4 without."""
    batch_size: int | None = None
    """Images, the same in all rounds; none: as many as memory_mb allows."""

    def __post_init__(self) -> None:
        MixtureConfig.__post_init__(self)
        Answers.__post_init__(self)
        require_at_least_one(self, "n_context", "batch_size")
        if self.n_context is not None and self.init != "random":
            raise ConfigError("the words of init count their tokens: n_context needs init=random")

    @property
    def mixes(self) -> bool:
        return True

    @property
    def finest(self) -> None:
        return None

    @property
    def round_size(self) -> int:
        return self.n_prompts

    def images_of(self, n_images: int, n_classes: int) -> int:
        rows = 2 * min(self.rank, _LEAST_RANK) + self.n_prompts
        most = _fitting(n_classes, self.memory_mb, rows, self.n_prompts)
        return max(1, min(self.batch_size or n_images, n_images, most))

    def step_queries(self) -> int:
        return self.n_prompts

    def spends(self, queries: int) -> int:
        if self.most_prompts is None:
            return queries
        return min(queries, self.n_prompts * math.ceil(self.most_prompts / self.n_prompts))

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        words = None if self.init == "random" else towers.ids_of_words(self.init)
        n_tokens = (self.n_context or _TOKENS) if words is None else len(words)
        rng = np.random.default_rng([seed, STEPS])
        optimizer = PromptMixture(
            part_of(MixtureConfig, self), words, n_tokens, towers.words(), self.spends(queries), rng
        )
        return VocabularyContext(towers.token_table, n_tokens), optimizer


@dataclass(frozen=True)
class OgnContextConfig(TextStart, GaussNewtonConfig, Answers):
    """One context moved by Gauss–Newton steps in the space of logits."""

    n_context: int = 8
    init: str = "random"
    init_std: float = 0.005

    def __post_init__(self) -> None:
        TextStart.__post_init__(self)
        GaussNewtonConfig.__post_init__(self)
        Answers.__post_init__(self)

    @property
    def finest(self) -> tuple[str, float]:
        return "perturbation", self.perturbation

    @property
    def round_size(self) -> int:
        return max(self.n_directions + 1, N_TRIALS)

    def images_of(self, n_images: int, n_classes: int) -> int:
        rows = _ROUNDS_KEPT * self.n_directions
        most = _fitting(n_classes, self.memory_mb, rows, self.round_size)
        return max(1, min(self.batch_size or n_images, n_images, most))

    def step_queries(self) -> int:
        return self.n_directions + 1 + N_TRIALS

    def build(self, towers: ModelSpec, queries: int, seed: int) -> Composition:
        prompt_map = DirectContext(self.initial(towers, seed))
        rng = np.random.default_rng([seed, STEPS])
        optimizer = GaussNewton(part_of(GaussNewtonConfig, self), prompt_map.start(), rng)
        return prompt_map, optimizer

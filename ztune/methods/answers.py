"""Settings of methods that fit logits, for endpoints that return fewer than all logits."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from ztune.capabilities import CONTEXTS, LOGITS, LOSS
from ztune.errors import ConfigError
from ztune.methods.base import TunedConfig
from ztune.methods.zip import ZipConfig
from ztune.objective import LOGITS_AT_ONCE

_TOP = re.compile(r"top-([1-9][0-9]{0,5})")


class LossesOnlyConfig(ZipConfig):
    """ZIP, for an endpoint that returns only losses."""

    notice = (
        "answers=loss leaves no logits to fit: tuning with ZIP instead, which needs many "
        "times the queries"
    )


@dataclass(frozen=True)
class AnswersConfig(TunedConfig):
    """Settings shared by methods that fit logits."""

    answers: str = "logits"
    """logits; top-K: the probabilities of the K most probable classes; label: the most probable
    class and its probability; loss: only the loss, which falls back to ZIP."""
    needs = frozenset((LOSS, CONTEXTS, LOGITS))
    keeps_batch = True

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
                    f"answers=loss falls back to ZIP, which does not use {', '.join(changed)}: "
                    "leave them out (or use `method=zip` and its settings)"
                )

    @property
    def in_effect(self) -> TunedConfig:
        return LossesOnlyConfig() if self.answers == "loss" else self

    @property
    def top_classes(self) -> int | None:
        if self.answers == "label":
            return 1
        found = _TOP.fullmatch(self.answers)
        return int(found[1]) if found else None

    def images_within(self, n_images: int, n_classes: int, memory_mb: float, rows: int) -> int:
        """Return the batch size whose logits fit in memory.

        `rows` f32[N, C] are kept, and an answer has those of a whole round.
        """
        logits = min(int(1e6 * memory_mb) // (4 * rows), LOGITS_AT_ONCE // self.round_size)
        return max(1, min(self.batch_size or n_images, n_images, logits // n_classes))

"""Whether a run can be made as it was asked for, seen before anything is written or charged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtimes.prompts import group_by_prefix, name_tokens, template_tokens
from ztune.access import EVERYTHING, IMAGE_TOKENS, TEXTS, no_access
from ztune.data.split import Split
from ztune.errors import ConfigError
from ztune.methods.base import TunedConfig
from ztune.methods.registry import find_method, needs_of, needs_of_all
from ztune.model import Model
from ztune.precision import open_reference
from ztune.progress import warn
from ztune.run_config import RunConfig
from ztune.system import return_free_memory
from ztune.task import MethodStart

# Seconds of a method's own arithmetic that are announced.
_WORTH_A_WORD = 120.0


@dataclass(frozen=True)
class RunChecks:
    """What is asked for, of which images and towers."""

    run_config: RunConfig
    split: Split
    model: Model
    measured: bool
    """Whether the signal was measured when the run began."""

    def check(self, start: Callable[[], MethodStart]) -> None:
        """See that classes and settings fit the towers; `start` makes map and optimizer.

        Raises: DataError naming the class that does not, or two that the model cannot tell apart;
            ConfigError for a setting, or a method that needs what the runtime does not give.
        """
        model, run_config, classes = self.model, self.run_config, self.split.classes
        tuned = run_config.tuned_config
        self._check_access()
        if TEXTS not in model.runtime.missing:
            for template in run_config.templates:
                sentences = template_tokens(model.bundle, model.tokenizer, template, classes)
                for _, shared, rests in group_by_prefix(sentences):
                    model.runtime.check_plan(rests, len(shared), 1)
        if tuned is None:
            if run_config.reference or run_config.force:
                raise ConfigError(
                    f"{run_config.method} has no steps, so no signal to measure: leave out "
                    "`reference` and `force`"
                )
        else:
            self._check_contexts(tuned, start())
            self._check_signal(tuned)
            self._check_images(tuned)
            self._announce(tuned)
        model.tokenizer.release()  # every text of the run has been seen
        return_free_memory()

    def _check_access(self) -> None:
        """Refuse a method that needs more than the runtime gives."""
        runtime, method = self.model.runtime, find_method(self.run_config.method)
        given, hint = EVERYTHING - runtime.missing, runtime.hint
        if self.model.served is None and self.model.bundle.visual is None:
            given = given - {IMAGE_TOKENS}
            hint = "export a ViT with `image_tokens`"
        needed = needs_of(method, self.run_config.method_config)
        if needed - given:
            raise no_access(method.name, given, {**needs_of_all(), method.name: needed}, hint)

    def _check_contexts(self, config: TunedConfig, start: MethodStart) -> None:
        """See that the contexts fit before the class names, and a round into memory."""
        if start.n_context is not None:
            model, classes = self.model, self.split.classes
            names: Sequence[tuple[int, ...]] = name_tokens(
                model.bundle.text, model.tokenizer, classes, start.n_context
            )
            n_images = max(len(self.split.entries_of(part)) for part in ("train", "val"))
            model.runtime.check_plan(names, start.n_context, config.round_size, n_images)

    def _check_signal(self, config: TunedConfig) -> None:
        """See that what is asked for about the signal fits the method."""
        run_config = self.run_config
        if config.program is not None and run_config.reference:
            raise ConfigError(
                f"{run_config.method} encodes images anew, so there is no signal to measure: "
                "leave out `reference`"
            )
        if config.program is None and config.finest and not self.measured:
            open_reference(run_config.reference, self.model.bundle)
        if config.finest is None and (run_config.reference or run_config.force):
            raise ConfigError(
                f"{run_config.method} takes no differences of losses, so there is no signal to "
                "measure: leave out `reference` and `force`"
            )

    def _check_images(self, config: TunedConfig) -> None:
        """See that validation and views fit the method and the split."""
        run_config = self.run_config
        if config.mixes and run_config.validates:
            raise ConfigError(
                f"{run_config.method} has no single point to validate, and finds its weights by "
                "cross-validation: leave out `keep` and `patience`"
            )
        if config.keeps_batch and run_config.augment:
            raise ConfigError(
                f"{run_config.method} sees the same images in all rounds, so one random view of "
                "each: leave out `augment`"
            )
        if (run_config.validates or config.validates) and not self.split.entries_of("val"):
            raise ConfigError("a run that validation steers needs validation images (`val`)")

    def _announce(self, config: TunedConfig) -> None:
        seconds = config.own_seconds(self.run_config.queries)
        if seconds > _WORTH_A_WORD:
            warn(
                f"{self.run_config.method}'s own arithmetic, beside the forward passes, will take "
                f"about {seconds / 60:.0f} minutes (fewer values take less, and so does a "
                "separable covariance where there is one)"
            )

"""Checks that a requested run is possible, before anything is written or charged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from runtimes.prompts import group_by_prefix, name_tokens, template_tokens
from ztune.capabilities import FEATURES, TEXTS, describe, missing_capability
from ztune.data.split import Split
from ztune.errors import ConfigError
from ztune.inliers import is_extrapolated
from ztune.methods.base import TunedConfig
from ztune.methods.registry import find_method, needs_of, needs_of_all, possible_method, views_of
from ztune.model import Model
from ztune.precision import open_reference
from ztune.progress import warn
from ztune.run_config import RunConfig
from ztune.system import return_free_memory
from ztune.task import MethodStart

# Seconds of a method's own computation above which they are announced.
_WORTH_A_WORD = 120.0


def as_possible(run_config: RunConfig, model: Model) -> RunConfig:
    """Return the settings with `auto` replaced, with a remark, where the model cannot run it.

    Raises: ConfigError for settings that the replacement lacks.
    """
    method = possible_method(run_config.method, model.capabilities)
    if method == run_config.method:
        return run_config
    lacking = needs_of(find_method(run_config.method), run_config.method_config)
    warn(
        f"{run_config.method} needs {describe(lacking - model.capabilities)}, which this runtime "
        f"does not provide: running {method} instead"
    )
    augment = run_config.augment or views_of(method, run_config.preset)
    found = replace(run_config, method=method, augment=augment)
    found.check_method()
    return found


@dataclass(frozen=True)
class RunChecks:
    """Checks of a run's settings against its images and model."""

    run_config: RunConfig
    split: Split
    model: Model
    measured: bool
    """Whether the signal was measured at the start of the run."""

    def check(self, start: Callable[[], MethodStart]) -> None:
        """Check classes and settings against the towers; `start` makes map and optimizer.

        Raises: DataError naming an unusable class, or two that the model cannot distinguish;
            ConfigError for a setting, or a capability that the runtime lacks.
        """
        model, run_config, classes = self.model, self.run_config, self.split.classes
        tuned = run_config.tuned_config
        self._check_capabilities()
        self._check_rejection()
        if TEXTS not in model.runtime.missing:
            for template in run_config.templates:
                texts = template_tokens(model.bundle, model.tokenizer, template, classes)
                for _, shared, rests in group_by_prefix(texts):
                    model.runtime.check_plan(rests, len(shared), 1)
        if tuned is None:
            if run_config.reference or run_config.force:
                raise ConfigError(
                    f"{run_config.method} has no steps and no signal to measure: leave out "
                    "`reference` and `force`"
                )
        else:
            self._check_contexts(tuned, start())
            self._check_signal(tuned)
            self._check_images(tuned)
            self._announce(tuned)
        model.tokenizer.release()  # all texts of the run are tokenised
        return_free_memory()

    def _check_capabilities(self) -> None:
        """Raise if the method needs a capability that the runtime lacks."""
        method, given = find_method(self.run_config.method), self.model.capabilities
        hint = self.model.runtime.hint
        if self.model.served is None and self.model.bundle.visual is None:
            hint = "export a ViT with `image_tokens`"
        needed = needs_of(method, self.run_config.method_config)
        if needed - given:
            raise missing_capability(
                method.name, given, {**needs_of_all(), method.name: needed}, hint
            )

    def _check_rejection(self) -> None:
        """Check that images can be compared with the training images, and with enough of them."""
        run_config, share = self.run_config, self.run_config.reject
        if share is None:
            return
        tuned, method = run_config.tuned_config, run_config.method
        if tuned is not None and tuned.program is not None:
            raise ConfigError(
                f"`reject` compares features of unchanged images, and {method} changes images: "
                "leave out `reject`, or use another method"
            )
        if lacking := {FEATURES, TEXTS} - self.model.capabilities:
            raise ConfigError(
                f"`reject` needs {describe(lacking)}, which this runtime does not provide: leave "
                "out `reject`"
            )
        n = len(self.split.entries_of("train"))
        if is_extrapolated(share, n):
            warn(
                f"`reject` is {share:g}, less than {n} training images can show: the threshold is "
                "extrapolated below their lowest score"
            )

    def _check_contexts(self, config: TunedConfig, start: MethodStart) -> None:
        """Check that contexts fit before the class names, and a round in memory."""
        if start.n_context is not None:
            model, classes = self.model, self.split.classes
            names: Sequence[tuple[int, ...]] = name_tokens(
                model.bundle.text, model.tokenizer, classes, start.n_context
            )
            n_images = max(len(self.split.entries_of(part)) for part in ("train", "val"))
            model.runtime.check_plan(names, start.n_context, config.round_size, n_images)

    def _check_signal(self, config: TunedConfig) -> None:
        """Check the signal's settings against the method."""
        run_config = self.run_config
        if config.program is not None and run_config.reference:
            raise ConfigError(
                f"{run_config.method} re-encodes images, so the signal cannot be measured: leave "
                "out `reference`"
            )
        if config.program is None and config.perturbation_setting and not self.measured:
            open_reference(run_config.reference, self.model.bundle)
        if config.perturbation_setting is None and (run_config.reference or run_config.force):
            raise ConfigError(
                f"{run_config.method} uses no differences of losses and has no signal to measure: "
                "leave out `reference` and `force`"
            )

    def _check_images(self, config: TunedConfig) -> None:
        """Check validation and views against the method and the split."""
        run_config = self.run_config
        if config.mixes and run_config.validates:
            raise ConfigError(
                f"{run_config.method} has no single point to validate and cross-validates its "
                "weights: leave out `keep` and `patience`"
            )
        if (run_config.validates or config.validates) and not self.split.entries_of("val"):
            raise ConfigError(
                "`keep=best`, `patience` and validated warm-ups need validation images (`val`)"
            )

    def _announce(self, config: TunedConfig) -> None:
        seconds = config.own_seconds(self.run_config.queries)
        if seconds > _WORTH_A_WORD:
            warn(
                f"{self.run_config.method} will take about {seconds / 60:.0f} minutes besides the "
                "forward passes (use fewer values, or a separable covariance if available)"
            )

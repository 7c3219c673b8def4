"""Whether a run can be made as it was asked for, seen before anything is written or charged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.extractor import OrtExtractor
from runtimes.prompts import name_tokens, shared_starts, template_sentences
from ztune.access import EVERYTHING, IMAGE_TOKENS, TEXTS, require_access
from ztune.compositions.base import Composition, TunedConfig
from ztune.data.split import Split
from ztune.errors import ConfigError
from ztune.methods import find_method, method_config, needs_of, needs_of_all, tuned_config
from ztune.model import Workbench
from ztune.optim.validation import EarlyStop, Validated
from ztune.precision import open_reference
from ztune.progress import warn
from ztune.run_config import Request
from ztune.system import return_free_memory
from ztune.types import Optimizer

# Seconds of a method's own arithmetic that are announced.
_WORTH_A_WORD = 120.0


def start_config(request: Request) -> Any:
    """Return the method's configuration, checked against the budget.

    Raises: ConfigError, among others when the budget is less than one step.
    """
    method = find_method(request.method)
    config = method_config(method, request.settings, request.preset)
    tuned = tuned_config(method, config)
    if tuned is None:
        for name in ("keep", "patience", "snapshots", "extractor"):
            if getattr(request, name) != getattr(Request("", ""), name):
                raise ConfigError(f"{request.method} has no steps: leave out --{name}")
        return config
    least = tuned.step_queries()
    if request.queries < least:
        what = "one step" if least <= tuned.round_size else "its first step"
        raise ConfigError(
            f"--queries {request.queries} is less than {what} of {request.method}, which costs "
            f"{least}"
        )
    if request.extractor is not None and tuned.program != "decoder":
        raise ConfigError(f"{request.method} has no decoder: leave out --extractor")
    return config


def composed(
    request: Request, config: TunedConfig, bench: Workbench, n_extracted: int
) -> Composition:
    """Return the method's map and optimizer at their start, wrapped as asked for.

    `n_extracted` is how many values of a picture a decoder sees.
    """
    towers = bench.towers(n_extracted)
    prompt_map, optimizer = config.build(towers, request.queries, request.seed)
    if not request.validates:
        return prompt_map, optimizer
    wrapped: Optimizer = Validated(optimizer, request.queries_between_validations, request.keep)
    if request.patience is not None:
        wrapped = EarlyStop(wrapped, request.patience)
    return prompt_map, wrapped


@dataclass(frozen=True)
class Feasibility:
    """What is asked for, of which pictures and towers."""

    request: Request
    split: Split
    bench: Workbench
    config: Any
    """As `start_config` returns it."""
    measured: bool
    """Whether the signal was measured when the run began."""

    def check(self) -> None:
        """See that classes and settings fit the towers.

        Raises: DataError naming the class that does not, or two that the model cannot tell apart;
            ConfigError for a setting, or a method that needs what the runtime does not give.
        """
        bench, request, classes = self.bench, self.request, self.split.classes
        tuned = tuned_config(find_method(request.method), self.config)
        self._check_access()
        if TEXTS not in bench.runtime.withheld:
            for template in request.templates:
                sentences = template_sentences(bench.bundle, bench.tokenizer, template, classes)
                for _, start, rests in shared_starts(sentences):
                    bench.runtime.check_plan(rests, len(start), 1)
        if tuned is None:
            if request.reference or request.force:
                raise ConfigError(
                    f"{request.method} has no steps, so no signal to measure: leave out "
                    "--reference and --force"
                )
        else:
            self._check_contexts(tuned)
            self._check_signal(tuned)
            self._check_pictures(tuned)
            self._announce(tuned)
        bench.tokenizer.release()  # every text of the run has been seen
        return_free_memory()

    def _check_access(self) -> None:
        """Refuse a method that needs more than the runtime gives."""
        runtime, method = self.bench.runtime, find_method(self.request.method)
        given, hint = EVERYTHING - runtime.withheld, runtime.hint
        if self.bench.served is None and self.bench.bundle.visual is None:
            given = given - {IMAGE_TOKENS}
            hint = "export a ViT with --image-tokens"
        needs = needs_of_all() | {method.name: needs_of(method, self.config)}
        require_access(method.name, given, needs, hint)

    def _check_contexts(self, config: TunedConfig) -> None:
        """See that the contexts fit before the class names, and a round into memory."""
        bench, request = self.bench, self.request
        n_extracted = bench.bundle.embed_dim
        if request.extractor is not None:
            extractor = OrtExtractor(Path(request.extractor), bench.bundle, bench.execution)
            n_extracted = extractor.width()
        prompt_map, optimizer = composed(request, config, bench, n_extracted)
        contexts = prompt_map(optimizer.ask().points[:1]).contexts
        if contexts is not None:
            n_context, classes = contexts.shape[1], self.split.classes
            names: Sequence[tuple[int, ...]] = name_tokens(
                bench.bundle.text, bench.tokenizer, classes, n_context
            )
            bench.runtime.check_plan(names, n_context, config.round_size)

    def _check_signal(self, config: TunedConfig) -> None:
        """See that what is asked for about the signal fits the method."""
        request = self.request
        if config.program is not None and request.reference:
            raise ConfigError(
                f"{request.method} encodes pictures anew, so there is no signal to measure: "
                "leave out --reference"
            )
        if config.program is None and config.finest and not self.measured:
            open_reference(request.reference, self.bench.bundle)
        if config.finest is None and (request.reference or request.force):
            raise ConfigError(
                f"{request.method} takes no differences of losses, so there is no signal to "
                "measure: leave out --reference and --force"
            )

    def _check_pictures(self, config: TunedConfig) -> None:
        """See that validation and views fit the method and the split."""
        request = self.request
        if config.mixes and request.validates:
            raise ConfigError(
                f"{request.method} has no single point to validate, and finds its weights by "
                "cross-validation: leave out --keep and --patience"
            )
        if config.keeps_batch and request.augment:
            raise ConfigError(
                f"{request.method} sees the same pictures in all rounds, so one random view of "
                "each: leave out --augment"
            )
        if (request.validates or config.validates) and not self.split.entries_of("val"):
            raise ConfigError("a run that validation steers needs validation pictures (--val)")

    def _announce(self, config: TunedConfig) -> None:
        seconds = config.own_seconds(self.request.queries)
        if seconds > _WORTH_A_WORD:
            warn(
                f"{self.request.method}'s own arithmetic, beside the forward passes, will take "
                f"about {seconds / 60:.0f} minutes (fewer values take less, and so does a "
                "separable covariance where there is one)"
            )

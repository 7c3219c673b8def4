"""One run from a split to its artifact: check, tune or fit, calibrate, finish."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from msgspec import structs

from runtimes.extractor import OrtExtractor
from runtimes.remote.served import RequestPlan, ServerRuntime
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    EnsembleArtifact,
    HeadArtifact,
    Provenance,
    VisualArtifact,
    classifier_of_texts,
)
from ztune.budget import Budget
from ztune.calibration import log_prior_ratios
from ztune.capabilities import TEXTS
from ztune.checks import RunChecks
from ztune.data.split import LEAST_JUDGED, NOTHING, LeftOut, Split
from ztune.encoded import EncodedSplit, SplitEncoder, fingerprints
from ztune.ensemble import has_kernel
from ztune.errors import ConfigError, NotFiniteError, ZtuneError
from ztune.inliers import fit_inlier_test
from ztune.io.schema import Count, convert, plain
from ztune.logits import FeatureClassifier
from ztune.loop import Tuning, tune
from ztune.methods.base import HeadMethod, TunedConfig
from ztune.methods.gda import GdaConfig, fit_gda
from ztune.methods.plugins import package_of
from ztune.methods.registry import (
    find_method,
    settings_of_result,
)
from ztune.model import Model
from ztune.objective import BatchSampler, cross_entropy
from ztune.out_of_fold import LabelledLogits, calibrate, held_out_logits
from ztune.precision import (
    FULL_PRECISION,
    IMAGES_REENCODED,
    NO_DIFFERENCES,
    SERVED,
    RefusedError,
    Signal,
    SignalCheck,
    open_reference,
    precision_suffices,
    require_signal,
    signal_not_needed,
    signal_unmeasured,
)
from ztune.progress import warn
from ztune.run import MemoryRun, RunFolder, SaveSchedule
from ztune.run_config import DATA, RunConfig
from ztune.run_document import (
    RunReport,
    RunStart,
    ServerReport,
    ValidationScore,
)
from ztune.statistics import Proportion, Score, score
from ztune.system import machine, one_blas_thread, peak_memory_mb, return_free_memory, versions
from ztune.task import FewShotTask, MethodStart, Result, compose, open_task
from ztune.text_cache import TextStore
from ztune.types import F32, Evaluation, Json

Store = TypeVar("Store", RunFolder, MemoryRun)


@dataclass(frozen=True)
class Outcome:
    """The result of a method, with its costs."""

    artifact: Artifact
    seconds: float
    """Seconds up to the end of the steps, without the baselines, over all processes of the run."""
    train_loss: float
    """In nats, over all training images and views."""
    val_features: F32 | None
    """f32[n, e] of the validation images under the artifact."""
    ended: float
    """End of the steps, before the report, by time.monotonic()."""
    cuda_graph: str | None = None
    """Whether a round was captured as a CUDA graph, or why not; None on a CPU."""
    share: Proportion | None = None
    """Validation accuracy as computed by a server that returns losses only."""
    held_out: LabelledLogits | None = None
    """Of training images, each by a fit without it."""


@dataclass(frozen=True)
class Baselines:
    """Baselines of the result; empty without text features."""

    classifiers: Mapping[str, FeatureClassifier]
    gda_alpha: Json
    seconds: float


@dataclass(frozen=True)
class TrainingRun(Generic[Store]):
    """One run in progress."""

    run_config: RunConfig
    split: Split
    folder: Store
    model: Model
    encoded: EncodedSplit | None = None
    """The split's features, if known before the run."""
    stores_texts: bool = True
    """Whether text features are kept on disk for other runs; not where seconds are compared."""

    @property
    def tuned(self) -> TunedConfig | None:
        """The configuration of a method with steps."""
        return self.run_config.tuned_config

    @cached_property
    def start(self) -> MethodStart:
        """The map and optimizer of a method with steps, made once for the run."""
        assert self.tuned is not None
        n_extracted = self.model.bundle.embed_dim
        if (extractor := self.run_config.extractor) is not None:
            n_extracted = OrtExtractor(extractor, self.model.bundle, self.model.execution).width()
        n_images = len(self.split.entries_of("train"))
        return compose(self.run_config, self.tuned, self.model, n_extracted, n_images)

    @property
    def published(self) -> float:
        """The published value of the setting that the signal depends on."""
        assert self.tuned is not None
        setting = type(self.tuned)().perturbation_setting
        assert setting is not None
        return setting[1]

    def head(self) -> RunStart:
        """Return run.json's content at the start."""
        run_config, bundle = self.run_config, self.model.bundle
        return RunStart(
            status="running",
            method=run_config.method,
            package=package_of(run_config.method),
            seed=run_config.seed,
            config=settings_of_result(find_method(run_config.method), run_config.method_config),
            provider=self.model.runtime.provider,
            precision=bundle.precision,
            model_id=bundle.model_id,
            bundle_digest=bundle.digest,
            classes=len(self.split.classes),
            versions=dict(versions()),
            machine=dict(machine()),
            run_config=run_config,
        )

    def check(self, *, new: bool = False) -> None:
        """Check the run before anything is written; see `RunChecks.check`.

        A `new` run ignores the signal of a run that it replaces.
        """
        measured = not new and self._signal_is_known()
        RunChecks(self.run_config, self.split, self.model, measured).check(lambda: self.start)

    def _left_out(self, encoded: EncodedSplit) -> dict[str, Any]:
        """Return run.json's fields of the files that are not used."""
        known: LeftOut = self.split.left_out
        broken = (*known.broken, *encoded.broken)
        found = structs.replace(known, broken=broken)
        return {"broken_images": len(broken), "left_out": None if found == NOTHING else found}

    def finish(self, head: RunStart, *, curve: bool = True) -> RunReport:
        """Run to the end from the saved state and write the results; return run.json's content.

        `head` is run.json's content at the start; `curve` draws the curve, if the method has one.
        """
        started = time.monotonic()
        run_config = self.run_config
        # One tower at a time: each session is closed before the next is opened.
        changeable = self.tuned is not None and self.tuned.program is not None
        encoded = self.encoded or self._encoder.encode(changeable=changeable)
        if head.image_forwards is None:
            costs = encoded.costs(time.monotonic() - started)
            head = structs.replace(head, **costs, **self._left_out(encoded))
        self.folder.write(plain(head))
        budget = Budget(run_config.queries, image_forwards=head.image_forwards or 0)
        with self._journal_queries(budget) as served:
            texts = None
            if TEXTS not in self.model.runtime.missing:
                texts = self.model.encode_templates(
                    run_config.templates, self.split.classes, self._store
                )
            baselines = self._baselines(texts, encoded)
            return_free_memory()  # of the image tower and the fit
            if self.tuned is not None:
                with one_blas_thread():
                    task = self._task(self.tuned, encoded, texts)
                    head = self._with_plan(head, task)
                    head = self._with_signal(head, task, budget)
                    outcome = self._tune(task, budget, started + baselines.seconds)
            else:
                outcome = self._fit(encoded, texts, started + baselines.seconds)
        validated = self._val_logits(outcome, encoded)
        artifact, calibration = calibrate(outcome.artifact, outcome.held_out, validated)
        outcome = replace(outcome, artifact=artifact)
        if run_config.priors == DATA:
            outcome = self._with_priors(outcome, encoded)
            artifact, validated = outcome.artifact, self._val_logits(outcome, encoded)
        scores = self._validate(outcome, baselines, encoded, validated)
        if run_config.reject is not None:
            assert texts is not None
            assert not isinstance(artifact, VisualArtifact)
            images, labels = encoded.shots(texts, 1.0, 0.0).images
            features = images.astype(np.float32)
            test = fit_inlier_test(features, labels, texts, run_config.reject)
            artifact = replace(artifact, inliers=test)
        n_bytes = self.folder.keep(artifact)
        known = {
            **structs.asdict(head),
            "status": "finished",
            "config": artifact.provenance.config,
            "image_forwards": budget.image_forwards,
        }
        seconds = round(outcome.seconds, 3)
        report_seconds = round(baselines.seconds + time.monotonic() - outcome.ended, 3)
        report = RunReport(
            **known,
            queries=budget.queries,
            probe_queries=budget.probe_queries,
            text_forwards=budget.text_forwards,
            text_forwards_cached=budget.text_forwards_cached,
            seconds=round(seconds + report_seconds, 3),
            report_seconds=report_seconds,
            peak_memory_mb=round(peak_memory_mb(), 1),
            result_bytes=n_bytes,
            stop_reason=artifact.provenance.stop_reason,
            cuda_graph=outcome.cuda_graph,
            loss="cross-entropy" if self.tuned is None or not self.tuned.focal else "focal",
            train_loss=outcome.train_loss,
            val_accuracy=scores["tuned"].accuracy if scores else None,
            validation={
                name: ValidationScore(s.accuracy, s.interval, s.n) for name, s in scores.items()
            },
            cross_validation=self._cross_validate(outcome, encoded),
            hand_written=self._hand_written(outcome, baselines, encoded),
            calibration=calibration,
            gda_alpha=baselines.gda_alpha,
            server=None if served is None else _server_report(served, budget),
        )
        if curve and has_curve(run_config):
            draw_curve(self.folder, report)
        self.folder.write(plain(report))  # last: a finished run is complete
        self.folder.trim_cache(run_config.cache)
        if self._store is not None:
            self._store.trim()
        return report

    def signal(self) -> tuple[Signal, dict[str, Json]]:
        """Measure the signal only, for `ztune doctor`."""
        config = self.tuned
        if config is None or config.program is not None or config.perturbation_setting is None:
            what = "has no steps" if config is None else "re-encodes images"
            if config is not None and config.perturbation_setting is None:
                what = "uses no differences of losses"
            raise ConfigError(f"{self.run_config.method} {what}, so its signal cannot be measured")
        train, labels = self._encoder.training()
        none = np.zeros(0, dtype=np.int64)
        encoded = EncodedSplit(train.values, labels, None, none, 0, 0, ())
        return self._measure_signal(self._task(config, encoded, None))

    def _signal_is_known(self) -> bool:
        """Return whether this run has started and measured its signal."""
        if not self.folder.is_started:
            return False
        return "signal" in self.folder.read() or self.folder.has_state

    def _measure_signal(self, task: FewShotTask) -> tuple[Signal, dict[str, Json]]:
        reference = open_reference(self.run_config.reference, self.model.bundle)
        check = SignalCheck(self.model, self.split.classes, self.run_config.seed, reference)
        return check.measure(
            task.config,
            task.optimizer,
            task.prompt_map,
            task.objective,
            task.encoded.features,
            task.encoded.labels,
        )

    def _with_plan(self, head: RunStart, task: FewShotTask) -> RunStart:
        """Return run.json's content with the plan of calls per round, which a run keeps."""
        if task.encoder is None:
            return head
        calls = task.encoder.plan.to_json()
        if isinstance(task.encoder.plan, RequestPlan):
            self.model.progress.remark(task.encoder.plan.describe())
        before = head.calls or calls
        if any(before.get(key) != value for key, value in calls.items()):
            warn(
                f"results may differ: a round is split into other calls ({calls}) than when the "
                f"run started ({before})"
            )
        return structs.replace(head, calls=calls)

    def _with_signal(self, head: RunStart, task: FewShotTask, budget: Budget) -> RunStart:
        """Return run.json's content with the signal, measured once, before the first step.

        Raises: RefusedError; the refused run may be started again.
        """
        force, progress = self.run_config.force, self.model.progress
        precision = self.model.bundle.precision
        if head.signal is None and not self.folder.has_state:
            try:
                if task.config.perturbation_setting is None:
                    signal = signal_not_needed(NO_DIFFERENCES)
                elif task.images is not None:
                    signal = signal_unmeasured(*IMAGES_REENCODED, precision, force=force)
                elif self.model.served is not None and self.run_config.reference is None:
                    signal = signal_unmeasured(*SERVED, precision, force=force)
                elif precision_suffices(
                    precision,
                    self.model.execution.provider,
                    task.config.perturbation_setting[1],
                    self.published,
                ):
                    signal = signal_not_needed(FULL_PRECISION)
                else:
                    signal = require_signal(
                        lambda: self._measure_signal(task),
                        published=self.published,
                        force=force,
                        progress=progress,
                    )
            except RefusedError as error:
                refused = structs.replace(head, status="refused", signal=error.document)
                self.folder.write(plain(refused))
                raise
            head = structs.replace(head, signal=signal)
            self.folder.write(plain(head))
        if head.signal is not None and "probe_queries" in head.signal:
            n_probes = convert(
                head.signal["probe_queries"], Count, "run.json: signal.probe_queries"
            )
            budget.probe(n_probes, len(self.split.classes))
        return head

    @contextlib.contextmanager
    def _journal_queries(self, budget: Budget) -> Iterator[ServerRuntime | None]:
        """Record queries to a server in the journal; yield None without a server."""
        served = self.model.served
        if not isinstance(served, ServerRuntime):
            yield None
            return
        served.service.on_send = self.folder.open_journal(budget)
        try:
            yield served
        finally:
            served.service.on_send = None

    def _baselines(self, texts: F32 | None, encoded: EncodedSplit) -> Baselines:
        """Return the baselines: zero-shot and GDA."""
        bundle, began = self.model.bundle, time.monotonic()
        if texts is None:
            return Baselines({}, None, 0.0)
        shots = encoded.shots(texts, bundle.logit_scale, bundle.logit_bias)
        gda = fit_gda(GdaConfig(), shots, self.run_config.seed)
        zero_shot = classifier_of_texts(texts, bundle.logit_scale, bundle.logit_bias)
        classifiers = {"zero-shot": zero_shot, "gda": gda.classifier}
        return Baselines(classifiers, gda.chosen["alpha"], time.monotonic() - began)

    @cached_property
    def _store(self) -> TextStore | None:
        folder = self.folder.cache_folder(self.run_config.cache)
        return self.model.text_store(folder) if folder and self.stores_texts else None

    @property
    def _encoder(self) -> SplitEncoder:
        return SplitEncoder(self.run_config, self.split, self.folder, self.model)

    def _task(self, config: TunedConfig, encoded: EncodedSplit, texts: F32 | None) -> FewShotTask:
        """Open the method's task; `texts` are the templates' features f32[C, e]."""
        return open_task(
            self.run_config,
            self.split,
            encoded,
            self.model,
            config,
            self.start,
            texts,
            self._store,
        )

    def _tune(self, task: FewShotTask, budget: Budget, started: float) -> Outcome:
        """Tune from the saved state, if any, until the budget is spent."""
        run_config, config = self.run_config, task.config
        n_views, n_images = task.encoded.features.shape[:2]
        size = config.images_of(n_images, len(self.split.classes))
        wanted = min(config.batch_size or n_images, n_images)
        if size < wanted:
            warn(
                f"using logits of {size} images instead of {wanted}, to stay within memory_mb "
                "(increase memory_mb to use more)"
            )
        sampler = BatchSampler(
            n_images,
            size,
            n_views,
            np.random.default_rng([run_config.seed, 3]),
        )
        tuning = Tuning(task.optimizer, sampler, budget, started)
        self.folder.restore(tuning)
        progress, spent = self.model.progress, config.spends(run_config.queries)
        if config.notice:
            warn(config.notice)
        n_classes = len(self.split.classes)
        if config.ensembles and not has_kernel(n_images, n_classes, self.model.bundle.embed_dim):
            warn(
                f"{n_images} training images of {n_classes} classes are too many for kernels: "
                f"{run_config.method} has only its discriminant analyses"
            )
        if tuning.step:
            progress.remark(f"resuming after {tuning.budget.queries} of {spent} queries")

        def found(stop_reason: str) -> Result:
            settings = settings_of_result(find_method(run_config.method), config)
            provenance = self._provenance(tuning.budget.queries, stop_reason, settings)
            return task.result(provenance, sampler.current().images)

        marks = run_config.snapshot_marks(spent)
        if tuning.step and self.folder.lacks_snapshot(marks, tuning.budget.queries):
            # The state was saved, but the run stopped before the snapshot was written.
            self.folder.keep_snapshot(found("snapshot").artifact, tuning.budget.queries)
        marks = [m for m in marks if m > tuning.budget.queries]
        saving = SaveSchedule(every_step=self.model.served is not None)
        with progress.activity("tuning", spent) as ticker:

            def observe(now: Tuning, evaluation: Evaluation) -> None:
                self.folder.log(now, evaluation)
                reached = bool(marks) and now.budget.queries >= marks[0]
                while marks and now.budget.queries >= marks[0]:
                    marks.pop(0)
                if reached or saving.due():
                    with saving:
                        self.folder.save(now)
                if reached:  # after saving: the server may be unreachable by now
                    self.folder.keep_snapshot(found("snapshot").artifact, now.budget.queries)
                loss, accuracy = evaluation.losses.mean(), evaluation.accuracies.mean()
                text = f"loss {loss:.4f}, accuracy {accuracy:.1%}"
                ticker.update(now.budget.queries, text, " queries")

            try:
                stop_reason = tune(
                    tuning,
                    task.prompt_map,
                    task.objective,
                    n_classes,
                    observe,
                    task.held_out,
                    task.take_n_found,
                )
            except NotFiniteError as error:
                self.folder.save(tuning)
                raise ZtuneError(
                    f"query {budget.queries + error.candidate + 1}, {error}; "
                    f"{self.folder.where_saved}"
                ) from None
        self.folder.save(tuning)  # before the report, which may fail
        seconds, ended = tuning.seconds, time.monotonic()
        outcome = found(stop_reason)
        if config.ensembles:  # its heads are part of the method, as those of other heads are
            seconds, ended = tuning.seconds, time.monotonic()
        result = outcome.artifact
        try:
            loss = task.train_loss(result)
        except NotFiniteError:
            raise ZtuneError(
                f"after query {budget.queries} the recommended point has no finite loss (start a "
                f"new run with smaller steps; {self.folder.where_saved})"
            ) from None
        cuda_graph = task.encoder.cuda_graph if task.encoder is not None else None
        features = task.val_features(result)
        share = None
        if isinstance(result, ContextArtifact) and result.text_features is None:
            share = task.val_share()
        return Outcome(result, seconds, loss, features, ended, cuda_graph, share, outcome.held_out)

    def _fit(self, encoded: EncodedSplit, texts: F32 | None, started: float) -> Outcome:
        method, bundle = find_method(self.run_config.method), self.model.bundle
        assert isinstance(method, HeadMethod)
        assert texts is not None
        shots = encoded.shots(texts, bundle.logit_scale, bundle.logit_bias)
        config = self.run_config.method_config
        fitted = method.fit_shots(config, shots, self.run_config.seed)
        provenance = self._provenance(0, "closed form", dict(fitted.chosen))
        classifier = fitted.classifier
        artifact = HeadArtifact(
            self.split.classes,
            provenance,
            classifier.weight,
            classifier.bias,
            fingerprints(self.split),
            classifier.kernel,
        )
        losses = cross_entropy(classifier.logits(shots.features), shots.labels)
        loss, ended = float(losses.mean()), time.monotonic()
        held_out = None
        if encoded.val_features is None:
            held_out = held_out_logits(method, config, fitted, shots, self.run_config.seed)
        features = encoded.val_features
        return Outcome(artifact, ended - started, loss, features, ended, held_out=held_out)

    def _with_priors(self, outcome: Outcome, encoded: EncodedSplit) -> Outcome:
        """Return the outcome with probabilities that follow the classes' shares of the images."""
        artifact, held_out, labels = outcome.artifact, outcome.held_out, encoded.labels
        assert isinstance(artifact, HeadArtifact | EnsembleArtifact)
        ratios = log_prior_ratios(labels, len(self.split.classes))
        shift = ((artifact.temperature or 1.0) * ratios).astype(np.float32)
        artifact = artifact.with_priors(shift, DATA)
        if held_out is not None:
            held_out = held_out[0] + shift, held_out[1]
        views = [artifact.classifier().logits(view) for view in encoded.features]
        loss = float(np.mean([cross_entropy(view, labels) for view in views]))
        return replace(outcome, artifact=artifact, held_out=held_out, train_loss=loss)

    def _val_logits(self, outcome: Outcome, encoded: EncodedSplit) -> LabelledLogits | None:
        """Return the result's logits of the validation images; None without these or features."""
        if outcome.share is not None or outcome.val_features is None:
            return None
        logits = outcome.artifact.classifier().logits(outcome.val_features)
        return logits, encoded.val_labels

    def _validate(
        self,
        outcome: Outcome,
        baselines: Baselines,
        encoded: EncodedSplit,
        tuned: LabelledLogits | None,
    ) -> dict[str, Score | Proportion]:
        """Return the scores on the validation images by name; empty without such images."""
        features, labels, classes = encoded.val_features, encoded.val_labels, self.split.classes
        if outcome.share is not None:
            return {"tuned": outcome.share}
        if features is None or tuned is None:
            return {}
        others = baselines.classifiers
        return {
            "zero-shot": score(others["zero-shot"].logits(features), labels, classes),
            "tuned": score(*tuned, classes),
            "gda": score(others["gda"].logits(features), labels, classes),
        }

    def _cross_validate(self, outcome: Outcome, encoded: EncodedSplit) -> ValidationScore | None:
        """Return the accuracy on training images by fits without them.

        None for a method without such fits, or with a class of fewer than LEAST_JUDGED images.
        """
        classes = self.split.classes
        fewest = np.bincount(encoded.labels, minlength=len(classes)).min()
        if outcome.held_out is None or fewest < LEAST_JUDGED:
            return None
        found = score(*outcome.held_out, classes)
        return ValidationScore(found.accuracy, found.interval, found.n)

    def _hand_written(
        self, outcome: Outcome, baselines: Baselines, encoded: EncodedSplit
    ) -> ValidationScore | None:
        """Return the zero-shot accuracy on all training images, if there is a `_cross_validate`."""
        if self._cross_validate(outcome, encoded) is None or not baselines.classifiers:
            return None
        zero_shot = baselines.classifiers["zero-shot"]
        shots = encoded.shots(zero_shot.weight, 1.0, 0.0)
        found = score(zero_shot.logits(shots.queries), encoded.labels, self.split.classes)
        return ValidationScore(found.accuracy, found.interval, found.n)

    def _provenance(self, queries: int, stop_reason: str, config: dict[str, Json]) -> Provenance:
        bundle = self.model.bundle
        return Provenance(
            model_id=bundle.model_id,
            bundle_digest=bundle.digest,
            method=self.run_config.method,
            seed=self.run_config.seed,
            queries=queries,
            stop_reason=stop_reason,
            config=config,
        )


def has_curve(run_config: RunConfig) -> bool:
    """Return whether a run's steps show how its result becomes better.

    Those of an ensemble are its mixture's, without the heads.
    """
    tuned = run_config.tuned_config
    return tuned is not None and not tuned.ensembles


def draw_curve(folder: Store, report: RunReport) -> None:
    """Draw the curve of a run that has one."""
    run_config = report.run_config
    shown = {"zero-shot": "zero-shot", "tuned": "tuned", "gda": "GDA"}
    levels = {
        f"{shown[name]}, validation": found.accuracy for name, found in report.validation.items()
    }
    title = (
        f"{run_config.method} on {Path(run_config.data).name}, {run_config.shots_shown}, "
        f"seed {run_config.seed}"
    )
    folder.draw_curve(levels, title)


def _server_report(served: ServerRuntime, budget: Budget) -> ServerReport:
    service = served.service
    sent, received = service.payload_bytes
    return ServerReport(
        url=str(service.location),
        capabilities=tuple(sorted(served.capabilities)),
        sent=budget.sent,
        possibly_billed_twice=budget.possibly_billed_twice,
        report_queries=budget.report_queries,
        requests=service.requests,
        payload_mb_sent=round(sent / 1e6, 3),
        payload_mb_received=round(received / 1e6, 3),
    )

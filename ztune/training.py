"""One run from a split to its artifact: started, saved on the way, taken up again, finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from msgspec import structs

from runtimes.extractor import OrtExtractor
from runtimes.remote.served import RequestPlan, ServerRuntime
from ztune.access import TEXTS
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    HeadArtifact,
    Provenance,
    classifier_of_texts,
)
from ztune.budget import Budget
from ztune.checks import RunChecks
from ztune.data.folders import Listing
from ztune.data.relocate import relocate
from ztune.data.sources import read_source
from ztune.data.split import HOW_DRAWN, Split
from ztune.data.splitter import Digest, digest_file, make_split
from ztune.encoded import EncodedSplit, SplitEncoder, fingerprints
from ztune.errors import ConfigError, FormatError, NotFiniteError, ZtuneError
from ztune.io.config import as_json
from ztune.io.files import read_json, write_json
from ztune.io.schema import Count, convert, plain
from ztune.logits import FeatureClassifier
from ztune.loop import Tuning, tune
from ztune.methods.base import HeadMethod, TunedConfig
from ztune.methods.gda import GdaConfig, fit_gda
from ztune.methods.plugins import package_of
from ztune.methods.registry import find_method
from ztune.model import Model
from ztune.objective import BatchSampler, cross_entropy
from ztune.precision import (
    ENCODED_ANEW,
    FULL_PRECISION,
    NO_DIFFERENCES,
    SERVED,
    RefusedError,
    Signal,
    SignalCheck,
    leaves_enough,
    not_needed,
    open_reference,
    require_signal,
    unmeasured,
)
from ztune.progress import warn
from ztune.run import MemoryRun, RunFolder, SavePace
from ztune.run_config import RunConfig, remarks_on
from ztune.run_document import RunReport, RunStart, ServerReport, ValidationScore, run_start
from ztune.statistics import Score, Share, score
from ztune.system import machine, one_blas_thread, peak_memory_mb, return_free_memory, versions
from ztune.task import FewShotTask, MethodStart, compose, open_task
from ztune.types import F32, Evaluation, Json

Store = TypeVar("Store", RunFolder, MemoryRun)
# What the last bits of a result depend on.
_ARITHMETIC = (
    "ztune", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "processor", "cores",
)  # fmt: skip


def start_run(
    run_config: RunConfig,
    model: Model,
    path: Path,
    begun: Callable[[], None] = lambda: None,
    *,
    overwrite: bool = False,
) -> RunReport:
    """Start a run in a new folder and finish it; return run.json's content.

    `begun` is called once there is a run that could be resumed. With `overwrite` a run that is
    there already is removed, once what can be known before the first image is read is checked.

    Raises: ZtuneError for whatever cannot be as it was asked for, before anything is written;
        RefusedError where the precision leaves no signal.
    """
    RunFolder(path).require_free(overwrite=overwrite)
    dataset, split = read_split(run_config)
    for remark in _remarks_on_start(run_config, dataset, split):
        model.progress.remark(remark)
    return start_run_on(run_config, split, model, path, begun=begun, overwrite=overwrite)


def start_run_on(
    run_config: RunConfig,
    split: Split,
    model: Model,
    path: Path,
    encoded: EncodedSplit | None = None,
    begun: Callable[[], None] = lambda: None,
    *,
    overwrite: bool = False,
) -> RunReport:
    """Start a run on a split in a new folder and finish it; return run.json's content.

    `encoded` are the split's features, where they are known already; `overwrite` is as for
    `start_run`.

    Raises: as `start_run`.
    """
    folder = RunFolder(path)
    run = TrainingRun(run_config, split, folder, model, encoded)
    run.check(new=True)
    head = run.head()
    with folder.started(plain(head), split.to_json(), overwrite=overwrite):
        begun()
        return run.finish(head)


def _remarks_on_start(run_config: RunConfig, dataset: Listing, split: Split) -> Iterator[str]:
    yield from remarks_on(run_config)
    if run_config.preset == "published" and run_config.augment:
        yield (
            "preset published: random crops anew each step are approximated by "
            f"{run_config.augment} cached views per image"
        )
    if dataset.ignored:
        yield f"files that are no images of a class, left alone: {dataset.ignored}"
    yield from split.notes
    counts = [len(split.entries_of(role)) for role in ("train", "val", "test")]
    yield (
        f"{len(split.classes)} classes: {counts[0]} images to tune with, {counts[1]} for "
        f"validation, {counts[2]} kept for testing; {HOW_DRAWN[split.sampler]}"
    )


@dataclass(frozen=True)
class SavedRun:
    """A run that was begun, as its folder has it."""

    folder: RunFolder
    head: RunStart
    """What run.json says; a RunReport of a run that is finished."""

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path) -> Iterator[SavedRun]:
        """Yield the run of a folder while no other process may work on it.

        Raises: FormatError for a folder without a run; ConfigError where a process works on it.
        """
        folder = RunFolder(path)
        folder.read()
        with folder.locked():
            yield cls(folder, run_start(folder.read(), f'run "{path}": run.json'))

    @cached_property
    def run_config(self) -> RunConfig:
        """What the run was asked for, with the method's settings as they were then."""
        return replace(self.head.run_config, settings=self.head.config)

    def require_same(self, run_config: RunConfig, split: Split, model: Model) -> None:
        """See that a run was begun with the same model, method, settings and images.

        Raises: ConfigError naming what differs.
        """
        where, then = f'run "{self.folder.path}"', self.head.run_config
        own = ("method", "queries", "seed", "templates", "keep", "patience", "augment", "force")
        differ = [name for name in own if getattr(run_config, name) != getattr(then, name)]
        if not differ and plain(run_config.method_config) != plain(then.method_config):
            differ.append("settings")
        if self.head.package != package_of(run_config.method):
            differ.append("package of the method")
        if model.bundle.digest != self.head.bundle_digest:
            differ.append("model")
        if read_json(self.folder.split, where).get("entries") != split.to_json()["entries"]:
            differ.append("images (or by a ztune that divided them in another way)")
        if differ:
            raise ConfigError(
                f'run "{self.folder.path}" was begun with other {", ".join(differ)} (give the '
                "same, name another `run_dir`, or remove that folder)"
            )

    def resume(
        self,
        model: Model,
        encoded: EncodedSplit | None = None,
        *,
        files: bool = True,
        roots: Mapping[str, Path] | None = None,
    ) -> RunReport:
        """Finish the run as it was begun; return run.json's content.

        `encoded` are the split's features, where they are known already; without `files` its images
        are in memory. `roots` are folders that they have moved to (`resolve_roots`), which the run
        keeps.

        Raises: FormatError for another model than the run began with, or a damaged folder;
            ZtuneError for images that have changed.
        """
        if model.bundle.digest != self.head.bundle_digest:
            raise FormatError(
                f"{model.where} is not the one that the run began with (put it back, or start a "
                "new run)"
            )
        if self.head.package != (now := package_of(self.run_config.method)):
            raise ConfigError(
                f'run "{self.folder.path}" was begun with {self.run_config.method} of '
                f"{self.head.package or 'ztune'}, installed is {now or 'no such package'} "
                "(install that version, or start a new run)"
            )
        self._warn_of_changes()
        where = f'run "{self.folder.path}"'
        split = Split.from_json(read_json(self.folder.split, where), f"{where}: split.json")
        if roots:
            split = relocate(split, roots)
        if files:
            split.check_unchanged()
        if roots:
            write_json(self.folder.split, split.to_json())
        run = TrainingRun(self.run_config, split, self.folder, model, encoded)
        run.check()
        return run.finish(self.head)

    def _warn_of_changes(self) -> None:
        then = {**self.head.versions, **self.head.machine}
        now = {**versions(), **machine()}
        changed = [
            f"{k} {then.get(k)}, now {now.get(k)}" for k in _ARITHMETIC if then.get(k) != now.get(k)
        ]
        if changed:
            warn(f"not as when the run began, so bytes may differ: {'; '.join(changed)}")


def read_split(run_config: RunConfig, digest: Digest = digest_file) -> tuple[Listing, Split]:
    """Return the images that a run names, and how they are divided.

    Raises: ConfigError, DataError.
    """
    settings = run_config.split_settings()
    names = Path(run_config.names) if run_config.names else None
    root = Path(run_config.root) if run_config.root else None
    dataset = read_source(run_config.data, root, names)
    test_data = None
    if run_config.test_data:
        test_data = read_source(run_config.test_data, None, names, tuned=False)
    return dataset, make_split(dataset, settings, test_data, digest)


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind."""

    artifact: Artifact
    earlier_seconds: float
    """Spent by earlier processes of a resumed run."""
    train_loss: float
    """In nats, over all training images and views."""
    val_features: F32 | None
    """f32[n, e] of the validation images, as the artifact changes them."""
    ended: float
    """When the steps had ended and the report began, by time.monotonic()."""
    cuda_graph: str | None = None
    """Whether a round was captured as a CUDA graph, and if not why; None on a CPU."""
    share: Share | None = None
    """Of validation images right by the server's count, where it gives losses alone."""


@dataclass(frozen=True)
class Baselines:
    """What a result is compared with; nothing where texts' features are not given."""

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
    """The split's features, where they are known before the run."""

    @property
    def tuned(self) -> TunedConfig | None:
        """The configuration of a method that has steps."""
        return self.run_config.tuned_config

    @cached_property
    def start(self) -> MethodStart:
        """The map and the optimizer of a method that has steps: those that the run will use."""
        assert self.tuned is not None
        n_extracted = self.model.bundle.embed_dim
        if self.run_config.extractor is not None:
            extractor = Path(self.run_config.extractor)
            n_extracted = OrtExtractor(extractor, self.model.bundle, self.model.execution).width()
        return compose(self.run_config, self.tuned, self.model, n_extracted)

    @property
    def published(self) -> float:
        """The published value of the setting that the signal depends on."""
        assert self.tuned is not None
        finest = type(self.tuned)().finest
        assert finest is not None
        return finest[1]

    def head(self) -> RunStart:
        """Return what run.json says from the first moment on."""
        run_config, bundle = self.run_config, self.model.bundle
        return RunStart(
            status="running",
            method=run_config.method,
            package=package_of(run_config.method),
            seed=run_config.seed,
            config=as_json(run_config.method_config),
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
        """See that the run can be made, before anything is written; see `RunChecks.check`.

        A `new` run may take the place of another, whose signal is not its own.
        """
        measured = not new and self._signal_is_known()
        RunChecks(self.run_config, self.split, self.model, measured).check(lambda: self.start)

    def finish(self, head: RunStart) -> RunReport:
        """Run to the end from whatever is saved and draw the curve; return run.json's content."""
        report = self.carry_out(head)
        if self.tuned is not None:
            self._draw_curve(report.validation)
        return report

    def _draw_curve(self, validation: Mapping[str, ValidationScore]) -> None:
        run_config = self.run_config
        shown = {"zero-shot": "zero-shot", "tuned": "tuned", "gda": "GDA"}
        levels = {
            f"{shown[name]}, validation": found.accuracy for name, found in validation.items()
        }
        title = (
            f"{run_config.method} on {Path(run_config.data).name}, {run_config.shots} shots, "
            f"seed {run_config.seed}"
        )
        self.folder.draw_curve(levels, title)

    def carry_out(self, head: RunStart) -> RunReport:
        """Run to the end from whatever is saved, write all results; return run.json's content.

        `head` holds what run.json says from the first moment on.
        """
        started = time.monotonic()
        run_config = self.run_config
        # One tower at a time: each session is closed before the next is opened.
        changeable = self.tuned is not None and self.tuned.program is not None
        encoded = self.encoded or self._encoder.encode(changeable=changeable)
        own_cache = run_config.cache is None
        if head.image_forwards is None:
            costs = encoded.costs(own_cache, time.monotonic() - started)
            head = structs.replace(head, **costs)
        self.folder.write(plain(head))
        budget = Budget(run_config.queries, image_forwards=head.image_forwards or 0)
        with self._journalled(budget) as served:
            texts = None
            if TEXTS not in self.model.runtime.missing:
                texts = self.model.sentences(run_config.templates, self.split.classes)
            baselines = self._baselines(texts, encoded)
            return_free_memory()  # what the image tower and the fit have left
            if self.tuned is not None:
                with one_blas_thread():
                    task = self._task(self.tuned, encoded, texts)
                    head = self._planned(head, task)
                    head = self._with_signal(head, task, budget)
                    outcome = self._tuned(task, budget, started)
            else:
                outcome = self._fitted(encoded, texts)
        artifact = outcome.artifact
        scores = self._validated(outcome, baselines, encoded)
        n_bytes = self.folder.keep(artifact)
        known = {
            **structs.asdict(head),
            "status": "finished",
            "config": artifact.provenance.config,
            "image_forwards": budget.image_forwards,
        }
        report = RunReport(
            **known,
            queries=budget.queries,
            probe_queries=budget.probe_queries,
            text_forwards=budget.text_forwards,
            seconds=round(outcome.earlier_seconds + time.monotonic() - started, 3),
            report_seconds=round(baselines.seconds + time.monotonic() - outcome.ended, 3),
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
            gda_alpha=baselines.gda_alpha,
            server=None if served is None else _server_report(served, budget),
        )
        self.folder.write(plain(report))
        return report

    def signal(self) -> tuple[Signal, dict[str, Json]]:
        """Measure the signal alone: what `ztune doctor` reports."""
        config = self.tuned
        if config is None or config.program is not None or config.finest is None:
            what = "has no steps" if config is None else "encodes images anew"
            if config is not None and config.finest is None:
                what = "takes no differences of losses"
            raise ConfigError(f"{self.run_config.method} {what}, so there is no signal to measure")
        train, labels = self._encoder.training()
        none = np.zeros(0, dtype=np.int64)
        encoded = EncodedSplit(train.values, labels, None, none, 0, 0, 0)
        return self._measured(self._task(config, encoded, None))

    def _signal_is_known(self) -> bool:
        """Return whether this run was begun and measured its signal before."""
        if not self.folder.is_begun:
            return False
        return "signal" in self.folder.read() or self.folder.has_state

    def _measured(self, task: FewShotTask) -> tuple[Signal, dict[str, Json]]:
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

    def _planned(self, head: RunStart, task: FewShotTask) -> RunStart:
        """Return run.json's content with how a round is cut into calls, which a run keeps."""
        if task.encoder is None:
            return head
        calls = task.encoder.plan.to_json()
        if isinstance(task.encoder.plan, RequestPlan):
            self.model.progress.remark(task.encoder.plan.describe())
        before = head.calls or calls
        if any(before.get(key) != value for key, value in calls.items()):
            warn(
                f"a round is cut into other calls ({calls}) than when the run began ({before}), so "
                "bytes may differ"
            )
        return structs.replace(head, calls=calls)

    def _with_signal(self, head: RunStart, task: FewShotTask, budget: Budget) -> RunStart:
        """Return run.json's content with the signal, measured once, before the first step.

        Raises: RefusedError, and leaves a run that may be started anew.
        """
        force, progress = self.run_config.force, self.model.progress
        precision = self.model.bundle.precision
        if head.signal is None and not self.folder.has_state:
            try:
                if task.config.finest is None:
                    signal = not_needed(NO_DIFFERENCES)
                elif task.images is not None:
                    signal = unmeasured(*ENCODED_ANEW, precision, force=force)
                elif self.model.served is not None and self.run_config.reference is None:
                    signal = unmeasured(*SERVED, precision, force=force)
                elif leaves_enough(
                    precision,
                    self.model.execution.provider,
                    task.config.finest[1],
                    self.published,
                ):
                    signal = not_needed(FULL_PRECISION)
                else:
                    signal = require_signal(
                        lambda: self._measured(task),
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
    def _journalled(self, budget: Budget) -> Iterator[ServerRuntime | None]:
        """Write down whatever goes to a server as a query; yield None where there is no server."""
        served = self.model.served
        if not isinstance(served, ServerRuntime):
            yield None
            return
        served.service.on_send = self.folder.sending(budget)
        try:
            yield served
        finally:
            served.service.on_send = None

    def _baselines(self, texts: F32 | None, encoded: EncodedSplit) -> Baselines:
        """Return what a result is compared with: hand-written prompts and GDA."""
        bundle, began = self.model.bundle, time.monotonic()
        if texts is None:
            return Baselines({}, None, 0.0)
        shots = encoded.shots(texts, bundle.logit_scale, bundle.logit_bias)
        gda = fit_gda(GdaConfig(), shots, self.run_config.seed)
        zero_shot = classifier_of_texts(texts, bundle.logit_scale, bundle.logit_bias)
        classifiers = {"zero-shot": zero_shot, "gda": gda.classifier}
        return Baselines(classifiers, gda.chosen["alpha"], time.monotonic() - began)

    @property
    def _encoder(self) -> SplitEncoder:
        return SplitEncoder(self.run_config, self.split, self.folder, self.model)

    def _task(self, config: TunedConfig, encoded: EncodedSplit, texts: F32 | None) -> FewShotTask:
        """Return the method at its start, and what evaluates it.

        `texts` f32[C, e] are the hand-written prompts'.
        """
        return open_task(
            self.run_config, self.split, encoded, self.model, config, self.start, texts
        )

    def _tuned(self, task: FewShotTask, budget: Budget, started: float) -> Outcome:
        """Spend the queries, from the saved state where there is one."""
        run_config, config = self.run_config, task.config
        n_views, n_images = task.encoded.features.shape[:2]
        size = config.images_of(n_images, len(self.split.classes))
        wanted = min(config.batch_size or n_images, n_images)
        if size < wanted:
            warn(
                f"logits are kept of {size} images instead of {wanted}: more would take more "
                "than memory_mb"
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
        if tuning.step:
            progress.remark(f"going on after {tuning.budget.queries} of {spent} queries")

        def artifact(stop_reason: str) -> Artifact:
            provenance = self._provenance(tuning.budget.queries, stop_reason, as_json(config))
            return task.result(provenance)

        marks = run_config.snapshot_marks(spent)
        if tuning.step and self.folder.lacks_snapshot(marks, tuning.budget.queries):
            # Saved, and stopped before it was written.
            self.folder.keep_snapshot(artifact("snapshot"), tuning.budget.queries)
        marks = [m for m in marks if m > tuning.budget.queries]
        saving = SavePace(every_step=self.model.served is not None)
        with progress.activity("tuning", spent) as ticker:

            def observe(now: Tuning, evaluation: Evaluation) -> None:
                self.folder.log(now, evaluation)
                reached = bool(marks) and now.budget.queries >= marks[0]
                while marks and now.budget.queries >= marks[0]:
                    marks.pop(0)
                if reached or saving.due():
                    with saving:
                        self.folder.save(now)
                if reached:  # after it: a server may be away by now, and the step was answered
                    self.folder.keep_snapshot(artifact("snapshot"), now.budget.queries)
                loss, accuracy = evaluation.losses.mean(), evaluation.accuracies.mean()
                text = f"loss {loss:.4f}, accuracy {accuracy:.1%}"
                ticker.update(now.budget.queries, text, " queries")

            n_classes = len(self.split.classes)
            try:
                stop_reason = tune(
                    tuning, task.prompt_map, task.objective, n_classes, observe, task.held_out
                )
            except NotFiniteError as error:
                self.folder.save(tuning)
                raise ZtuneError(
                    f"query {budget.queries + error.candidate + 1}, {error}; "
                    f"{self.folder.where_saved}"
                ) from None
        self.folder.save(tuning)  # what follows is a report, and may fail
        ended = time.monotonic()
        result = artifact(stop_reason)
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
        return Outcome(result, tuning.earlier, loss, features, ended, cuda_graph, share)

    def _fitted(self, encoded: EncodedSplit, texts: F32 | None) -> Outcome:
        method, bundle = find_method(self.run_config.method), self.model.bundle
        assert isinstance(method, HeadMethod)
        assert texts is not None
        shots = encoded.shots(texts, bundle.logit_scale, bundle.logit_bias)
        fitted = method.fitted(self.run_config.method_config, shots, self.run_config.seed)
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
        return Outcome(artifact, 0.0, float(losses.mean()), encoded.val_features, time.monotonic())

    def _validated(
        self, outcome: Outcome, baselines: Baselines, encoded: EncodedSplit
    ) -> dict[str, Score | Share]:
        """Return the scores on the validation images by name; empty without such images."""
        features, labels, classes = encoded.val_features, encoded.val_labels, self.split.classes
        if outcome.share is not None:
            return {"tuned": outcome.share}
        if features is None or outcome.val_features is None:
            return {}
        tuned = outcome.artifact.classifier().logits(outcome.val_features)
        others = baselines.classifiers
        return {
            "zero-shot": score(others["zero-shot"].logits(features), labels, classes),
            "tuned": score(tuned, labels, classes),
            "gda": score(others["gda"].logits(features), labels, classes),
        }

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


def _server_report(served: ServerRuntime, budget: Budget) -> ServerReport:
    service = served.service
    sent, received = service.payload_bytes
    return ServerReport(
        url=str(service.location),
        capabilities=tuple(sorted(served.access)),
        sent=budget.sent,
        possibly_billed_twice=budget.possibly_billed_twice,
        report_queries=budget.report_queries,
        requests=service.requests,
        payload_mb_sent=round(sent / 1e6, 3),
        payload_mb_received=round(received / 1e6, 3),
    )

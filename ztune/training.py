"""A tuning run from split to artifact, started or taken up again; the verb `tune` calls it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.remote.served import RequestPlan, Served
from ztune.access import TEXTS
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    HeadArtifact,
    Provenance,
    classifier_of_texts,
    write_artifact,
)
from ztune.budget import Budget
from ztune.checks import Feasibility, composed, start_config
from ztune.cli.pictures import Album, Pictures, fingerprints
from ztune.cli.server import Wire
from ztune.compositions.base import TunedConfig
from ztune.data.folders import Dataset
from ztune.data.sources import read_source
from ztune.data.split import Split, digest_pictures, make_split
from ztune.errors import ConfigError, NotFiniteError, ZtuneError
from ztune.heads.gda import GdaConfig, fit_gda
from ztune.heads.shots import Fitted
from ztune.io.config import as_json
from ztune.io.fields import Fields
from ztune.journal import Journal
from ztune.logits import FeatureClassifier
from ztune.loop import Tuning, tune
from ztune.methods import (
    HeadMethod,
    find_method,
    tuned_config,
)
from ztune.model import Workbench
from ztune.objective import BatchSampler, cross_entropy
from ztune.precision import (
    ENCODED_ANEW,
    SERVED,
    Gate,
    RefusedError,
    no_differences,
    open_reference,
    pass_gate,
    unmeasured,
)
from ztune.progress import warn
from ztune.run import RunFolder, SavePace
from ztune.run_config import Request
from ztune.signal import Signal
from ztune.statistics import Score, Share, score
from ztune.system import machine, one_blas_thread, peak_memory_mb, return_free_memory, versions
from ztune.task import Assembly, Parts
from ztune.types import F32, Evaluation, Json


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind."""

    artifact: Artifact
    earlier_seconds: float
    """Spent by earlier processes of a resumed run."""
    train_loss: float
    """In nats, over all training pictures and views."""
    val_features: F32 | None
    """f32[n, e] of the validation pictures, as the artifact changes them."""
    ended: float
    """When the steps had ended and the report began, by time.monotonic()."""
    cuda_graph: str | None = None
    """Whether a round was captured as a CUDA graph, and if not why; None on a CPU."""
    share: Share | None = None
    """Of validation pictures right by the server's count, where it gives losses alone."""


@dataclass(frozen=True)
class Beside:
    """What a result is compared with; nothing where texts' features are not given."""

    compared: Mapping[str, FeatureClassifier]
    gda_alpha: Json
    seconds: float


@dataclass(frozen=True)
class Work:
    """One run in progress."""

    request: Request
    split: Split
    folder: RunFolder
    bench: Workbench

    @cached_property
    def config(self) -> Any:
        return start_config(self.request)

    @cached_property
    def tuned(self) -> TunedConfig | None:
        """The configuration of a method that has steps."""
        return tuned_config(find_method(self.request.method), self.config)

    @property
    def published(self) -> float:
        """The published value of the setting that the signal depends on."""
        assert self.tuned is not None
        finest = type(self.tuned)().finest
        assert finest is not None
        return finest[1]

    def carry_out(self, head: Mapping[str, Json]) -> dict[str, Json]:
        """Run to the end from whatever is saved, write all results, return run.json's content.

        `head` holds what run.json says from the first moment on.
        """
        started = time.monotonic()
        request = self.request
        # One tower at a time: each session is closed before the next is opened.
        changeable = self.tuned is not None and self.tuned.program is not None
        album = Album(request, self.split, self.folder, self.bench)
        pictures = album.pictures(changeable=changeable)
        own_cache = request.cache is None
        head = {**pictures.costs(own_cache, time.monotonic() - started), **head}
        self.folder.write(head)
        budget = Budget(
            request.queries, image_forwards=Fields(head, "run.json").integer("image_forwards")
        )
        with self._journalled(budget) as wire:
            texts = None
            if TEXTS not in self.bench.runtime.withheld:
                texts = self.bench.sentences(request.templates, self.split.classes)
            beside = self._beside(texts, pictures)
            return_free_memory()  # what the image tower and the fit have left
            if self.tuned is not None:
                with one_blas_thread():
                    parts = self._assembled(self.tuned, pictures, texts)
                    head = self._planned(head, parts)
                    head = self._through_the_gate(head, parts, pictures, budget)
                    outcome = self._tuned(parts, pictures, budget, started)
            else:
                outcome = self._fitted(pictures, texts)
        artifact = outcome.artifact
        scores = self._validated(outcome, beside, pictures)
        write_artifact(self.folder.prompt, artifact)
        document: dict[str, Json] = {
            **head,
            "status": "finished",
            "config": dict(artifact.provenance.config),
            "queries": budget.queries,
            "probe_queries": budget.probe_queries,
            "text_forwards": budget.text_forwards,
            "image_forwards": budget.image_forwards,
            "seconds": round(outcome.earlier_seconds + time.monotonic() - started, 3),
            "report_seconds": round(beside.seconds + time.monotonic() - outcome.ended, 3),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "result_bytes": self.folder.prompt.stat().st_size,
            "stop_reason": artifact.provenance.stop_reason,
            "cuda_graph": outcome.cuda_graph,
            "loss": "cross-entropy" if self.tuned is None or not self.tuned.focal else "focal",
            "train_loss": outcome.train_loss,
            "val_accuracy": scores["tuned"].accuracy if scores else None,
            "validation": {
                name: {"accuracy": s.accuracy, "interval": list(s.interval), "n": s.n}
                for name, s in scores.items()
            },
            "gda_alpha": beside.gda_alpha,
        }
        if wire is not None:
            document["server"] = wire.to_json(budget)
        self.folder.write(document)
        return document

    def check(self) -> None:
        """See that the run can be made, before anything is written; see `Feasibility.check`."""
        measured = self._gate_is_passed()
        Feasibility(self.request, self.split, self.bench, self.config, measured).check()

    def signal(self) -> tuple[Signal, dict[str, Json]]:
        """Measure the signal alone: what `ztune doctor` reports."""
        config = self.tuned
        if config is None or config.program is not None or config.finest is None:
            what = "has no steps" if config is None else "encodes pictures anew"
            if config is not None and config.finest is None:
                what = "takes no differences of losses"
            raise ConfigError(f"{self.request.method} {what}, so there is no signal to measure")
        train, labels = Album(self.request, self.split, self.folder, self.bench).training()
        none = np.zeros(0, dtype=np.int64)
        pictures = Pictures(train.values, labels, None, none, 0, 0, 0)
        parts = self._assembled(config, pictures, None)
        return self._measured(parts, pictures)

    def _gate_is_passed(self) -> bool:
        """Return whether this run was begun and measured its signal before."""
        if not self.folder.run.exists():
            return False
        return "signal" in self.folder.read() or self.folder.state.exists()

    def _measured(self, parts: Parts, pictures: Pictures) -> tuple[Signal, dict[str, Json]]:
        reference = open_reference(self.request.reference, self.bench.bundle)
        gate = Gate(self.bench, self.split.classes, self.request.seed, reference)
        return gate.measure(
            parts.config,
            parts.optimizer,
            parts.prompt_map,
            parts.objective,
            pictures.features,
            pictures.labels,
        )

    def _planned(self, head: Mapping[str, Json], parts: Parts) -> Mapping[str, Json]:
        """Return run.json's content with how a round is cut into calls, which a run keeps."""
        if parts.encoder is None:
            return head
        calls = parts.encoder.plan.to_json()
        if isinstance(parts.encoder.plan, RequestPlan):
            self.bench.progress.remark(parts.encoder.plan.described())
        if head.get("calls", calls) != calls:
            warn(
                f"a round is cut into other calls ({calls}) than when the run began "
                f"({head['calls']}), so bytes may differ"
            )
        return {**head, "calls": calls}

    def _through_the_gate(
        self, head: Mapping[str, Json], parts: Parts, pictures: Pictures, budget: Budget
    ) -> Mapping[str, Json]:
        """Return run.json's content with the signal, measured once, before the first step.

        Raises: RefusedError, and leaves a run that may be started anew.
        """
        force, progress = self.request.force, self.bench.progress
        precision = self.bench.bundle.precision
        if "signal" not in head and not self.folder.state.exists():
            try:
                if parts.config.finest is None:
                    signal = no_differences()
                elif parts.images is not None:
                    signal = unmeasured(*ENCODED_ANEW, precision, force=force)
                elif self.bench.served is not None and self.request.reference is None:
                    signal = unmeasured(*SERVED, precision, force=force)
                else:
                    signal = pass_gate(
                        lambda: self._measured(parts, pictures),
                        published=self.published,
                        force=force,
                        progress=progress,
                    )
            except RefusedError as error:
                self.folder.write({**head, "status": "refused", "signal": error.document})
                raise
            head = {**head, "signal": signal}
            self.folder.write(head)
        if "signal" in head:
            kept = Fields(head, "run.json").object("signal")
            if "probe_queries" in kept.values:
                budget.probe(kept.integer("probe_queries"), len(self.split.classes))
        return head

    @contextlib.contextmanager
    def _journalled(self, budget: Budget) -> Iterator[Wire | None]:
        """Write down whatever goes to a server as a query; None where there is no server."""
        served = self.bench.served
        if not isinstance(served, Served):
            yield None
            return
        served.service.sending = Journal(self.folder.journal, budget)
        try:
            yield Wire(served)
        finally:
            served.service.sending = None

    def _beside(self, texts: F32 | None, pictures: Pictures) -> Beside:
        """Return what a result is compared with: hand-written prompts and GDA."""
        bundle, began = self.bench.bundle, time.monotonic()
        if texts is None:
            return Beside({}, None, 0.0)
        shots = pictures.shots(texts, bundle.logit_scale, bundle.logit_bias)
        gda = fit_gda(GdaConfig(), shots, self.request.seed)
        zero_shot = classifier_of_texts(texts, bundle.logit_scale, bundle.logit_bias)
        compared = {"zero-shot": zero_shot, "gda": gda.classifier}
        return Beside(compared, gda.chosen["alpha"], time.monotonic() - began)

    def _assembly(self, config: TunedConfig, pictures: Pictures) -> Assembly:
        request = self.request
        return Assembly(
            self.bench, self.split, pictures, config, request.templates, request.extractor
        )

    def _assembled(self, config: TunedConfig, pictures: Pictures, texts: F32 | None) -> Parts:
        """Return the method at its start, and what evaluates it.

        `texts` f32[C, e] are the hand-written sentences'.
        """
        changeable = pictures.changeable
        n_extracted = 0 if changeable is None else changeable.extracted.shape[-1]
        return self._assembly(config, pictures).parts(
            *composed(self.request, config, self.bench, n_extracted), texts
        )

    def _tuned(self, parts: Parts, pictures: Pictures, budget: Budget, started: float) -> Outcome:
        """Spend the queries, from the saved state where there is one."""
        request, config = self.request, parts.config
        n_views, n_pictures = pictures.features.shape[:2]
        size = config.pictures_of(n_pictures, len(self.split.classes))
        wanted = min(config.batch_size or n_pictures, n_pictures)
        if size < wanted:
            warn(
                f"logits are kept of {size} pictures instead of {wanted}: more would take more "
                "than memory_mb"
            )
        sampler = BatchSampler(
            n_pictures,
            size,
            n_views,
            np.random.default_rng([request.seed, 3]),
        )
        tuning = Tuning(parts.optimizer, sampler, budget, started)
        self.folder.restore(tuning)
        progress, spent = self.bench.progress, config.spends(request.queries)
        if config.notice:
            warn(config.notice)
        if tuning.step:
            progress.remark(f"going on after {tuning.budget.queries} of {spent} queries")
        assembly = self._assembly(config, pictures)

        def artifact(stop_reason: str) -> Artifact:
            provenance = self._provenance(tuning.budget.queries, stop_reason, as_json(config))
            return assembly.result(parts, provenance)

        marks = request.snapshot_marks(spent)
        if tuning.step and self.folder.lacks_snapshot(marks, tuning.budget.queries):
            # Saved, and stopped before it was written.
            write_artifact(self.folder.snapshot(tuning.budget.queries), artifact("snapshot"))
        marks = [m for m in marks if m > tuning.budget.queries]
        saving = SavePace(every_step=self.bench.served is not None)
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
                    write_artifact(self.folder.snapshot(now.budget.queries), artifact("snapshot"))
                loss, accuracy = evaluation.losses.mean(), evaluation.accuracies.mean()
                text = f"loss {loss:.4f}, accuracy {accuracy:.1%}"
                ticker.update(now.budget.queries, text, " queries")

            n_classes = len(self.split.classes)
            try:
                stop_reason = tune(
                    tuning, parts.prompt_map, parts.objective, n_classes, observe, parts.held_out
                )
            except NotFiniteError as error:
                self.folder.save(tuning)
                raise ZtuneError(
                    f"query {budget.queries + error.candidate + 1}, {error}; the state before it "
                    f"is saved in {self.folder.state}"
                ) from None
        self.folder.save(tuning)  # what follows is a report, and may fail
        ended = time.monotonic()
        result = artifact(stop_reason)
        try:
            loss = assembly.train_loss(parts, result)
        except NotFiniteError:
            raise ZtuneError(
                f"after query {budget.queries} the recommended point has no finite loss (start a "
                f"new run with smaller steps; the state is saved in {self.folder.state})"
            ) from None
        cuda_graph = parts.encoder.cuda_graph if parts.encoder is not None else None
        features = assembly.val_features(parts, result)
        share = None
        if isinstance(result, ContextArtifact) and result.text_features is None:
            share = assembly.val_share(parts)
        return Outcome(result, tuning.earlier, loss, features, ended, cuda_graph, share)

    def _fitted(self, pictures: Pictures, texts: F32 | None) -> Outcome:
        method, bundle = find_method(self.request.method), self.bench.bundle
        assert isinstance(method, HeadMethod)
        assert texts is not None
        shots = pictures.shots(texts, bundle.logit_scale, bundle.logit_bias)
        fitted: Fitted = method.fit(self.config, shots, self.request.seed)
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
        return Outcome(artifact, 0.0, float(losses.mean()), pictures.val_features, time.monotonic())

    def _validated(
        self, outcome: Outcome, beside: Beside, pictures: Pictures
    ) -> dict[str, Score | Share]:
        """Return the scores on the validation pictures by name; empty without such pictures."""
        features, labels, classes = pictures.val_features, pictures.val_labels, self.split.classes
        if outcome.share is not None:
            return {"tuned": outcome.share}
        if features is None or outcome.val_features is None:
            return {}
        tuned = outcome.artifact.classifier().logits(outcome.val_features)
        return {
            "zero-shot": score(beside.compared["zero-shot"].logits(features), labels, classes),
            "tuned": score(tuned, labels, classes),
            "gda": score(beside.compared["gda"].logits(features), labels, classes),
        }

    def _provenance(self, queries: int, stop_reason: str, config: dict[str, Json]) -> Provenance:
        bundle = self.bench.bundle
        return Provenance(
            model_id=bundle.model_id,
            bundle_digest=bundle.digest,
            method=self.request.method,
            seed=self.request.seed,
            queries=queries,
            stop_reason=stop_reason,
            config=config,
        )


def opening(request: Request, bench: Workbench, split: Split) -> dict[str, Json]:
    """Return what run.json says from the first moment on."""
    return {
        "status": "running",
        "method": request.method,
        "seed": request.seed,
        "config": as_json(start_config(request)),
        "provider": bench.runtime.provider,
        "precision": bench.bundle.precision,
        "model_id": bench.bundle.model_id,
        "bundle_digest": bench.bundle.digest,
        "classes": len(split.classes),
        "versions": dict(versions()),
        "machine": dict(machine()),
        "request": as_json(request),
    }


def task_of(request: Request) -> tuple[Dataset, Split]:
    """Return the pictures that a request names, and how they are divided."""
    settings = request.split_settings()
    names = Path(request.names) if request.names else None
    root = Path(request.root) if request.root else None
    dataset = read_source(request.data, root, names)
    test_data = None
    if request.test_data:
        other = read_source(request.test_data, None, names, tuned=False)
        test_data = other, digest_pictures(other)
    digests = digest_pictures(dataset)
    return dataset, make_split(dataset, digests, settings, test_data, published=root is not None)

"""A tuning run from split to artifact, started or taken up again; the verb `tune` calls it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.ort import OrtPromptEncoder, plan_for
from runtimes.prompts import context_of_words, name_tokens, shared_starts, template_sentences
from runtimes.scores import OrtScores
from ztune.artifact import Artifact, ContextArtifact, HeadArtifact, Provenance, write_artifact
from ztune.budget import Budget
from ztune.cli.gate import Gate, RefusedError, open_reference, pass_gate
from ztune.cli.request import Request
from ztune.cli.workbench import Workbench
from ztune.config import as_json
from ztune.data.features import Features
from ztune.data.folders import Dataset, read_dataset
from ztune.data.split import Split, digest_pictures, make_split
from ztune.errors import ConfigError, ZtuneError
from ztune.fields import Fields
from ztune.heads.gda import GdaConfig, fit_gda
from ztune.methods import ZipConfig, build_zip, find_method, initial_context, method_config
from ztune.objective import BatchSampler, FewShotObjective, NumpyScores, cross_entropy
from ztune.report import draw_curve
from ztune.run import RunFolder
from ztune.signal import Signal
from ztune.statistics import Score, score
from ztune.system import machine, one_blas_thread, peak_memory_mb, return_free_memory, versions
from ztune.tune import Tuning, tune
from ztune.types import F32, F64, I64, Batch, Evaluation, Json, Optimizer, PromptMap, Scorer

# Seconds between saved states. Steps done again after a kill give the same numbers and cost nothing
# on a local model, while flushing every one of them to the disk costs more than a small model does.
_SAVE_INTERVAL = 1.0


@dataclass(frozen=True)
class Pictures:
    """The encoded pictures that a run may see: never those kept for testing."""

    features: F32
    """f32[V, N, e], the training pictures and their views."""
    labels: I64
    val_features: F32 | None
    """f32[n, e], None without validation pictures."""
    val_labels: I64
    n_encoded: int
    n_cached: int
    n_broken: int


def start_config(request: Request) -> ZipConfig | GdaConfig:
    """Return the method's configuration, checked against the budget.

    Raises: ConfigError, among others when the budget is less than one step.
    """
    config = method_config(find_method(request.method), request.settings)
    if isinstance(config, ZipConfig) and request.queries < config.queries_per_step():
        raise ConfigError(
            f"--queries {request.queries} is less than one step of {request.method}, which costs "
            f"{config.queries_per_step()}"
        )
    return config


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind."""

    artifact: Artifact
    earlier_seconds: float
    """Spent by earlier processes of a resumed run."""
    train_loss: float
    """In nats, over all training pictures and views."""
    cuda_graph: str | None = None
    """Whether a round was captured as a CUDA graph, and if not why; None on a CPU."""


@dataclass(frozen=True)
class Parts:
    """A tuned method at its start, and what answers it."""

    config: ZipConfig
    encoder: OrtPromptEncoder
    objective: FewShotObjective
    prompt_map: PromptMap
    optimizer: Optimizer


@dataclass(frozen=True)
class Work:
    """One run in progress."""

    request: Request
    split: Split
    folder: RunFolder
    bench: Workbench

    def carry_out(self, head: Mapping[str, Json]) -> dict[str, Json]:
        """Run to the end from whatever is saved, write all results, return run.json's content.

        `head` holds what run.json says from the first moment on.
        """
        started = time.monotonic()
        config = start_config(self.request)
        classes = self.split.classes
        # One tower at a time: each session is closed before the next is opened.
        pictures = _encode(self.request, self.split, self.folder, self.bench)
        own_cache = self.request.cache is None
        head = {**_image_costs(pictures, own_cache, time.monotonic() - started), **head}
        self.folder.write(head)
        budget = Budget(
            self.request.queries,
            image_forwards=Fields(head, "run.json").integer("image_forwards"),
        )
        zero_shot = self.bench.zero_shot(self.request.template, classes)
        gda, alpha = _gda(config, self.request, pictures, zero_shot)
        return_free_memory()  # what the image tower and the fit have left
        if isinstance(config, ZipConfig):
            with one_blas_thread():
                parts = self._assembled(config, pictures.features, pictures.labels)
                head = self._planned(head, parts)
                head = self._through_the_gate(head, parts, pictures, budget)
                outcome = self._tuned(parts, pictures, budget, started)
        else:
            outcome = self._fitted(gda, alpha, pictures)
        artifact = outcome.artifact
        scores = _validate(artifact, zero_shot, gda, pictures, classes)
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
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "stop_reason": artifact.provenance.stop_reason,
            "cuda_graph": outcome.cuda_graph,
            "train_loss": outcome.train_loss,
            "val_accuracy": scores["tuned"].accuracy if scores else None,
            "validation": {
                name: {"accuracy": s.accuracy, "interval": list(s.interval), "n": s.n}
                for name, s in scores.items()
            },
            "gda_alpha": alpha,
        }
        self.folder.write(document)
        if isinstance(config, ZipConfig):
            _draw(self.request, self.folder, scores)
        return document

    def check(self) -> None:
        """See that classes and settings fit the text tower, before anything is written.

        Raises: DataError naming the class that does not, or two that the model cannot tell apart;
            ConfigError for a setting.
        """
        bundle, tokenizer, classes = self.bench.bundle, self.bench.tokenizer, self.split.classes
        execution = self.bench.execution
        sentences = template_sentences(bundle, tokenizer, self.request.template, classes)
        for _, start, rests in shared_starts(sentences):
            plan_for(bundle, rests, len(start), 1, execution)
        config = start_config(self.request)
        if isinstance(config, ZipConfig):
            context = self._initial_context(config)
            names = name_tokens(bundle.text, tokenizer, classes, len(context))
            plan_for(bundle, names, len(context), config.queries_per_step(), execution)
            build_zip(config, context, self.request.seed)  # refuses sizes that do not fit
            if not self._gate_is_passed():
                open_reference(self.request.reference, bundle)
        elif self.request.reference or self.request.force:
            raise ConfigError(
                f"{self.request.method} has no steps, so no signal to measure: leave out "
                "--reference and --force"
            )
        tokenizer.release()  # every text of the run has been seen
        return_free_memory()

    def _initial_context(self, config: ZipConfig) -> F32:
        """Return the start f32[m, d]: random, or the words asked for."""
        if config.init == "random":
            return initial_context(config, self.bench.bundle.text.width, self.request.seed)
        return context_of_words(self.bench.bundle, self.bench.tokenizer, config.init)

    def signal(self) -> tuple[Signal, dict[str, Json]]:
        """Measure the signal alone: what `ztune doctor` reports."""
        config = start_config(self.request)
        if not isinstance(config, ZipConfig):
            raise ConfigError(f"{self.request.method} has no steps, so no signal to measure")
        train, labels = _encode_training(self.request, self.split, self.folder, self.bench)
        parts = self._assembled(config, train.values, labels)
        return self._measured(parts, train.values, labels)

    def _gate_is_passed(self) -> bool:
        """Return whether this run was begun and measured its signal before."""
        if not self.folder.run.exists():
            return False
        return "signal" in self.folder.read() or self.folder.state.exists()

    def _measured(self, parts: Parts, features: F32, labels: I64) -> tuple[Signal, dict[str, Json]]:
        reference = open_reference(self.request.reference, self.bench.bundle)
        gate = Gate(self.bench, self.split.classes, self.request.seed, reference)
        return gate.measure(
            parts.config, parts.optimizer, parts.prompt_map, parts.objective, features, labels
        )

    def _planned(self, head: Mapping[str, Json], parts: Parts) -> Mapping[str, Json]:
        """Return run.json's content with how a round is cut into calls, which a run keeps."""
        calls = parts.encoder.plan.to_json()
        if head.get("calls", calls) != calls:
            self.bench.output.warn(
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
        if "signal" not in head and not self.folder.state.exists():
            try:
                signal = pass_gate(
                    lambda: self._measured(parts, pictures.features, pictures.labels),
                    force=self.request.force,
                    output=self.bench.output,
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

    def _assembled(self, config: ZipConfig, features: F32, labels: I64) -> Parts:
        """Return the method at its start, and what evaluates it on f32[V, N, e]."""
        context = self._initial_context(config)
        encoder = self.bench.prompt_graph.encoder(
            self.split.classes, len(context), config.queries_per_step()
        )
        objective = FewShotObjective(self._scorer(encoder, features), labels)
        return Parts(config, encoder, objective, *build_zip(config, context, self.request.seed))

    def _scorer(self, encoder: OrtPromptEncoder, features: F32) -> Scorer:
        """Return what computes losses: the host beside a CPU, else the device itself."""
        bundle, execution = self.bench.bundle, self.bench.execution
        scale, bias = bundle.logit_scale, bundle.logit_bias
        if execution.provider == "cpu":
            return NumpyScores(encoder, features, scale, bias)
        return OrtScores(encoder, features, scale, bias, execution)

    def _tuned(self, parts: Parts, pictures: Pictures, budget: Budget, started: float) -> Outcome:
        """Spend the queries, from the saved state where there is one."""
        request, bundle, config = self.request, self.bench.bundle, parts.config
        n_views, n_pictures = pictures.features.shape[:2]
        sampler = BatchSampler(
            n_pictures, config.batch_size, n_views, np.random.default_rng([request.seed, 3])
        )
        tuning = Tuning(parts.optimizer, sampler, budget, started)
        self.folder.restore(tuning)
        output = self.bench.output
        if tuning.step:
            output.remark(f"going on after {tuning.budget.queries} of {request.queries} queries")
        saved = time.monotonic()
        with output.progress("tuning", request.queries) as ticker:

            def observe(now: Tuning, evaluation: Evaluation) -> None:
                nonlocal saved
                self.folder.log(now, evaluation)
                if time.monotonic() - saved >= _SAVE_INTERVAL:
                    self.folder.save(now)
                    saved = time.monotonic()
                loss, accuracy = evaluation.losses.mean(), evaluation.accuracies.mean()
                text = f"loss {loss:.4f}, accuracy {accuracy:.1%}"
                ticker.update(now.budget.queries, text, " queries")

            stop_reason = tune(
                tuning, parts.prompt_map, parts.objective, len(self.split.classes), observe
            )
        tuned = parts.prompt_map(parts.optimizer.recommend()[None])[0]
        artifact = ContextArtifact(
            self.split.classes,
            self._provenance(tuning.budget.queries, stop_reason, as_json(config)),
            tuned,
            parts.encoder.encode(tuned[None])[0],
            bundle.logit_scale,
            bundle.logit_bias,
            _fingerprints(self.split),
        )
        train_loss = _train_loss(parts.objective, pictures, tuned)
        return Outcome(artifact, tuning.earlier, train_loss, parts.encoder.cuda_graph)

    def _fitted(self, head: tuple[F32, F32], alpha: float, pictures: Pictures) -> Outcome:
        weight, bias = head
        provenance = self._provenance(0, "closed form", {"alpha": alpha})
        artifact = HeadArtifact(
            self.split.classes, provenance, weight, bias, _fingerprints(self.split)
        )
        logits = pictures.features @ weight.T + bias
        train_loss = float(cross_entropy(logits, pictures.labels).mean())
        return Outcome(artifact, 0.0, train_loss)

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
        "provider": bench.execution.provider,
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
    dataset = read_dataset(Path(request.data), names)
    test_data = None
    if request.test_data:
        other = read_dataset(Path(request.test_data), names)
        test_data = other, digest_pictures(other)
    return dataset, make_split(dataset, digest_pictures(dataset), settings, test_data)


def _encode_training(
    request: Request, split: Split, folder: RunFolder, bench: Workbench
) -> tuple[Features, I64]:
    """Return the training pictures' features, and the labels i64[N] of those that can be read."""
    train = bench.features(
        split.items("train"),
        request.cache_folder(folder.path),
        what="training pictures",
        n_views=request.augment,
        seed=request.seed,
        skip_broken=request.skip_broken,
    )
    labels = split.labels("train")[train.kept]
    missing = sorted(set(range(len(split.classes))) - set(labels.tolist()))
    if missing:
        raise ZtuneError(f'class "{split.classes[missing[0]]}" has no picture that can be read')
    return train, labels


def _encode(request: Request, split: Split, folder: RunFolder, bench: Workbench) -> Pictures:
    cache = request.cache_folder(folder.path)
    train, labels = _encode_training(request, split, folder, bench)
    n_views = max(1, request.augment)
    n_wanted, n_encoded = n_views * len(labels), train.n_encoded
    n_broken = int((~train.kept).sum())
    val_features, val_labels = None, split.labels("val")
    if len(val_labels):
        val = bench.features(
            split.items("val"), cache, what="validation pictures", skip_broken=request.skip_broken
        )
        val_features, val_labels = val.values[0], val_labels[val.kept]
        n_wanted, n_encoded = n_wanted + len(val_labels), n_encoded + val.n_encoded
        n_broken += int((~val.kept).sum())
    return Pictures(
        train.values, labels, val_features, val_labels, n_encoded, n_wanted - n_encoded, n_broken
    )


def _image_costs(pictures: Pictures, own_cache: bool, seconds: float) -> dict[str, Json]:
    """Return the image pass's cost; where a run is resumed, its first full pass's is kept.

    What is found in the run's own cache was encoded by this run, before a kill.
    """
    n_paid_before = pictures.n_cached if own_cache else 0
    return {
        "image_forwards": pictures.n_encoded + n_paid_before,
        "image_forwards_cached": pictures.n_cached - n_paid_before,
        "broken_pictures": pictures.n_broken,
        "image_seconds": round(seconds, 3),
    }


def _fingerprints(split: Split) -> Any:
    """Return u64[n], sorted: the first 8 bytes of the SHA-256 of every picture that tunes."""
    entries = [*split.entries_of("train"), *split.entries_of("val")]
    return np.array(sorted(int(entry.sha256[:16], 16) for entry in entries), dtype=np.uint64)


def _gda(
    config: ZipConfig | GdaConfig,
    request: Request,
    pictures: Pictures,
    zero_shot: tuple[F32, F32],
) -> tuple[tuple[F32, F32], float]:
    """Fit the closed-form reference: weight f32[C, e], bias f32[C] and its alpha."""
    n_views = len(pictures.features)
    features = pictures.features.reshape(-1, pictures.features.shape[-1])
    val = pictures.val_features
    affine, alpha = fit_gda(
        config if isinstance(config, GdaConfig) else GdaConfig(),
        features,
        np.tile(pictures.labels, n_views),
        zero_shot[0].astype(np.float64),
        (val, pictures.val_labels) if val is not None else None,
        request.seed,
        n_views,
    )
    bias: F64 = affine[:, -1] + zero_shot[1]
    return (affine[:, :-1].astype(np.float32), bias.astype(np.float32)), alpha


def _train_loss(objective: FewShotObjective, pictures: Pictures, context: F32) -> float:
    """Return the loss over all training pictures and views: a final report, free of charge."""
    n_views, n = pictures.features.shape[:2]
    every = np.arange(n, dtype=np.int64)
    losses = [
        objective(context[None], Batch(every, np.full(n, view, dtype=np.int64), 0)).losses[0]
        for view in range(n_views)
    ]
    return float(np.mean(losses))


def _validate(
    artifact: Artifact,
    zero_shot: tuple[F32, F32],
    gda: tuple[F32, F32],
    pictures: Pictures,
    classes: tuple[str, ...],
) -> dict[str, Score]:
    """Return the scores on the validation pictures by name; empty without such pictures."""
    if pictures.val_features is None:
        return {}
    compared = {"zero-shot": zero_shot, "tuned": artifact.classifier(), "gda": gda}
    return {
        name: score(pictures.val_features, weight, bias, pictures.val_labels, classes)
        for name, (weight, bias) in compared.items()
    }


def _draw(request: Request, folder: RunFolder, scores: Mapping[str, Score]) -> None:
    shown = {"zero-shot": "zero-shot", "tuned": "tuned", "gda": "GDA"}
    levels = {f"{shown[name]}, validation": s.accuracy for name, s in scores.items()}
    title = (
        f"{request.method} on {Path(request.data).name}, {request.shots} shots, seed {request.seed}"
    )
    draw_curve(folder.read_history(), levels, title, folder.path / "curve.png")

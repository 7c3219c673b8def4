"""Score a finished run's snapshots: accuracy on the test images and the training loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.artifact import Artifact, HeadArtifact, Provenance, read_artifact
from ztune.data.split import Split
from ztune.encoded import SplitEncoder
from ztune.logits import FeatureClassifier
from ztune.methods.base import TunedConfig
from ztune.model import Model
from ztune.objective import cross_entropy
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.run_document import RunReport
from ztune.statistics import Score, score
from ztune.task import compose, open_task
from ztune.training import TrainingRun, read_split
from ztune.types import F32, I64, Json

NEW_CLASSES_AT = (500, 5000)
"""Queries after which results are evaluated on new classes."""


@dataclass(frozen=True)
class Labelled:
    """Encoded images."""

    features: F32
    """f32[n, e]"""
    labels: I64
    classes: tuple[str, ...]

    def score(self, classifier: FeatureClassifier) -> Score:
        return score(classifier.logits(self.features), self.labels, self.classes)

    def loss(self, classifier: FeatureClassifier) -> float:
        """Return the mean cross-entropy in nats."""
        return float(cross_entropy(classifier.logits(self.features), self.labels).mean())


@dataclass(frozen=True)
class TaskImages:
    """The images on which every result of a task is scored."""

    train: Labelled
    test: Labelled

    def point(self, queries: int, classifier: FeatureClassifier) -> dict[str, Json]:
        """Return a curve's point."""
        found = self.test.score(classifier)
        return {
            "queries": queries,
            "accuracy": found.accuracy,
            "class_accuracy": found.class_accuracy,
            "train_loss": self.train.loss(classifier),
        }


def score_run(
    training: TrainingRun[RunFolder], run: RunReport, new_data: Path | None
) -> dict[str, Json]:
    """Return the scores of a finished run; `new_data` has images of new classes."""
    run_config, split, model = training.run_config, training.split, training.model
    found, labels = SplitEncoder(run_config, split, training.folder, model).training()
    images = TaskImages(
        Labelled(found.values[0], labels, split.classes), _test(model, split, run_config)
    )
    artifacts = dict(_artifacts(training))
    curve: list[Json] = [images.point(at, one.classifier()) for at, one in artifacts.items()]
    document: dict[str, Json] = {
        "method": run_config.method,
        "config": dict(run.config),
        "shots": run_config.shots,
        "classes": len(split.classes),
        "n_train": len(images.train.labels),
        "n_test": len(images.test.labels),
        "zero_shot": images.point(0, model.zero_shot(run_config.templates, split.classes)),
        "curve": curve,
        "queries": run.queries,
        "stop_reason": run.stop_reason,
        "seconds": run.own_seconds,
        "image_seconds": run.image_seconds,
    }
    if new_data is not None:
        _, other = read_split(replace(run_config, data=str(new_data.resolve())))
        new = _test(model, other, run_config)
        document["new_classes"] = _on_new_classes(model, new, artifacts, run_config.templates)
    return document


def _test(model: Model, split: Split, run_config: RunConfig) -> Labelled:
    cache = Path(str(run_config.cache))
    features = model.features(split.items("test"), cache, what="test images").values[0]
    return Labelled(features, split.labels("test"), split.classes)


def _artifacts(training: TrainingRun[RunFolder]) -> Iterator[tuple[int, Artifact]]:
    """Yield (queries, result): the start, snapshots and the last; a head has one result at 0."""
    result = read_artifact(training.folder.prompt)
    if training.tuned is not None:
        yield 0, initial_artifact(training, training.tuned)
        for file in sorted(training.folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            yield snapshot.provenance.queries, snapshot
    yield result.provenance.queries, result


def initial_artifact(training: TrainingRun[RunFolder], config: TunedConfig) -> Artifact:
    """Return a method's result before its first query."""
    run_config, model, classes = training.run_config, training.model, training.split.classes
    encoded = SplitEncoder(run_config, training.split, training.folder, model).encode(
        changeable=False
    )
    start = compose(replace(run_config, keep="last"), config, model, model.bundle.embed_dim)
    texts = model.encode_templates(run_config.templates, classes)
    task = open_task(run_config, training.split, encoded, model, config, start, texts)
    provenance = Provenance(
        model_id=model.bundle.model_id,
        bundle_digest=model.bundle.digest,
        method=run_config.method,
        seed=run_config.seed,
        queries=0,
        stop_reason="snapshot",
    )
    return task.result(provenance)


def _on_new_classes(
    model: Model, new: Labelled, artifacts: Mapping[int, Artifact], templates: tuple[str, ...]
) -> Json:
    """Return accuracies on new classes of zero-shot and of the results, except heads."""
    zero_shot = model.zero_shot(templates, new.classes)
    points: list[Json] = []
    for at in NEW_CLASSES_AT:
        spent = max(queries for queries in artifacts if queries <= at)
        artifact = artifacts[spent]
        if not isinstance(artifact, HeadArtifact):
            classifier = model.refresh(artifact, new.classes).classifier()
            points.append({"queries": spent, "accuracy": new.score(classifier).accuracy})
    return {
        "classes": len(new.classes),
        "n_test": len(new.labels),
        "zero_shot": new.score(zero_shot).accuracy,
        "curve": points,
    }

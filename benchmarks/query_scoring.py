"""What a finished run is worth on the way: its curve on the test pictures and the training loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.artifact import Artifact, HeadArtifact, Provenance, read_artifact
from ztune.cli.pictures import Album
from ztune.compositions.base import TunedConfig
from ztune.data.split import Split
from ztune.io.fields import Fields
from ztune.logits import FeatureClassifier
from ztune.model import Workbench
from ztune.objective import cross_entropy
from ztune.run_config import Request
from ztune.statistics import Score, score
from ztune.task import Assembly
from ztune.training import Work, task_of
from ztune.types import F32, I64, Json

NEW_CLASSES_AT = (500, 5000)
"""Queries after which results are tried on classes that nothing was tuned on."""


@dataclass(frozen=True)
class Labelled:
    """Encoded pictures."""

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
class Scale:
    """What every result of a task is measured on."""

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


def scored(work: Work, run: Fields, new_data: Path | None) -> dict[str, Json]:
    """Return what is kept of a finished run; `new_data` has pictures of other classes."""
    request, split, bench = work.request, work.split, work.bench
    training, labels = Album(request, split, work.folder, bench).training()
    scale = Scale(Labelled(training.values[0], labels, split.classes), _test(bench, split, request))
    artifacts = dict(_artifacts(work))
    curve: list[Json] = [scale.point(at, one.classifier()) for at, one in artifacts.items()]
    document: dict[str, Json] = {
        "method": request.method,
        "config": dict(run.object("config").values),
        "shots": request.shots,
        "classes": len(split.classes),
        "n_train": len(scale.train.labels),
        "n_test": len(scale.test.labels),
        "zero_shot": scale.point(0, bench.zero_shot(request.templates, split.classes)),
        "curve": curve,
        "queries": run.integer("queries"),
        "stop_reason": run.text("stop_reason"),
        "seconds": round(run.number("seconds") - run.number("report_seconds"), 3),
        "image_seconds": run.number("image_seconds"),
    }
    if new_data is not None:
        _, other = task_of(replace(request, data=str(new_data.resolve())))
        new = _test(bench, other, request)
        document["new_classes"] = _on_new_classes(bench, new, artifacts, request.templates)
    return document


def _test(bench: Workbench, split: Split, request: Request) -> Labelled:
    cache = Path(str(request.cache))
    features = bench.features(split.items("test"), cache, what="test pictures").values[0]
    return Labelled(features, split.labels("test"), split.classes)


def _artifacts(work: Work) -> Iterator[tuple[int, Artifact]]:
    """Yield (queries, result): the start, those on the way, the last; a head's one result at 0."""
    result = read_artifact(work.folder.prompt)
    if work.tuned is not None:
        yield 0, start_of(work, work.tuned)
        for file in sorted(work.folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            yield snapshot.provenance.queries, snapshot
    yield result.provenance.queries, result


def start_of(work: Work, config: TunedConfig) -> Artifact:
    """Return what a method recommends before its first query."""
    request, bench, classes = work.request, work.bench, work.split.classes
    pictures = Album(request, work.split, work.folder, bench).pictures(changeable=False)
    parts_of = Assembly(bench, work.split, pictures, config, request.templates, request.extractor)
    towers = bench.towers(bench.bundle.embed_dim)
    prompt_map, optimizer = config.build(towers, request.queries, request.seed)
    parts = parts_of.parts(prompt_map, optimizer, bench.sentences(request.templates, classes))
    provenance = Provenance(
        model_id=bench.bundle.model_id,
        bundle_digest=bench.bundle.digest,
        method=request.method,
        seed=request.seed,
        queries=0,
        stop_reason="snapshot",
    )
    return parts_of.result(parts, provenance)


def _on_new_classes(
    bench: Workbench, new: Labelled, artifacts: Mapping[int, Artifact], templates: tuple[str, ...]
) -> Json:
    """Return accuracies on classes that nothing was tuned on: zero-shot's, and the results'.

    A head serves none and has none.
    """
    zero_shot = bench.zero_shot(templates, new.classes)
    points: list[Json] = []
    for at in NEW_CLASSES_AT:
        spent = max(queries for queries in artifacts if queries <= at)
        artifact = artifacts[spent]
        if not isinstance(artifact, HeadArtifact):
            classifier = bench.refreshed(artifact, new.classes).classifier()
            points.append({"queries": spent, "accuracy": new.score(classifier).accuracy})
    return {
        "classes": len(new.classes),
        "n_test": len(new.labels),
        "zero_shot": new.score(zero_shot).accuracy,
        "curve": points,
    }

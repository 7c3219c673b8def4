"""Images of none of the classes: how many of them a result refuses, and of its own images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.classifier import Classifier, Outputs, classify
from ztune.artifact import Artifact, inliers_of, read_artifact, require_same_model
from ztune.data.cache import OptionalCache
from ztune.data.image_files import named_images
from ztune.data.splitter import digest_file
from ztune.errors import ConfigError
from ztune.evaluate import LabelledImages, TestFeatures, encode_test
from ztune.inliers import Refusals, out_of_fold_scores
from ztune.logits import InlierTest
from ztune.model import Model
from ztune.printing import first_few
from ztune.progress import SILENCE, Progress, warn
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.types import F32


@dataclass(frozen=True)
class ForeignImages:
    """Files with their SHA-256."""

    items: list[tuple[Path, str]]

    def count_shared(self, images: LabelledImages, fingerprints: Iterable[int]) -> int:
        """Return how many are among labelled images, or were used for training or validation.

        They are compared by content; a warning says what they mean.
        """
        known = {digest[:16] for _, digest in images.items}
        known |= {f"{int(value):016x}" for value in fingerprints}
        n_shared = sum(digest[:16] in known for _, digest in self.items)
        if n_shared:
            warn(
                f"{n_shared} of these {len(self.items)} foreign images are the task's own: they "
                "are accepted rightly, and AUROC and accepted images say little about foreign "
                "ones (name a folder without images of the classes)"
            )
        return n_shared


def read_foreign(
    folder: Path | None, can_refuse: object, progress: Progress = SILENCE
) -> ForeignImages | None:
    """Return all images below a folder; None without a folder.

    `can_refuse` is None for a result that refuses no images.

    Raises: ConfigError for such a result; DataError without images.
    """
    if folder is None:
        return None
    if can_refuse is None:
        raise ConfigError(
            "`foreign` needs a result that refuses images of none of the classes (tune with "
            "`reject`, such as 0.05, or leave out `foreign`)"
        )
    paths, ignored = named_images([folder])
    if ignored:
        progress.remark(f"files ignored, not images: {len(ignored)} ({first_few(ignored)})")
    return ForeignImages([(path, digest_file(path)) for path in paths])


def refusals_of(
    artifact: Artifact | None,
    images: LabelledImages,
    features: TestFeatures,
    foreign: ForeignImages | None,
) -> Refusals | None:
    """Return what an artifact refuses of its encoded images and of others.

    None if it refuses nothing.

    Raises: DataError for unusable foreign images.
    """
    test = None if artifact is None else inliers_of(artifact)
    if artifact is None or test is None:
        return None
    own = test(features.plain.values[0])
    if foreign is None:
        return Refusals(test.share, own)
    return _refusals(artifact, test, own, images, features, foreign)


def _refusals(
    artifact: Artifact,
    test: InlierTest,
    own: F32,
    images: LabelledImages,
    features: TestFeatures,
    foreign: ForeignImages,
) -> Refusals:
    others = features.model.features(
        foreign.items, features.cache, what="foreign images", skip_broken=features.skip_broken
    )
    n_shared = foreign.count_shared(images, artifact.tuning_images.tolist())
    return Refusals(test.share, own, test(others.values[0]), n_shared)


def refusals_of_run(
    folder: RunFolder,
    run_config: RunConfig,
    images: LabelledImages,
    model: Model,
    foreign: ForeignImages,
    *,
    cache: Path | None = None,
    skip_broken: bool = False,
) -> Refusals:
    """Return what a run without test images refuses of its training images and of others.

    `images` are the training images; each is scored by prototypes that were made without it.

    Raises: DataError for unusable images.
    """
    artifact = read_artifact(folder.prompt)
    require_same_model(artifact, model.bundle.model_id, folder.prompt, model.bundle.path)
    test = inliers_of(artifact)
    assert test is not None
    features = encode_test(
        model,
        images.items,
        cache or OptionalCache(folder.cache_folder(run_config.cache)),
        what="training images",
        skip_broken=skip_broken or run_config.skip_broken,
    )
    labels = images.among(artifact.classes, "the run's classes")[features.plain.kept]
    texts = model.encode_templates(run_config.templates, artifact.classes)
    own = out_of_fold_scores(features.plain.values[0], labels, texts) - test.threshold
    return _refusals(artifact, test, own.astype(np.float32), images, features, foreign)


def refusals_of_classifier(
    classifier: Classifier,
    images: LabelledImages,
    own: Outputs,
    foreign: ForeignImages | None,
    *,
    skip_broken: bool = False,
    progress: Progress = SILENCE,
) -> Refusals | None:
    """Return what a packed classifier refuses of its images, by their outputs, and of others.

    None if it refuses nothing.

    Raises: DataError for unusable foreign images.
    """
    if classifier.reject is None or own.inlier_scores is None:
        return None
    if foreign is None:
        return Refusals(classifier.reject, own.inlier_scores)
    paths = [path for path, _ in foreign.items]
    others, _ = classify(classifier, paths, skip_broken, progress)
    n_shared = foreign.count_shared(images, classifier.tuning_images)
    return Refusals(classifier.reject, own.inlier_scores, others.inlier_scores, n_shared)

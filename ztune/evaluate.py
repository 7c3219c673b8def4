"""Scores of runs, bundles and packed classifiers on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtimes.classifier import Classifier
from runtimes.conversions import count_conversions
from runtimes.in_memory import InMemoryImages
from runtimes.preprocess import ImageLike
from ztune.artifact import Artifact, VisualArtifact, read_artifact, require_same_model
from ztune.data.cache import FeatureStore, MemoryCache, OptionalCache
from ztune.data.features import Features
from ztune.data.relocate import relocate, resolve_roots
from ztune.data.sources import read_source
from ztune.data.split import LEAST_HALVED, LEAST_JUDGED, Split
from ztune.data.splitter import digest_images
from ztune.errors import ConfigError, DataError
from ztune.inliers import Refusals
from ztune.io.files import read_json, sha256
from ztune.io.kinds import kind_of
from ztune.io.schema import plain
from ztune.model import Model
from ztune.printing import first_few
from ztune.progress import SILENCE, Progress
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.run_document import RunReport, run_start
from ztune.statistics import Score, score
from ztune.task import open_program
from ztune.types import F32, I64, Json

_AT_ONCE = 32  # images decoded at a time


class NoTestImagesError(DataError):
    """A split has no test images."""


@dataclass(frozen=True)
class LabelledImages:
    """Images to score: files with their SHA-256, labels and class names."""

    items: list[tuple[Path, str]]
    labels: I64
    classes: tuple[str, ...]
    split: str
    held: InMemoryImages = field(default_factory=dict)
    """Images in memory, by nominal path."""
    ignored: tuple[str, ...] = ()
    """Other files of the folder."""

    def left_out(self, kept: NDArray[np.bool_]) -> dict[str, Json]:
        """Return the files that were not scored, by reason, given which images were readable."""
        broken = [str(path) for (path, _), k in zip(self.items, kept, strict=True) if not k]
        return {"ignored": [*self.ignored], "broken": [*broken]}

    def document(
        self,
        found: Score,
        kept: NDArray[np.bool_],
        scored: Artifact | Classifier | None,
        refusals: Refusals | None = None,
    ) -> dict[str, Json]:
        """Return the figures of a score as JSON; None: of templates.

        `kept` tells for each image whether it could be read.
        """
        rejection = {} if refusals is None else {"rejection": refusals.to_json()}
        readable = [path for (path, _), keep in zip(self.items, kept, strict=True) if keep]
        fingerprints = [] if scored is None else [int(value) for value in scored.tuning_images]
        return {
            "accuracy": found.accuracy,
            "interval": list(found.interval),
            "ece": found.ece,
            "nll": found.nll,
            "brier": found.brier,
            "temperature": None if scored is None else scored.temperature,
            "reliability": [plain(one) for one in found.reliability],
            "n": found.n,
            "candidates": len(found.classes),
            "split": self.split,
            "per_class": plain(found.per_class()),
            "broken_images": int((~kept).sum()),
            "conversions": dict(count_conversions(readable)),
            "left_out": self.left_out(kept),
            "tuning_images": self.n_tuned_on(fingerprints),
            **rejection,
        }

    @property
    def images(self) -> list[ImageLike]:
        """The files and images to read."""
        return [self.held.get(path, path) for path, _ in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def among(self, candidates: tuple[str, ...], whose: str) -> I64:
        """Return the labels as indices into other class names.

        Raises: DataError naming an unknown class.
        """
        index = {name: i for i, name in enumerate(candidates)}
        unknown = [name for name in self.classes if name not in index]
        if unknown:
            raise DataError(
                f'class "{unknown[0]}" of the images is not among {whose} '
                f"({', '.join(candidates[:5])}{', ...' if len(candidates) > 5 else ''}); "
                f"{len(unknown)} unknown class(es) in total"
            )
        return np.array([index[self.classes[label]] for label in self.labels], dtype=np.int64)

    def n_tuned_on(self, fingerprints: Iterable[int]) -> int:
        """Return how many of the images were used for training or validation."""
        known = {int(value) for value in fingerprints}
        return sum(int(digest[:16], 16) in known for _, digest in self.items)


def read_labelled(
    place: str,
    root: Path | None,
    names: Path | None,
    split: str,
    progress: Progress = SILENCE,
    *,
    nested: str | None = None,
) -> LabelledImages:
    """Return a data set's test images, or all images with the split `all`.

    `place` is a path, or with `root` the name of a data set; `nested` is as for `read_source`.

    Raises: DataError without such images; ConfigError.
    """
    dataset = read_source(place, root, names, tuned=False, nested=nested)
    for remark in dataset.remarks:
        progress.remark(remark)
    progress.remark(f"{len(dataset.classes)} classes ({first_few(dataset.classes, 10)})")
    for note in dataset.notes:
        progress.remark(note)
    if split == "test":
        chosen = tuple(p for p in dataset.images if p.split == "test")
        if not chosen:
            raise DataError(
                f'data "{place}" has no test images (use `split=all`, or '
                "`split_file=RUN/split.json` for a run's test images)"
            )
        dataset = replace(dataset, images=chosen)
    digests = digest_images(dataset)
    items = [(dataset.root / p.path, d) for p, d in zip(dataset.images, digests, strict=True)]
    labels = np.array([p.label for p in dataset.images], dtype=np.int64)
    return LabelledImages(items, labels, dataset.classes, split, ignored=dataset.ignored)


def labelled_of_split(
    path: Path,
    split: str,
    *,
    data: Path | str | None = None,
    test_data: Path | str | None = None,
    pipe: bool = False,
) -> LabelledImages:
    """Return the images of a part of a run or split file: `test`, `train`, or `all` of them.

    `data` and `test_data` are new locations of moved images.

    Raises: NoTestImagesError; DataError without any images, or if one has changed; FormatError.
    """
    path = path / "split.json" if kind_of(path) == "run" else path
    where = f'split file "{path}"'
    whole = Split.from_json(read_json(path, where, pipe=pipe), where)
    whole = relocate(whole, resolve_roots(data, test_data))
    if split != "all":
        entries = tuple(entry for entry in whole.entries if entry.role == split)
        whole = replace(whole, entries=entries)
        if split == "test" and not whole.entries:
            raise NoTestImagesError(
                f"{where} has no test images (tune with `test_data` or more images, or "
                "evaluate the bundle on other `data`)"
            )
    try:
        whole.check_unchanged()
    except DataError as error:
        if data is None:
            raise
        raise DataError(
            f"{error}; to score other images: ztune eval BUNDLE --data FOLDER --prompt RUN"
        ) from None
    items = [(whole.file(entry), entry.sha256) for entry in whole.entries]
    labels = np.array([entry.label for entry in whole.entries], dtype=np.int64)
    return LabelledImages(items, labels, whole.classes, split)


def why_no_accuracy(folder: RunFolder, report: RunReport) -> str | None:
    """Return why a finished run's accuracy cannot be known, and what to do.

    None if it has test images or a cross-validated accuracy.

    Raises: FormatError for a damaged split file.
    """
    where = f'run "{folder.path}": split.json'
    split = Split.from_json(read_json(folder.split, where), where)
    if split.entries_of("test") or report.cross_validation is not None:
        return None
    counts = np.bincount(split.labels("train"), minlength=len(split.classes))
    fewest = int(counts.argmin())
    why = f"{report.method} is not cross-validated"
    if counts[fewest] < LEAST_JUDGED:
        name, n = split.classes[fewest], counts[fewest]
        why = f'class "{name}" has {n} for training, too few to cross-validate'
    return (
        f"no test accuracy: the run has no test images, and {why} (add images: half of a "
        f"class of {LEAST_HALVED} is for testing, {LEAST_JUDGED} of every class are enough for "
        "`method=auto` to cross-validate; or tune with `test_data`)"
    )


def document_without_test(
    folder: RunFolder, report: RunReport, refusals: Refusals | None = None
) -> tuple[dict[str, Json], str]:
    """Return the result of `ztune eval` for a run without test images, and a line for people.

    Without `refusals` an accuracy is all that there is to say.

    Raises: DataError if neither is known; FormatError for a damaged split file.
    """
    document: dict[str, Json] = {"method": report.method, "run": str(folder.path)}
    if refusals is not None:
        document["rejection"] = refusals.to_json()
    if why := why_no_accuracy(folder, report):
        if refusals is None:
            raise DataError(f'run "{folder.path}": {why}')
        return document, why
    found, before = report.cross_validation, report.hand_written
    assert found is not None
    document |= {
        "accuracy": found.accuracy,
        "interval": list(found.interval),
        "n": found.n,
        "split": "cross-validation",
    }
    if before is not None:
        document["zero_shot_accuracy"] = before.accuracy
        document["zero_shot_interval"] = list(before.interval)
    return document, f"no test images; {report.cross_validated}"


@dataclass(frozen=True)
class RunScores:
    """A finished run's scores on labelled images, and its baselines'."""

    artifact: Artifact
    zero_shot: Score
    tuned: Score
    features: TestFeatures
    curve: list[Json] | None
    """The accuracy of every snapshot, if requested."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether each image could be read."""
        return self.features.plain.kept

    @property
    def scores(self) -> dict[str, Score]:
        return {"zero-shot": self.zero_shot, "tuned": self.tuned}


def score_run(
    folder: RunFolder,
    run_config: RunConfig,
    images: LabelledImages,
    model: Model,
    *,
    templates: tuple[str, ...],
    cache: Path | None = None,
    skip_broken: bool = False,
    snapshots: bool = False,
) -> RunScores:
    """Score a finished run on labelled images, with the model that it was tuned on.

    `cache` replaces the run's own.

    Raises: FormatError, DataError; ConfigError for a missing extractor.
    """
    artifact = read_artifact(folder.prompt)
    require_same_model(artifact, model.bundle.model_id, folder.prompt, model.bundle.path)
    labels = images.among(artifact.classes, "the run's classes")
    features = encode_test(
        model,
        images.items,
        cache or OptionalCache(folder.cache_folder(run_config.cache)),
        what="test images",
        skip_broken=skip_broken or run_config.skip_broken,
        extractor=find_extractor(artifact, folder.path),
    )
    labels = labels[features.plain.kept]
    zero_shot = model.zero_shot(templates, artifact.classes)

    def scored(result: Artifact) -> Score:
        logits = features.logits(model.refresh(result))
        return score(logits, labels, result.classes, result.temperature)

    before = score(zero_shot.logits(features.plain.values[0]), labels, artifact.classes)
    tuned = scored(artifact)
    curve: list[Json] | None = None
    if snapshots:
        seconds = {int(line["queries"]): line["seconds"] for line in folder.read_history()}
        curve = []
        for file in sorted(folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            n = snapshot.provenance.queries
            accuracy = scored(snapshot).accuracy
            curve.append({"queries": n, "seconds": seconds.get(n), "accuracy": accuracy})
    return RunScores(artifact, before, tuned, features, curve)


def score_bundle(
    model: Model,
    images: LabelledImages,
    candidates: tuple[str, ...],
    *,
    artifact: Artifact | None = None,
    templates: tuple[str, ...] = (),
    cache: Path | None = None,
    extractor: Path | None = None,
    skip_broken: bool = False,
) -> tuple[Score, TestFeatures]:
    """Score an artifact or templates on images; also return the encoded images.

    `candidates` are the class names to choose from. Features are kept in the folder `cache`, or in
    memory if it is None. `extractor` is the artifact's (`find_extractor`).

    Raises: DataError.
    """
    labels = images.among(candidates, "the class names to choose from")
    features = encode_test(
        model,
        images.items,
        MemoryCache() if cache is None else cache,
        what="images",
        skip_broken=skip_broken,
        extractor=extractor,
    )
    if artifact is not None:
        logits = features.logits(artifact)
    else:
        logits = model.zero_shot(templates, candidates).logits(features.plain.values[0])
    temperature = artifact.temperature if artifact is not None else None
    labels = labels[features.plain.kept]
    return score(logits, labels, candidates, temperature), features


@dataclass(frozen=True)
class TestFeatures:
    """Encoded test images, and the model to score them with."""

    model: Model
    items: Sequence[tuple[Path, str]]
    cache: Path | FeatureStore
    what: str
    skip_broken: bool
    plain: Features
    """Features of the unchanged images."""
    extractor: Path | None = None
    """The extractor that the artifacts were tuned with."""

    def logits(self, artifact: Artifact) -> F32:
        """Return logits f32[n, C] of the readable images."""
        classifier = artifact.classifier()
        if not isinstance(artifact, VisualArtifact):
            return classifier.logits(self.plain.values[0])
        extracted = self._extracted()
        width = extracted.shape[-1]
        images = open_program(self.model, artifact.program, width, artifact.statistics)
        parts = []
        with self.model.progress.activity(f"{self.what}, changed", len(extracted)) as ticker:
            for first, pixels in self._pixels():
                seen = extracted[first : first + len(pixels)]
                parts.append(images.encode(artifact.visual[None], pixels, seen)[0])
                ticker.update(first + len(pixels))
        return classifier.logits(np.concatenate(parts))

    def _extracted(self) -> F32:
        if self.extractor is None:
            return self.plain.values[0]
        return self.model.features(
            self.items,
            self.cache,
            what=f"{self.what} for the extractor",
            skip_broken=self.skip_broken,
            extractor=self.extractor,
        ).values[0]

    def _pixels(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the index of a batch's first image, and its pixels u8[n, S, S, 3]."""
        encoder = self.model.images()
        kept = [item for item, keep in zip(self.items, self.plain.kept, strict=True) if keep]
        for first in range(0, len(kept), _AT_ONCE):
            paths = [path for path, _ in kept[first : first + _AT_ONCE]]
            yield first, np.stack([encoder.read(path, None) for path in paths])


def encode_test(
    model: Model,
    items: Sequence[tuple[Path, str]],
    cache: Path | FeatureStore,
    *,
    what: str,
    skip_broken: bool,
    extractor: Path | None = None,
) -> TestFeatures:
    """Encode the unchanged images."""
    plain = model.features(items, cache, what=what, skip_broken=skip_broken)
    return TestFeatures(model, items, cache, what, skip_broken, plain, extractor)


def find_extractor(artifact: Artifact, path: Path, named: Path | None = None) -> Path | None:
    """Return the extractor that an artifact was tuned with: `named`, or its run's.

    `path` is a run, its result or its snapshot. None: the artifact needs no extractor.

    Raises: ConfigError for a missing or different file, or if no run is found.
    """
    if not isinstance(artifact, VisualArtifact) or not artifact.extractor:
        return None
    extractor = named
    if extractor is None:
        places = (path, *path.absolute().parents[:2])
        run = next((place for place in places if (place / "run.json").is_file()), None)
        if run is None:
            raise ConfigError(
                f'no run.json next to "{path}", which names the feature extractor that the visual '
                "prompt was tuned with (use the artifact in its run's folder, or: ztune eval RUN)"
            )
        extractor = run_start(RunFolder(run).read(), f'run "{run}": run.json').run_config.extractor
    if extractor is None or not extractor.is_file() or sha256(extractor) != artifact.extractor:
        raise ConfigError(
            f'the visual prompt was tuned with the feature extractor "{extractor}", which does not '
            f"exist or has changed (expected SHA-256 {artifact.extractor[:12]}…; put it back)"
        )
    return extractor

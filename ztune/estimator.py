"""One scikit-learn-style estimator for every method: fit, predict, score, save."""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.conversions import count_conversions, report_conversions
from runtimes.extractor import OrtExtractor
from runtimes.preprocess import crop, with_image
from ztune.artifact import (
    Artifact,
    VisualArtifact,
    inliers_of,
    read_artifact,
    require_same_model,
)
from ztune.checks import as_possible
from ztune.data.split import Entry, Split, SplitSettings
from ztune.dataset import (
    MEMORY,
    Dataset,
    Images,
    Labels,
    TrainingSet,
    class_names_of,
    label_array,
    labels_as_names,
    listed_images,
    true_labels,
)
from ztune.encoded import EncodedSplit
from ztune.errors import ConfigError, DataError, NotFittedError
from ztune.evaluate import LabelledImages, find_extractor
from ztune.io.schema import plain
from ztune.logits import FeatureClassifier, log_probabilities
from ztune.methods.registry import views_of
from ztune.model import Model
from ztune.run import MemoryRun, RunFolder
from ztune.run_config import UNIFORM, RunConfig
from ztune.run_document import RunReport
from ztune.saved_run import SavedRun
from ztune.starting import start_run_on
from ztune.task import open_program
from ztune.training import TrainingRun
from ztune.types import F32, ImageEncoder

_BATCH = 8
_OWN = ("model", "method", "queries", "seed", "preset", "templates", "keep", "patience",
    "augment", "reject", "skip_broken", "force", "reference", "priors", "class_names",
)  # fmt: skip


class FewShotClassifier:
    """Fits a prompt or a head on a few labelled images, with forward passes only.

    `method` is a name from `ztune methods` (docs/methods.md); extra keyword arguments are its
    settings, which override the `preset`: default, published, published-code or tuned.
    `queries` is the budget of a tuned method: candidates, each evaluated on one batch; closed forms
    such as `gda` use none.
    `seed` is the method's. `templates` are hand-written prompts with {} for a class name (None: the
    data set's, else "a photo of a {}."). `keep` is "last" (as published) or "best" on validation
    images; `patience` is the number of validation passes without gain before stopping; `augment`
    is the number of cached random views per training image (None: the preset's). `reject` is the
    share of images of the classes that `inlier_score` may refuse as none of them (None: no such
    score). `priors` "data" makes probabilities of `auto` and heads follow the classes' shares of
    the training images.

    After `fit`, `classes_` are the class names; `cost_` has queries, text_forwards and
    image_forwards (numbers), seconds, and peak_memory_mb. After a fit without `run_dir`, `history_`
    has a dict per step: step, queries, loss (nats), accuracy (0…1) and seconds; it is empty for a
    closed form. `temperature_` divides the logits in `predict_proba`; it is fitted on validation
    images, else on training images by fits without them, and None where neither is possible.
    `cross_validation_` has accuracy, interval (95 %) and n of training images, each by a fit
    without it; None if the method makes no such fits, or a class has fewer than 16.

    `fit` raises ConfigError for unknown methods and settings.

    >>> import ztune
    >>> model = ztune.load("models/mini", provider="cpu")
    >>> train, test = ztune.Dataset.from_folder("examples/digits").split(shots=4, seed=1)
    >>> clf = ztune.FewShotClassifier(model, method="gda").fit(train)
    >>> clf.predict(["examples/digits/seven/0007.png"])
    array(['seven'], dtype='<U5')
    >>> clf.score(test) > 0.6
    True
    """

    def __init__(
        self,
        model: Model,
        method: str = "auto",
        *,
        queries: int = 5000,
        seed: int = 1,
        preset: str = "default",
        templates: Sequence[str] | str | None = None,
        keep: str = "last",
        patience: int | None = None,
        augment: int | None = None,
        reject: float | None = None,
        skip_broken: bool = False,
        force: bool = False,
        reference: Path | str | None = None,
        priors: str = UNIFORM,
        class_names: Sequence[str] | None = None,
        **settings: Any,
    ):
        self.model, self.method = model, method
        self.queries, self.seed, self.preset, self.templates = queries, seed, preset, templates
        self.keep, self.patience, self.augment, self.reject = keep, patience, augment, reject
        self.skip_broken, self.force, self.reference = skip_broken, force, reference
        self.priors = priors
        self.class_names = class_names
        self.settings = settings
        self._class_names: Sequence[str] | None = None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments, including the method's settings."""
        return {**{name: getattr(self, name) for name in _OWN}, **self.settings}

    def set_params(self, **params: Any) -> FewShotClassifier:
        """Change the constructor's arguments; other names are settings of the method.

        They apply from the next `fit`, which raises ConfigError for an unknown setting.
        """
        for name, value in params.items():
            if name in _OWN:
                setattr(self, name, value)
            else:
                self.settings[name] = value
        return self

    def __sklearn_clone__(self) -> FewShotClassifier:
        """Return an unfitted copy that shares the model."""
        return type(self)(**self.get_params())

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(string=True, two_d_array=True),
        )

    def fit(
        self,
        X: TrainingSet | Dataset | Images,
        y: Labels | None = None,
        *,
        class_names: Sequence[str] | None = None,
        run_dir: Path | str | None = None,
    ) -> FewShotClassifier:
        """Fit on a training set, a whole Dataset, or images or features with labels `y`.

        `X` is a list of paths, Pillow images or arrays u8[H, W, 3], an array u8[N, H, W, 3], or
        unit features f32[N, e] of `Model.encode_images`. `y` are N labels: class names, or indices
        into `class_names`. `run_dir` is a run's folder as of `ztune tune`: an interrupted fit
        resumes from it. Without it nothing is written to disk.

        Raises: DataError for unusable images or labels; ConfigError for an unknown method or
            setting, too few queries, features for a method that needs images, or another run in
            `run_dir`; ServerError; ClosedError for a closed model.
        """
        self.model.require_open()
        class_names = self.class_names if class_names is None else class_names
        training, features = self._training_set(X, y, class_names)
        run_config = self._run_config(training, features is not None)
        # A copy would open the model's sessions again.
        model = replace(self.model, held=training.held) if training.held else self.model
        if features is not None:
            self._check_features(features, run_config)
        if run_dir is not None:
            report = self._run_in(Path(run_dir), run_config, training, model, features)
            artifact = read_artifact(Path(run_dir) / "prompt.safetensors")
            history = RunFolder(Path(run_dir)).read_history()
        else:
            store = MemoryRun()
            run = TrainingRun(run_config, training.split, store, model, features)
            run.check()
            report = run.finish(run.head())
            assert store.artifact is not None
            artifact = store.artifact
            history = store.read_history()
        self._take(artifact, report, history, class_names, run_config.extractor)
        return self

    def _run_in(
        self,
        folder: Path,
        run_config: RunConfig,
        training: TrainingSet,
        model: Model,
        features: EncodedSplit | None,
    ) -> RunReport:
        """Start a run in a folder, resume it, or read its result."""
        store = RunFolder(folder)
        # A run refused before its first step is replaced.
        if not store.is_started or store.read().get("status") == "refused":
            return start_run_on(run_config, training.split, model, folder, features)
        with SavedRun.locked(folder) as saved:
            saved.require_same(run_config, training.split, model)
            if (report := saved.report()) is not None:
                return report
            files = not training.held and features is None
            roots = training.split.roots if files else None
            return saved.resume(model, features, files=files, roots=roots)

    def predict(self, X: Images | LabelledImages) -> np.ndarray[Any, Any]:
        """Return the class name of each image or row of features, str[N].

        Raises: NotFittedError; DataError for unusable images or features.
        """
        classes = self.classes_
        return np.asarray(classes[self._logits(X).argmax(axis=1)])

    def predict_proba(self, X: Images | LabelledImages) -> F32:
        """Return probabilities f32[N, C], in the order of `classes_`.

        They are the softmax of the logits divided by the temperature that `fit` chose on images
        which the classifier was not fitted to (`temperature_`).

        Raises: NotFittedError; DataError for unusable images or features.
        """
        logits, classifier = self._logits(X), self._classifier
        found = np.exp(log_probabilities(logits, classifier.temperature))
        return np.asarray(found, dtype=np.float32)

    def decision_function(self, X: Images | LabelledImages) -> F32:
        """Return logits f32[N, C], in the order of `classes_`; thread-safe.

        With two classes it is f32[N], second minus first, as in scikit-learn. `X` is as for `fit`,
        or the test images of a split.

        Raises: NotFittedError; DataError for unusable images or features; ClosedError for images
            after the model was closed.
        """
        logits = self._logits(X)
        return logits if logits.shape[1] > 2 else np.asarray(logits[:, 1] - logits[:, 0])

    def inlier_score(self, X: Images | LabelledImages) -> F32:
        """Return a score f32[N] of each image, below 0 if it belongs to none of the classes.

        It is the cosine to the nearest class prototype minus a threshold, which `fit` sets so that
        the share `reject` of images of the classes is below it. `predict` returns the nearest class
        all the same.

        Raises: NotFittedError; ConfigError after a fit without `reject`; DataError for unusable
            images or features.
        """
        test = inliers_of(self._fitted())
        if test is None:
            raise ConfigError("`reject` is None: set a share, such as reject=0.05, and fit again")
        return self._scores(X, test)

    def _logits(self, X: Images | LabelledImages) -> F32:
        """Return logits f32[N, C] of images or features."""
        return self._scores(X, self._classifier.logits)

    def _scores(self, X: Images | LabelledImages, of: Callable[[F32], F32]) -> F32:
        """Return scores f32[N, ...] of the features of images, or of features."""
        artifact, images = self._fitted(), listed_images(X)
        if _are_features(images):
            _require_width(images, self._model)
            if isinstance(artifact, VisualArtifact):
                method = artifact.provenance.method
                raise DataError(f"{method} changes images: pass images, not features")
            return of(unit_rows(finite(images)))
        report_conversions(count_conversions(images), "images", self._model.progress)
        parts = [
            of(self._features_of(artifact, images[first : first + _BATCH], first))
            for first in range(0, len(images), _BATCH)
        ]
        return np.concatenate(parts)

    def score(self, X: Images | LabelledImages, y: Labels | None = None) -> float:
        """Return the accuracy, 0…1, on labelled images: those of a split, or X with labels y.

        Raises: NotFittedError; DataError for unusable images or unknown labels.
        """
        labels = true_labels(X, y, self._fitted().classes, self._class_names)
        return float((self._logits(X).argmax(axis=1) == labels).mean())

    @property
    def classes_(self) -> np.ndarray[Any, Any]:
        """Class names, sorted: str[C].

        Raises: NotFittedError.
        """
        return np.array(self._fitted().classes)

    def save(self, path: Path | str) -> None:
        """Write the artifact, as prompt.safetensors of `ztune tune`.

        Raises: NotFittedError.
        """
        from ztune.artifact import write_artifact

        write_artifact(Path(path), self._fitted())

    def load_artifact(self, path: Path | str) -> FewShotClassifier:
        """Load an artifact that was tuned with this model, instead of fitting.

        `path` is its file, or the folder of a finished run.

        Raises: FormatError for a damaged artifact; ConfigError for another model's, or without the
            feature extractor that it was tuned with (setting `extractor`).
        """
        artifact = read_artifact(Path(path))
        require_same_model(artifact, self.model.bundle.model_id, Path(path), self.model.bundle.path)
        named = self.settings.get("extractor")
        extractor = find_extractor(artifact, Path(path), Path(named).resolve() if named else None)
        self._take(self.model.refresh(artifact), None, [], None, extractor)
        return self

    def export_onnx(self, path: Path | str) -> None:
        """Write classifier.onnx: images in, probabilities out.

        Raises: NotFittedError; ConfigError without a local image tower.
        """
        from export.classifier import pack

        artifact = self._fitted()
        pack(self._model.bundle, artifact, Path(path), extractor=self._extractor)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a FewShotClassifier holds open sessions: save() the artifact and load_artifact() it"
        )

    def _take(
        self,
        artifact: Artifact,
        report: RunReport | None,
        history: list[dict[str, float]],
        class_names: Sequence[str] | None,
        extractor: Path | None,
    ) -> None:
        self._artifact, self._model, self._extractor = artifact, self.model, extractor
        self._class_names = class_names_of(class_names)
        self._images: ImageEncoder | None = None
        self._program: Any = None
        self._opening = threading.Lock()
        costs = ("queries", "text_forwards", "image_forwards", "seconds", "peak_memory_mb")
        self.history_, self.temperature_ = history, artifact.temperature
        found = None if report is None else report.cross_validation
        self.cross_validation_ = None if found is None else plain(found)
        self.cost_ = {} if report is None else {name: getattr(report, name) for name in costs}

    @property
    def _classifier(self) -> FeatureClassifier:
        return self._fitted().classifier()

    def _fitted(self) -> Artifact:
        artifact: Artifact | None = getattr(self, "_artifact", None)
        if artifact is None:
            raise _not_fitted("this FewShotClassifier is not fitted yet: call fit first")
        return artifact

    def _training_set(
        self,
        X: TrainingSet | Dataset | Images,
        y: Labels | None,
        class_names: Sequence[str] | None,
    ) -> tuple[TrainingSet, EncodedSplit | None]:
        """Return the training set, and the features if `X` has features."""
        if isinstance(X, TrainingSet | Dataset):
            if y is not None:
                raise DataError("`y` is given, but the data set in `X` has labels: leave it out")
            return (
                X
                if isinstance(X, TrainingSet)
                else X.whole(self.seed, skip_broken=self.skip_broken)
            ), None
        if isinstance(X, str | Path):
            raise DataError(
                "`X` is one path, expected a list (read a folder with Dataset.from_folder)"
            )
        if y is None:
            raise DataError("`y` is missing: pass one label per image or row of features")
        if _are_features(X):
            return _from_features(np.asarray(X), y, class_names)
        return Dataset.from_arrays(X, y, class_names).whole(
            self.seed, skip_broken=self.skip_broken
        ), None

    def _run_config(self, training: TrainingSet, from_features: bool) -> RunConfig:
        templates = self.templates or (training.template,)
        augment = self.augment
        if augment is None:
            augment = views_of(self.method, self.preset)
        if from_features and augment:
            raise ConfigError("`augment` makes views of images, but `X` are features: leave it out")
        execution = self.model.execution
        settings = training.split.settings
        assert settings is not None
        served = self.model.served is not None
        run_config = RunConfig(
            self.model.runtime.place,
            str(training.split.roots["data"]),
            method=self.method,
            shots=settings.shots,
            queries=_whole("queries", self.queries),
            seed=_whole("seed", self.seed),
            templates=(templates,) if isinstance(templates, str) else tuple(templates),
            preset=self.preset,
            provider="auto" if served else execution.provider,
            threads=None if served else execution.threads,
            memory_limit=None if served else execution.memory_limit,
            val=settings.n_val,
            split_seed=settings.split_seed,
            keep=self.keep,
            patience=self.patience,
            augment=0 if from_features else augment,
            reject=_plain("reject", self.reject),
            skip_broken=self.skip_broken,
            force=self.force,
            reference=None if self.reference is None else str(Path(self.reference).resolve()),
            server=self.model.server,
            priors=self.priors,
            settings={name: _plain(name, value) for name, value in self.settings.items()},
        )
        run_config.check_method()  # before anything is opened
        run_config = as_possible(run_config, self.model)
        return replace(run_config, augment=0) if from_features else run_config

    def _check_features(self, encoded: EncodedSplit, run_config: RunConfig) -> None:
        _require_width(encoded.features[0], self.model)
        tuned = run_config.tuned_config
        if tuned is not None and tuned.program is not None:
            raise ConfigError(
                f"{self.method} changes images, so `X` must be images (paths, Pillow images or "
                "arrays u8), not features"
            )

    def _features_of(self, artifact: Artifact, images: Any, first: int) -> F32:
        """Return features f32[n, e] of one batch of images, under the artifact's visual prompt."""
        encoder, program = self._opened(artifact)
        cut = functools.partial(crop, spec=self._model.bundle.image)
        pixels = np.stack(
            [with_image(image, f"image {first + n}", cut) for n, image in enumerate(images)]
        )
        features = encoder.encode(pixels)
        if isinstance(artifact, VisualArtifact):
            features = program.encode(artifact.visual[None], pixels, features)[0]
        return features

    def _opened(self, artifact: Artifact) -> tuple[ImageEncoder, Any]:
        """Return what gives features, and a visual prompt's program, opened once."""
        self._model.require_open()
        with self._opening:
            if self._images is None:
                model = self._model
                images, width = model.images(), model.bundle.embed_dim
                if self._extractor is not None:
                    images = OrtExtractor(self._extractor, model.bundle, model.execution)
                    width = images.width()
                if isinstance(artifact, VisualArtifact):
                    self._program = open_program(
                        model, artifact.program, width, artifact.statistics
                    )
                self._images = images
            return self._images, self._program


def _not_fitted(message: str) -> NotFittedError:
    """Return an error that `except sklearn.exceptions.NotFittedError` also catches, if loaded."""
    theirs = sys.modules.get("sklearn.exceptions")
    if theirs is None:
        return NotFittedError(message)
    return _joined(theirs.NotFittedError)(message)


@functools.cache
def _joined(theirs: type[Exception]) -> type[NotFittedError]:
    return type("NotFittedError", (NotFittedError, theirs), {"__module__": "ztune.errors"})


def unit_rows(features: F32) -> F32:
    """Return features f32[N, e] with unit rows; a model's features are returned unchanged."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.where(np.abs(lengths - 1) < 1e-5, features, features / lengths).astype(np.float32)


def _require_width(features: Any, model: Model) -> None:
    width, own = np.shape(features)[-1], model.bundle.embed_dim
    if width != own:
        raise DataError(f"`X` has features of {width} values, expected the model's {own}")


def finite(features: Any) -> F32:
    """Return features as f32[N, e].

    Raises: DataError for non-finite values, or a row of zeros.
    """
    rows = np.ascontiguousarray(features, dtype=np.float32)
    if not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise DataError("`X` has features that are not finite, or a row of zeros")
    return rows


def _plain(name: str, value: Any) -> Any:
    """Return a numpy value as a Python value.

    Raises: ConfigError for another type.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, str | int | float | tuple | list):
        raise ConfigError(f"`{name}` is {type(value).__name__}, expected a number, string or None")
    return value


def _whole(name: str, value: Any) -> int:
    value = _plain(name, value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"`{name}` is {value!r}, expected an integer of at least 0")
    return value


def _are_features(X: Any) -> bool:
    return isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind == "f"


def _from_features(
    features: np.ndarray[Any, Any], y: Labels, class_names: Sequence[str] | None
) -> tuple[TrainingSet, EncodedSplit]:
    """Return a training set of features f32[N, e], in their order within a class."""
    import hashlib

    names = labels_as_names(y, class_names)
    rows = finite(features)
    given = class_names_of(class_names)
    if len(rows) != len(names):
        raise DataError(
            f"`X` has {len(rows)} rows and `y` {len(names)} labels, expected equal numbers"
        )
    classes = tuple(sorted(set(names if given is None else given)))
    labels = label_array(names, classes)
    seen: Counter[tuple[bytes, int]] = Counter()
    digests = []
    for row, label in zip(rows, labels.tolist(), strict=True):
        content = row.tobytes()
        if any((content, other) in seen for other in range(len(classes)) if other != label):
            raise DataError("`X` has equal features in two classes")
        digests.append(hashlib.sha256(content + b"%d" % seen[content, label]).hexdigest())
        seen[content, label] += 1
    order = np.argsort(labels, kind="stable").tolist()
    if len(classes) < 2 or {*labels.tolist()} != {*range(len(classes))}:
        raise DataError(f"`y` has {len({*labels.tolist()})} class(es), expected all {len(classes)}")
    entries = tuple(Entry("data", f"{n:09d}", digests[n], int(labels[n]), "train") for n in order)
    shots = int(np.bincount(labels).max())
    split = Split({"data": MEMORY}, classes, entries, SplitSettings(shots, 0, 0, 0, 0), ())
    rows = unit_rows(rows)
    none = np.zeros(0, dtype=np.int64)
    encoded = EncodedSplit(rows[None, order], labels[order], None, none, 0, 0, ())
    return TrainingSet(split), encoded

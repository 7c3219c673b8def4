"""A packed `classifier.onnx` of `export_onnx` or `ztune pack`, loaded in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.classifier import Classifier, Outputs, classify_pixels, open_classifier
from runtimes.conversions import count_conversions, report_conversions
from runtimes.providers import resolve_execution
from ztune.dataset import Images, Labels, listed_images, true_labels
from ztune.errors import ClosedError, ConfigError
from ztune.evaluate import LabelledImages
from ztune.progress import SILENCE
from ztune.types import F32


def load_classifier(
    path: Path | str, *, provider: str = "auto", threads: int | None = None
) -> DeployedClassifier:
    """Load a packed classifier; no bundle is needed.

    `provider` is auto, cpu, cuda or tensorrt; `threads` is the number of threads, without
    spin-waiting (None: all cores).

    Raises: FormatError for a missing or damaged file, or one not packed by ztune; ProviderError for
        a provider that cannot run it.

    >>> import tempfile, ztune
    >>> from pathlib import Path
    >>> model = ztune.load("models/mini", provider="cpu")
    >>> train, test = ztune.Dataset.from_folder("examples/digits").split(shots=4, seed=1)
    >>> clf = ztune.FewShotClassifier(model, method="gda").fit(train)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     clf.export_onnx(Path(folder) / "classifier.onnx")
    ...     with ztune.load_classifier(Path(folder) / "classifier.onnx", provider="cpu") as packed:
    ...         packed.predict(["examples/digits/seven/0007.png"])
    array(['seven'], dtype='<U5')
    """
    return DeployedClassifier(open_classifier(Path(path), resolve_execution(provider, threads)))


class DeployedClassifier:
    """Classifies images with a packed classifier; thread-safe.

    Images are paths, Pillow images, u8[N, H, W, 3], a list of u8[H, W, 3] of any sizes, or the test
    part of a `Dataset`'s split. They are read as by `ztune predict`.

    >>> import ztune
    >>> sorted(name for name in vars(ztune.DeployedClassifier) if name.startswith("predict"))
    ['predict', 'predict_proba']
    """

    def __init__(self, classifier: Classifier):
        self._path, self._classes = classifier.path, classifier.classes
        self._classifier: Classifier | None = classifier

    def __enter__(self) -> DeployedClassifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the session; memory is freed when no thread uses it."""
        self._classifier = None

    @property
    def classes_(self) -> np.ndarray[Any, Any]:
        """Class names in column order: str[C]."""
        return np.array(self._classes)

    def predict(self, X: Images | LabelledImages) -> np.ndarray[Any, Any]:
        """Return the class name of each image, str[N].

        Raises: DataError for unusable images; ClosedError.
        """
        return np.asarray(self.classes_[self._classify(X).logits.argmax(axis=1)])

    def predict_proba(self, X: Images | LabelledImages) -> F32:
        """Return probabilities f32[N, C].

        Raises: DataError for unusable images; ClosedError.
        """
        return self._classify(X).probabilities

    def decision_function(self, X: Images | LabelledImages) -> F32:
        """Return logits f32[N, C]; with two classes f32[N], second minus first.

        Raises: DataError for unusable images; ClosedError.
        """
        logits = self._classify(X).logits
        return logits if logits.shape[1] > 2 else np.asarray(logits[:, 1] - logits[:, 0])

    def score(self, X: Images | LabelledImages, y: Labels | None = None) -> float:
        """Return the accuracy on labelled images: those of a split, or X with class names y.

        Raises: DataError for unusable images or labels; ClosedError.
        """
        labels = true_labels(X, y, self._classes)
        return float((self._classify(X).logits.argmax(axis=1) == labels).mean())

    def inlier_score(self, X: Images | LabelledImages) -> F32:
        """Return a score f32[N] of each image, below 0 if it belongs to none of the classes.

        `predict` returns the nearest class all the same.

        Raises: ConfigError for a classifier tuned without `reject`; DataError for unusable images;
            ClosedError.
        """
        scores = self._classify(X).inlier_scores
        if scores is None:
            raise ConfigError(
                f'classifier "{self._path}" refuses no images (tune with `reject`, such as 0.05, '
                "and pack again)"
            )
        return scores

    def _classify(self, X: Images | LabelledImages) -> Outputs:
        classifier = self._classifier  # another thread may close it during the call
        if classifier is None:
            raise ClosedError(
                f'classifier "{self._path}" is closed: open it again with ztune.load_classifier'
            )
        images = listed_images(X)
        report_conversions(count_conversions(images), "images", SILENCE)
        return classify_pixels(
            classifier,
            (classifier.read(image, f"image {n}") for n, image in enumerate(images)),
        )

"""A packed `classifier.onnx` in one process: what `export_onnx` and `ztune pack` leave, at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.classifier import Classifier, classify_pixels, open_classifier
from runtimes.providers import resolve_execution
from ztune.dataset import Images, Labels, listed_images, true_labels
from ztune.errors import ClosedError
from ztune.evaluate import LabelledImages
from ztune.types import F32


def load_classifier(
    path: Path | str, *, provider: str = "auto", threads: int | None = None
) -> DeployedClassifier:
    """Return a packed classifier at work; it needs no bundle.

    `provider` is auto, cpu, cuda or tensorrt; `threads` is a number of threads, without
    spin-waiting (None: all cores).

    Raises: FormatError for a file that is absent, damaged or not packed by ztune; ProviderError for
        a provider that does not run it.

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
    """Classifies images with a packed classifier, for several threads at once.

    Images are paths, images of Pillow's, u8[N, H, W, 3], a list of u8[H, W, 3] of any sizes, or the
    test part of a `Dataset`'s split. They are read as `ztune predict` reads them.

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
        """Give the session up, and its memory once no other thread is at work with it."""
        self._classifier = None

    @property
    def classes_(self) -> np.ndarray[Any, Any]:
        """Class names by the order of the columns: str[C]."""
        return np.array(self._classes)

    def predict(self, X: Images | LabelledImages) -> np.ndarray[Any, Any]:
        """Return the class name of each image, str[N].

        Raises: DataError for images that cannot be used; ClosedError.
        """
        return np.asarray(self.classes_[self._classified(X)[0].argmax(axis=1)])

    def predict_proba(self, X: Images | LabelledImages) -> F32:
        """Return probabilities f32[N, C].

        Raises: DataError for images that cannot be used; ClosedError.
        """
        return self._classified(X)[1]

    def decision_function(self, X: Images | LabelledImages) -> F32:
        """Return logits f32[N, C]; of two classes f32[N], the second one's less the first's.

        Raises: DataError for images that cannot be used; ClosedError.
        """
        logits = self._classified(X)[0]
        return logits if logits.shape[1] > 2 else np.asarray(logits[:, 1] - logits[:, 0])

    def score(self, X: Images | LabelledImages, y: Labels | None = None) -> float:
        """Return the accuracy on labelled images: those of a split, or X with class names y.

        Raises: DataError for images or labels that cannot be used; ClosedError.
        """
        labels = true_labels(X, y, self._classes)
        return float((self._classified(X)[0].argmax(axis=1) == labels).mean())

    def _classified(self, X: Images | LabelledImages) -> tuple[F32, F32]:
        """Return logits and probabilities f32[N, C]."""
        classifier = self._classifier  # kept to the end of the call, whoever closes meanwhile
        if classifier is None:
            raise ClosedError(
                f'classifier "{self._path}" is closed: open it again with ztune.load_classifier'
            )
        images = listed_images(X)
        return classify_pixels(
            classifier,
            (classifier.read(image, f"image {n}") for n, image in enumerate(images)),
        )

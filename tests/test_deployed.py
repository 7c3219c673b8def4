"""A packed classifier at work in one process: `ztune.load_classifier`."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ztune
from export.classifier import pack
from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from runtimes.classifier import open_classifier
from runtimes.providers import Execution
from tests.conftest import MINI, Command
from ztune.artifact import read_artifact
from ztune.errors import ClosedError, DataError, FormatError, ProviderError

KINDS = ("plain", "resize", "int8")
N = 40
"""More images than one call takes."""


@pytest.fixture(scope="module")
def packed(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return classifiers of the digits: one as it is, one that resizes, one in int8."""
    folder = tmp_path_factory.mktemp("packed")
    train, _ = ztune.Dataset.from_folder(few_digits).split(shots=4, seed=1)
    quantize_bundle(load_bundle(MINI), folder / "int8-bundle", "int8")
    found = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    for kind in ("plain", "int8"):
        with ztune.load(folder / "int8-bundle" if kind == "int8" else MINI, provider="cpu") as own:
            fitted = ztune.FewShotClassifier(own, method="gda").fit(train)
            fitted.export_onnx(found[kind])
            if kind == "plain":
                fitted.save(folder / "artifact")
                artifact = read_artifact(folder / "artifact")
                pack(own.bundle, artifact, found["resize"], resize=True)
    return found


@pytest.fixture(scope="module")
def test(few_digits: Path) -> Any:
    return ztune.Dataset.from_folder(few_digits).split(shots=4, seed=1)[1]


def opened(path: Path) -> ztune.DeployedClassifier:
    return ztune.load_classifier(path, provider="cpu", threads=1)


def expected(path: Path, images: list[Path]) -> tuple[Any, Any]:
    """Return logits and probabilities as the packed graph gives them, in calls of the same size."""
    classifier = open_classifier(path, Execution("cpu", threads=1))
    size = 32 if path.stem == "plain" else 1
    calls = [
        classifier.classify(np.stack([classifier.read(one) for one in images[n : n + size]]))
        for n in range(0, len(images), size)
    ]
    logits = np.concatenate([call.logits for call in calls])
    return logits, np.concatenate([call.probabilities for call in calls])


def arrays(paths: list[Path]) -> list[Any]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


GIVEN: dict[str, Callable[[list[Path]], Any]] = {
    "paths": list,
    "words": lambda paths: [str(path) for path in paths],
    "images": lambda paths: [Image.open(path) for path in paths],
    "array": lambda paths: np.stack(arrays(paths)),
    "arrays": arrays,
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_bytes_of_the_graph(
    kind: str, given: str, packed: dict[str, Path], test: Any
) -> None:
    paths = [path for path, _ in test.items[:N]]
    logits, probabilities = expected(packed[kind], paths)
    with opened(packed[kind]) as classifier:
        images = GIVEN[given](paths)
        np.testing.assert_array_equal(classifier.decision_function(images), logits)
        np.testing.assert_array_equal(classifier.predict_proba(images), probabilities)
        named = classifier.predict(images)
        np.testing.assert_array_equal(named, classifier.classes_[logits.argmax(axis=1)])


@pytest.mark.parametrize("kind", KINDS)
def test_images_may_differ_in_size(kind: str, packed: dict[str, Path]) -> None:
    random = np.random.default_rng(0)
    images = [
        random.integers(0, 256, (*size, 3), dtype=np.uint8)
        for size in ((40, 31), (8, 8), (100, 200))
    ]
    with opened(packed[kind]) as classifier:
        together = classifier.predict_proba(images)
        alone = [classifier.predict_proba([image]) for image in images]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_command_line_says(
    kind: str, packed: dict[str, Path], test: Any, ztune: Command
) -> None:
    paths = [path for path, _ in test.items[:N]]
    said = ztune("predict", packed[kind], *paths, "--json", "--provider", "cpu", "--threads", 1)
    assert said.code == 0, said.err
    with opened(packed[kind]) as classifier:
        assert [one["class"] for one in said.json["predictions"]] == (
            classifier.predict(paths).tolist()
        )
        best = classifier.predict_proba(paths).max(axis=1)
    assert [one["top"][0]["probability"] for one in said.json["predictions"]] == best.tolist()


def test_it_scores_a_split_or_labels(packed: dict[str, Path], test: Any) -> None:
    paths = [path for path, _ in test.items[:N]]
    names = [test.classes[label] for label in test.labels[:N]]
    with opened(packed["plain"]) as classifier:
        assert classifier.score(test) > 0.6
        guessed = classifier.predict(paths)
        assert classifier.score(paths, names) == np.mean(guessed == np.array(names))
        assert classifier.predict(test).shape == test.labels.shape


def test_images_in_memory_are_split_and_scored(packed: dict[str, Path], few_digits: Path) -> None:
    paths = sorted(few_digits.glob("*/*.png"))
    images, names = arrays(paths), [path.parent.name for path in paths]
    train, kept = ztune.Dataset.from_arrays(images, names).split(shots=4, seed=1)
    assert len(kept.items) > 100
    with opened(packed["plain"]) as classifier:
        assert classifier.score(kept) > 0.6
    with ztune.load(MINI, provider="cpu", threads=1) as model:
        fitted = ztune.FewShotClassifier(model, method="gda").fit(train)
        assert fitted.score(kept) > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_classify_at_once(kind: str, packed: dict[str, Path], test: Any) -> None:
    paths = [path for path, _ in test.items[:N]]
    found: list[Any] = []
    with opened(packed[kind]) as classifier:
        alone = classifier.predict_proba(paths)
        threads = [
            threading.Thread(target=lambda: found.append(classifier.predict_proba(paths)))
            for _ in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, alone)


def test_a_closed_classifier_says_so(packed: dict[str, Path], test: Any) -> None:
    with opened(packed["plain"]) as classifier:
        classes = classifier.classes_
    for ask in (classifier.predict, classifier.predict_proba, classifier.score):
        with pytest.raises(ClosedError, match=r"is closed: open it again with ztune.load_classif"):
            ask(test)
    np.testing.assert_array_equal(classifier.classes_, classes)
    classifier.close()


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([], "`X` is empty"),
        ("a.png", "`X` is one image, expected a list"),
        (Path("a.png"), "`X` is one image, expected a list"),
        (["no-such-file.png"], r'"no-such-file.png" cannot be read: No such file'),
        ([1], r"image 0 is int, expected a path"),
        (np.zeros((2, 128), np.float32), r"image 0 is float32\[128\], expected u8\[H, W, 3\]"),
        ([np.zeros((8, 8), np.uint8)], r"image 0 is uint8\[8, 8\], expected u8\[H, W, 3\]"),
    ],
)
def test_what_cannot_be_classified(X: Any, message: str, packed: dict[str, Path]) -> None:
    with opened(packed["plain"]) as classifier, pytest.raises(DataError, match=message) as raised:
        classifier.predict(X)
    assert "skip_broken" not in str(raised.value)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "`y` is missing"),
        (["seven"], "`X` has 2 images and `y` 1 labels, expected equal numbers"),
        (["seven", "eleven"], "'eleven' is not among the classes of the classifier"),
        ([7, 1], "`labels` are indices without `class_names`: pass class names"),
    ],
)
def test_labels_that_cannot_be_scored(
    y: Any, message: str, packed: dict[str, Path], test: Any
) -> None:
    paths = [path for path, _ in test.items[:2]]
    with opened(packed["plain"]) as classifier:
        with pytest.raises(DataError, match=message):
            classifier.score(paths, y)
        with pytest.raises(DataError, match="the split in `X` has labels"):
            classifier.score(test, ["seven"])


def test_files_that_are_no_classifier(packed: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        ztune.load_classifier(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("nothing")
    with pytest.raises(FormatError, match=r"text\.onnx"):
        ztune.load_classifier(tmp_path / "text.onnx", provider="cpu")
    with pytest.raises(ProviderError, match='unknown provider "tpu"'):
        ztune.load_classifier(str(packed["plain"]), provider="tpu")

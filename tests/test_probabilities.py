"""Probabilities from end to end: the temperature of each method, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ztune
from runtimes.classifier import classify, open_classifier
from runtimes.providers import resolve_execution
from tests.conftest import MINI, Command
from ztune.artifact import read_artifact, write_artifact
from ztune.errors import FormatError
from ztune.io.tensors import read_tensors, write_tensors
from ztune.statistics import score

HEADS = ["gda", "lp++", "proker", "tip-adapter"]


@pytest.fixture(scope="module")
def model() -> ztune.Model:
    return ztune.load(MINI)


@pytest.fixture(scope="module")
def features(model: ztune.Model, few_digits: Path) -> tuple[np.ndarray, list[str]]:
    paths = sorted(few_digits.glob("*/*.png"))
    return model.encode_images(paths), [path.parent.name for path in paths]


def halves(features: tuple[np.ndarray, list[str]], shots: int) -> tuple[list[int], list[int]]:
    """Return the rows of the first images of each class, and of all others."""
    seen: dict[str, int] = {}
    rows: tuple[list[int], list[int]] = ([], [])
    for row, name in enumerate(features[1]):
        seen[name] = seen.get(name, 0) + 1
        rows[seen[name] > shots].append(row)
    return rows


@pytest.mark.parametrize("method", [*HEADS, "ogn", "auto"])
def test_probabilities_can_be_relied_on(
    method: str, model: ztune.Model, features: tuple[np.ndarray, list[str]]
) -> None:
    (X, y), (train, test) = features, halves(features, 16)
    clf = ztune.FewShotClassifier(model, method=method, queries=100)
    clf.fit(X[train], [y[row] for row in train])
    assert clf.temperature_ is not None
    labels = np.searchsorted(clf.classes_, [y[row] for row in test])
    logits, p = clf.decision_function(X[test]), clf.predict_proba(X[test])
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    assert (p.argmax(axis=1) == logits.argmax(axis=1)).all()
    classes = tuple(clf.classes_)
    found = score(logits, labels, classes, clf.temperature_)
    assert found.ece < 0.12
    as_trained = score(logits, labels, classes)
    assert found.accuracy == as_trained.accuracy
    assert found.nll <= as_trained.nll + 0.02
    assert found.confidences == pytest.approx(p.max(axis=1), abs=1e-5)


def test_with_one_image_per_class_a_head_has_no_temperature(
    model: ztune.Model, features: tuple[np.ndarray, list[str]]
) -> None:
    (X, y), (train, _) = features, halves(features, 1)
    clf = ztune.FewShotClassifier(model, method="gda").fit(X[train], [y[row] for row in train])
    assert clf.temperature_ is None


def test_validation_images_give_an_ensemble_its_temperature(
    model: ztune.Model, few_digits: Path, tmp_path: Path
) -> None:
    data = ztune.Dataset.from_folder(few_digits)
    train, test = data.split(shots=1, val=4)  # nothing can be held out of one image per class
    clf = ztune.FewShotClassifier(model, queries=20).fit(train)
    T, paths = clf.temperature_, [path for path, _ in test.items[:8]]
    assert T is not None
    assert abs(T - 1) > 0.05
    exponentials = np.exp(clf.decision_function(paths).astype(np.float64) / T)
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(clf.predict_proba(paths), expected, atol=1e-5)
    clf.save(tmp_path / "a.safetensors")
    clf.export_onnx(tmp_path / "a.onnx")
    assert read_artifact(tmp_path / "a.safetensors").classifier().temperature == T
    with ztune.load_classifier(tmp_path / "a.onnx") as deployed:
        np.testing.assert_allclose(deployed.predict_proba(paths), expected, atol=1e-4)


def test_views_of_an_image_are_one_image_where_it_is_held_out(
    few_digits: Path, ztune: Command, tmp_path: Path
) -> None:
    words = ("tune", MINI, "--data", few_digits, "--method", "gda", "--shots", 16, "--val", 0)
    done = ztune(*words, "--augment", 3, "--out", tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["calibration"]["n"] == 160
    assert report["cross_validation"]["n"] == report["hand_written"]["n"] == 160


@pytest.mark.parametrize("method", ["gda", "zip", "bar"])
def test_a_run_says_what_its_temperature_was_fitted_on(
    method: str, few_digits: Path, ztune: Command, tmp_path: Path
) -> None:
    run, packed = tmp_path / "run", tmp_path / "classifier.onnx"
    own = {"gda": ("--val", 0), "zip": ("--queries", 40), "bar": ("--queries", 40)}[method]
    words = ("tune", MINI, "--data", few_digits, "--method", method, "--shots", 8, *own)
    done = ztune(*words, "--out", run)
    assert done.code == 0, done.err
    said = json.loads((run / "run.json").read_text())["calibration"]
    artifact = read_artifact(run / "prompt.safetensors")
    assert said["temperature"] == artifact.temperature
    if method == "gda":
        assert (said["images"], said["n"]) == ("folds", 80)
        assert "fitted on 80 held-out training images" in done.out
    else:
        assert (said["images"], said["n"]) == ("validation", 40)
        assert "fitted on 40 validation images" in done.out
    assert ztune("pack", MINI, "--prompt", run, "--out", packed).code == 0
    classifier = open_classifier(packed, resolve_execution("cpu", None))
    assert classifier.temperature == artifact.temperature
    paths = sorted(few_digits.glob("*/*.png"))[::9]
    (logits, p, _), _ = classify(classifier, paths, skip_broken=False)
    assert artifact.temperature is not None
    scaled = logits.astype(np.float64) / artifact.temperature
    expected = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    np.testing.assert_allclose(p, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)
    by_run = ztune("eval", run, "--json", "--quiet").json
    score_it = ("eval", packed, "--split-file", run / "split.json", "--json", "--quiet")
    by_classifier = ztune(*score_it).json
    for name in ("accuracy", "ece", "nll", "brier", "temperature"):
        assert by_run[name] == pytest.approx(by_classifier[name], abs=1e-3)
    assert sum(one["n"] for one in by_run["reliability"]) == by_run["n"]
    with Image.open(run / "reliability.png") as image:
        assert image.width > 400


def test_a_temperature_that_no_probability_can_have_is_refused(tmp_path: Path) -> None:
    from tests.ztune.test_artifact import HEAD

    path = tmp_path / "a.safetensors"
    write_artifact(path, HEAD)
    arrays, metadata = read_tensors(path, "artifact")
    for wrong in (0, -1.0, 1e9, "warm"):
        write_tensors(path, arrays, {**metadata, "temperature": wrong})
        with pytest.raises(FormatError, match=r"\$\.temperature"):
            read_artifact(path)

"""Images of none of the classes, from end to end: fit, store, pack, predict and measure."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import ztune
from runtimes.preprocess import crop
from tests.conftest import MINI, Command
from ztune.artifact import inliers_of, read_artifact
from ztune.capabilities import EVERYTHING, FEATURES, TEXTS
from ztune.errors import ConfigError, ZtuneWarning
from ztune.inliers import Refusals
from ztune.types import F32

SHARE = 0.05
ODD = {
    "black": np.zeros((40, 40, 3), np.uint8),
    "white": np.full((40, 40, 3), 255, np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8),
}


@pytest.fixture(scope="module")
def model() -> Iterator[ztune.Model]:
    with ztune.load(MINI, provider="cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def parts(few_digits: Path) -> Any:
    return ztune.Dataset.from_folder(few_digits).split(shots=16, seed=1)


@pytest.fixture(scope="module")
def fitted(model: ztune.Model, parts: Any) -> ztune.FewShotClassifier:
    return ztune.FewShotClassifier(model, method="gda", reject=SHARE).fit(parts[0])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of no digit."""
    folder = tmp_path_factory.mktemp("odd")
    for name, pixels in ODD.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def run(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that can refuse, and next to it its classifier.onnx."""
    from ztune.cli.main import main

    folder = tmp_path_factory.mktemp("runs")
    words = ("--data", few_digits, "--method", "gda", "--reject", SHARE, "--out", folder / "run")
    assert main(["tune", str(MINI), *map(str, words)]) == 0
    packed = ("--prompt", folder / "run", "--out", folder / "classifier.onnx")
    assert main(["pack", str(MINI), *map(str, packed)]) == 0
    return folder / "run"


def test_a_black_image_is_no_digit(fitted: ztune.FewShotClassifier, parts: Any) -> None:
    scores = fitted.inlier_score(list(ODD.values()))
    assert (scores < -0.1).all()
    own = fitted.inlier_score(parts[1])
    assert own.shape == (len(parts[1]),)
    assert own.dtype == np.float32
    assert 0.01 < (own < 0).mean() < 0.12
    assert fitted.predict([ODD["black"]])[0] in fitted.classes_  # the nearest class all the same


def test_it_changes_no_prediction(
    model: ztune.Model, fitted: ztune.FewShotClassifier, parts: Any, tmp_path: Path
) -> None:
    plain = ztune.FewShotClassifier(model, method="gda").fit(parts[0])
    features = model.encode_images(list(parts[1].images)[:40])
    np.testing.assert_array_equal(
        plain.decision_function(features), fitted.decision_function(features)
    )
    with pytest.raises(ConfigError, match="`reject` is None"):
        plain.inlier_score(features)
    plain.save(tmp_path / "plain")
    assert inliers_of(read_artifact(tmp_path / "plain")) is None
    plain.export_onnx(tmp_path / "plain.onnx")
    with (
        ztune.load_classifier(tmp_path / "plain.onnx", provider="cpu") as packed,
        pytest.raises(ConfigError, match="refuses no images"),
    ):
        packed.inlier_score([ODD["black"]])


def test_plain_onnx_runtime_gives_the_same_scores(
    model: ztune.Model, fitted: ztune.FewShotClassifier, parts: Any, tmp_path: Path
) -> None:
    fitted.export_onnx(tmp_path / "c.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "c.onnx")
    assert [value.name for value in session.get_outputs()] == [
        "logits",
        "probabilities",
        "inlier_score",
    ]
    given = [*parts[1].images, *(Image.fromarray(pixels) for pixels in ODD.values())]
    opened = [image if isinstance(image, Image.Image) else Image.open(image) for image in given]
    pixels = np.stack([crop(image.convert("RGB"), model.bundle.image) for image in opened])
    (found,) = session.run(["inlier_score"], {"pixels": pixels})
    expected = fitted.inlier_score(given)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ((found < 0) == (expected < 0))[np.abs(expected) > 1e-5].all()
    with ztune.load_classifier(tmp_path / "c.onnx", provider="cpu", threads=1) as packed:
        np.testing.assert_allclose(packed.inlier_score(given), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["zero-shot", "proker", "zip", "ogn", "auto"])
def test_every_method_on_features_can_refuse(
    method: str, model: ztune.Model, parts: Any, fitted: ztune.FewShotClassifier, tmp_path: Path
) -> None:
    """Prototypes depend on the images only, so all methods refuse the same images."""
    clf = ztune.FewShotClassifier(model, method=method, queries=40, reject=SHARE).fit(parts[0])
    clf.save(tmp_path / "artifact")
    again = ztune.FewShotClassifier(model).load_artifact(tmp_path / "artifact")
    features = model.encode_images(list(parts[1].images)[:40])
    expected = fitted.inlier_score(features)
    np.testing.assert_array_equal(clf.inlier_score(features), expected)
    np.testing.assert_array_equal(again.inlier_score(features), expected)
    clf.export_onnx(tmp_path / "c.onnx")
    with ztune.load_classifier(tmp_path / "c.onnx", provider="cpu", threads=1) as packed:
        scores = packed.inlier_score(list(parts[1].images)[:40])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_other_class_names(model: ztune.Model, parts: Any, tmp_path: Path) -> None:
    clf = ztune.FewShotClassifier(model, method="zip", queries=20, reject=SHARE).fit(parts[0])
    clf.save(tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    some = inliers_of(model.refresh(artifact, ("seven", "one")))
    whole = inliers_of(artifact)
    assert some is not None
    assert whole is not None
    rows = [artifact.classes.index(name) for name in ("seven", "one")]
    np.testing.assert_array_equal(some.prototypes, whole.prototypes[rows])
    with pytest.warns(ZtuneWarning, match="no image is refused as none of the classes"):
        assert inliers_of(model.refresh(artifact, ("seven", "ten"))) is None


def test_one_image_in_each_class(model: ztune.Model, few_digits: Path) -> None:
    train, test = ztune.Dataset.from_folder(few_digits).split(shots=1, val=0, seed=1)
    clf = ztune.FewShotClassifier(model, method="gda", reject=SHARE)
    with pytest.warns(ZtuneWarning, match="less than 10 training images can show"):
        clf.fit(train)
    assert (clf.inlier_score(list(ODD.values())) < 0).all()
    assert (clf.inlier_score(test) < 0).mean() < 0.3


def test_images_of_a_class_that_are_all_equal(model: ztune.Model, parts: Any) -> None:
    some = model.encode_images([parts[1].images[0], parts[1].images[-1]])
    features, names = np.repeat(some, 20, axis=0), ["a"] * 20 + ["b"] * 20
    clf = ztune.FewShotClassifier(model, method="gda", reject=SHARE).fit(features, names)
    assert (clf.inlier_score(some) >= 0).all()
    assert (clf.inlier_score(list(ODD.values())) < 0).all()


@pytest.mark.parametrize("share", [0, 0.5, -0.1, 1, float("nan"), float("inf")])
def test_shares_that_no_threshold_can_have(
    share: float, model: ztune.Model, ztune: Command, tmp_path: Path
) -> None:
    from ztune import FewShotClassifier

    wrong: list[Any] = [share, str(share)]
    for given in wrong:
        clf = FewShotClassifier(model, method="gda", reject=given)
        with pytest.raises(ConfigError, match=r"`reject` is .*, expected a share"):
            clf.fit(np.eye(4), list("aabb"))
    words = ("tune", MINI, "--data", tmp_path, "--out", tmp_path / "run")
    done = ztune(*words, f"--reject={share}")
    assert done.code == 1
    assert "--reject is " in done.err
    assert not (tmp_path / "run").exists()


def test_methods_that_change_images_and_runtimes_without_features_cannot_refuse(
    model: ztune.Model, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clf = ztune.FewShotClassifier(model, method="bar", queries=6, reject=SHARE)
    with pytest.raises(ConfigError, match="bar changes images: leave out `reject`"):
        clf.fit(parts[0])
    given = property(lambda _: EVERYTHING - {FEATURES, TEXTS})
    monkeypatch.setattr(ztune.Model, "capabilities", given)
    clf = ztune.FewShotClassifier(model, method="zip", queries=20, reject=SHARE)
    with pytest.raises(ConfigError, match="`reject` needs text features, image features"):
        clf.fit(parts[0])


def rejection(done: Any) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json["rejection"]
    return found


def test_eval_measures_own_and_foreign_images(
    run: Path, few_digits: Path, odd: Path, ztune: Command
) -> None:
    packed, split = run.parent / "classifier.onnx", run / "split.json"
    own = rejection(ztune("eval", run, "--json", "--quiet"))
    assert own.keys() == {"reject", "own_refused"}
    assert own["reject"] == SHARE
    expected = {
        **own,
        "foreign_accepted": {"share": 0.0, "n": 3},
        "foreign_shared": 0,
        "auroc": pytest.approx(1.0),
    }
    for words in (
        ("eval", run),
        ("eval", packed, "--split-file", split),
        ("eval", MINI, "--split-file", split, "--prompt", run),
    ):
        found = rejection(ztune(*words, "--foreign", odd, "--json", "--quiet"))
        low, high = found["foreign_accepted"].pop("interval")
        assert low == pytest.approx(0, abs=1e-9)
        assert 0 < high < 1
        assert found == expected
    shown = ztune("eval", run, "--foreign", odd)
    for title in ("own images refused", "foreign images accepted", "AUROC"):
        assert title in shown.out


def test_a_foreign_folder_that_is_the_tasks_own(
    run: Path, few_digits: Path, ztune: Command
) -> None:
    packed, split = run.parent / "classifier.onnx", run / "split.json"
    entries = json.loads(split.read_text())["entries"]
    n_own = sum(entry["class"] == "seven" for entry in entries)
    for words in (("eval", run), ("eval", packed, "--split-file", split)):
        done = ztune(*words, "--foreign", few_digits / "seven", "--json")
        assert f"{n_own} of these 44 foreign images are the task's own" in done.err
        found = rejection(done)
        assert found["foreign_shared"] == n_own
        assert found["foreign_accepted"]["share"] > 0.8


def test_foreign_images_that_cannot_be_used(
    run: Path, few_digits: Path, odd: Path, ztune: Command, tmp_path: Path
) -> None:
    done = ztune("eval", run, "--foreign", tmp_path / "missing")
    assert done.code == 1
    assert "does not exist" in done.err
    done = ztune("eval", MINI, "--data", few_digits, "--split", "all", "--foreign", odd)
    assert done.code == 1
    assert "--foreign needs a result that refuses images" in done.err
    shutil.copytree(odd, tmp_path / "odd")
    (tmp_path / "odd" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    packed, split = run.parent / "classifier.onnx", run / "split.json"
    for words in (("eval", run), ("eval", packed, "--split-file", split)):
        refused = ztune(*words, "--foreign", tmp_path / "odd")
        assert refused.code == 1
        assert "broken.png" in refused.err
        found = ztune(*words, "--foreign", tmp_path / "odd", "--skip-broken", "--json", "--quiet")
        assert rejection(found)["foreign_accepted"]["n"] == 3


def test_a_run_without_test_images_compares_foreign_images_with_training_images(
    model: ztune.Model, few_digits: Path, odd: Path, ztune: Command, tmp_path: Path
) -> None:
    words = ("--data", few_digits, "--queries", 40, "--reject", SHARE, "--test-fraction", 0)
    done = ztune("tune", MINI, *words, "--shots", 16, "--val", 0, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "about 5.0% of images of the classes" in done.out
    assert ztune("eval", tmp_path / "run").code == 0  # a cross-validated accuracy
    done = ztune("eval", tmp_path / "run", "--foreign", odd)
    assert done.code == 0, done.err
    assert "no test images; cross-validated on" in done.out
    done = ztune("eval", tmp_path / "run", "--foreign", odd, "--json", "--quiet")
    found = rejection(done)
    assert done.json["split"] == "cross-validation"
    assert found["own_refused"]["n"] == 160
    # Each training image by prototypes made without it: about the share that was asked for.
    assert 0.02 <= found["own_refused"]["share"] <= 0.08
    assert found["foreign_accepted"]["n"] == 3
    assert found["auroc"] > 0.9
    of_its_own = ztune("eval", tmp_path / "run", "--foreign", few_digits / "seven", "--json")
    assert rejection(of_its_own)["foreign_shared"] == 16


def test_predict_says_unknown(run: Path, few_digits: Path, odd: Path, ztune: Command) -> None:
    packed = run.parent / "classifier.onnx"
    digit = sorted((few_digits / "zero").glob("*.png"))[0]
    shown = ztune("predict", packed, odd / "black.png", digit)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].split() == ["image", "class", "1.", "2.", "3."]
    assert lines[1].split()[1] == "unknown"
    assert lines[2].split()[1] == "zero"
    first, second = ztune("predict", packed, odd / "black.png", digit, "--json").json["predictions"]
    assert first["class"] is None
    assert first["inlier_score"] < 0 <= second["inlier_score"]
    assert len(first["top"]) == 3
    assert second["class"] == second["top"][0]["class"] == "zero"


def test_an_inlier_score_of_exactly_0_is_accepted() -> None:
    scores: F32 = np.zeros(3, np.float32)
    assert Refusals(SHARE, scores, scores).refused.n_right == 0

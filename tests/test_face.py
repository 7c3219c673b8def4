"""The library as a caller has it: `import ztune`, from images to a classifier."""

import copy
import json
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import ztune
from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from tests.conftest import DIGITS, FEW_DIGITS, MINI, Command
from ztune.errors import (
    ClosedError,
    ConfigError,
    DataError,
    NotFittedError,
    ZtuneError,
    ZtuneWarning,
)
from ztune.model import Model

pytestmark = pytest.mark.usefixtures("quick_figures")

TEMPLATE = "a photo of the digit {}."
SETTINGS: dict[str, dict[str, Any]] = {
    "ogn": {"queries": 60},
    "zip": {"queries": 60},
    "gda": {},
    "proker": {},
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with ztune.load(MINI, provider="cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def train() -> Any:
    return ztune.Dataset.from_folder(FEW_DIGITS).split(shots=4, seed=1)[0]


@pytest.fixture(scope="module")
def test() -> Any:
    return ztune.Dataset.from_folder(FEW_DIGITS).split(shots=4, seed=1)[1]


def classifier(model: Model, method: str, **more: Any) -> ztune.FewShotClassifier:
    given = {**SETTINGS[method], "templates": TEMPLATE, **more}
    return ztune.FewShotClassifier(model, method=method, **given)


def saved(fitted: ztune.FewShotClassifier, path: Path) -> bytes:
    fitted.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("method", SETTINGS)
def test_a_fit_gives_the_bytes_of_the_command_line(
    method: str, model: Model, train: Any, tmp_path: Path, ztune: Command
) -> None:
    words = ("--method", method, "--shots", 4, "--seed", 1, "--template", TEMPLATE, "--threads", 1)
    spent = [w for k, v in SETTINGS[method].items() for w in (f"--{k}", v)]
    out = tmp_path / "out"
    done = ztune(
        "tune", MINI, "--data", FEW_DIGITS, *words, *spent, "--provider", "cpu", "--out", out
    )
    assert done.code == 0, done.err
    expected = (out / "prompt.safetensors").read_bytes()
    assert saved(classifier(model, method).fit(train), tmp_path / "memory") == expected
    folder = tmp_path / "folder"
    assert (
        saved(classifier(model, method).fit(train, run_dir=folder), tmp_path / "disk") == expected
    )
    assert (folder / "prompt.safetensors").read_bytes() == expected
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}


def tensors(fitted: ztune.FewShotClassifier, path: Path) -> dict[str, Any]:
    """Return what was fitted, less the digests of the images that it was fitted on."""
    fitted.save(path)
    found: dict[str, Any] = load_file(path)
    del found["tuning_images"]
    return found


@pytest.mark.parametrize("method", SETTINGS)
def test_paths_images_arrays_and_features_give_the_same_tensors(
    method: str, model: Model, tmp_path: Path
) -> None:
    train, _ = ztune.Dataset.from_folder(FEW_DIGITS).split(shots=4, seed=1, val=0)
    expected = tensors(classifier(model, method).fit(train), tmp_path / "split")
    paths = [path for path, _ in train.split.items("train")]
    y = [train.classes[label] for label in train.split.labels("train")]
    images = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    indices = train.split.labels("train")
    given: dict[str, tuple[Any, Any, Any]] = {
        "paths": (paths[::-1], y[::-1], None),  # files are drawn by what is in them
        "words": ([str(path) for path in paths], y, None),
        "images": (images, y, None),
        "array": (arrays, indices, train.classes),
        "arrays": ([*arrays], np.array(y), None),
        "features": (model.encode_images(paths), y, None),
    }
    for name, (X, labels, names) in given.items():
        fitted = classifier(model, method).fit(X, labels, class_names=names)
        found = tensors(fitted, tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{name}: {key}")


def test_nothing_touches_the_disk(
    model: Model, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    classifier(model, "zip").fit(train)
    assert list(tmp_path.iterdir()) == []


def test_predictions_agree_however_an_image_is_given(model: Model, train: Any, test: Any) -> None:
    fitted = classifier(model, "gda").fit(train)
    paths = [path for path, _ in test.items[:20]]
    opened = [Image.open(path) for path in paths]
    arrays = [np.asarray(one.convert("RGB")) for one in opened]
    expected = fitted.predict(paths)
    for images in (list(map(str, paths)), opened, arrays, np.stack(arrays)):
        np.testing.assert_array_equal(fitted.predict(images), expected)
    np.testing.assert_array_equal(fitted.predict(model.encode_images(paths)), expected)
    probabilities = fitted.predict_proba(paths)
    assert probabilities.shape == (20, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(fitted.classes_[probabilities.argmax(axis=1)], expected)
    assert fitted.score(test) > 0.6
    names = [test.classes[label] for label in test.labels[:20]]
    assert fitted.score(paths, names) == np.mean(expected == np.array(names))
    assert fitted.cost_["image_forwards"] == 80


def test_several_threads_predict_at_once(model: Model, train: Any, test: Any) -> None:
    fitted = classifier(model, "gda").fit(train)
    paths = [path for path, _ in test.items[:16]]
    expected = fitted.predict_proba(paths)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(fitted.predict_proba(paths))) for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, expected)


def test_a_run_goes_on_where_it_was_stopped(model: Model, train: Any, tmp_path: Path) -> None:
    whole = classifier(model, "zip").fit(train, run_dir=tmp_path / "whole")
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "prompt.safetensors").unlink()
    head = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**head, "status": "running"}))
    again = classifier(model, "zip").fit(train, run_dir=folder)
    assert saved(again, tmp_path / "a") == saved(whole, tmp_path / "b")
    with pytest.raises(ConfigError, match="started with other seed"):
        classifier(model, "zip", seed=2).fit(train, run_dir=folder)
    other, _ = ztune.Dataset.from_folder(FEW_DIGITS).split(shots=5, seed=1)
    with pytest.raises(ConfigError, match="started with other images"):
        classifier(model, "zip").fit(other, run_dir=folder)


def test_what_was_saved_predicts_elsewhere(
    model: Model, train: Any, test: Any, tmp_path: Path, ztune: Command
) -> None:
    fitted = classifier(model, "ogn").fit(train)
    fitted.save(tmp_path / "prompt.safetensors")
    paths = [path for path, _ in test.items[:10]]
    loaded = classifier(model, "ogn").load_artifact(tmp_path / "prompt.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(paths), fitted.predict_proba(paths))
    fitted.export_onnx(tmp_path / "classifier.onnx")
    said = ztune("predict", tmp_path / "classifier.onnx", *paths, "--json", "--provider", "cpu")
    assert said.code == 0, said.err
    assert [one["class"] for one in said.json["predictions"]] == fitted.predict(paths).tolist()
    with pytest.raises(TypeError, match=r"save\(\) the artifact"):
        pickle.dumps(fitted)


def test_scikit_learn_can_search_and_cross_validate(model: Model, train: Any) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    base = pytest.importorskip("sklearn.base")
    items = train.split.items("train")
    paths = np.array([str(path) for path, _ in items])
    y = np.array([train.classes[label] for label in train.split.labels("train")])
    scores = selection.cross_val_score(classifier(model, "gda"), paths, y, cv=2)
    assert scores.shape == (2,)
    assert scores.min() > 0.3
    features = model.encode_images(paths.tolist())
    grid = {"step_size": [0.001, 0.01]}
    search = selection.GridSearchCV(classifier(model, "zip"), grid, cv=2).fit(features, y)
    assert search.best_params_["step_size"] in grid["step_size"]
    assert len(search.cv_results_["mean_test_score"]) == 2
    one = classifier(model, "zip", step_size=0.01)
    copy = base.clone(one)
    assert copy.get_params() == one.get_params()
    assert copy.model is model
    assert copy.set_params(step_size=0.02, seed=3).get_params()["step_size"] == 0.02
    assert one.get_params()["step_size"] == 0.01


def test_a_method_that_changes_images_needs_images(model: Model, train: Any) -> None:
    paths = [path for path, _ in train.split.items("train")]
    y = [train.classes[label] for label in train.split.labels("train")]
    given = ztune.FewShotClassifier(model, method="blackvip", queries=10, templates=TEMPLATE)
    with pytest.raises(ConfigError, match="blackvip changes images, so `X` must be images"):
        given.fit(model.encode_images(paths), y)
    fitted = given.fit(paths, y)
    assert fitted.predict(paths[:3]).shape == (3,)
    with pytest.raises(DataError, match="changes images: pass images, not features"):
        fitted.predict(model.encode_images(paths[:3]))


def test_a_manifest_and_names_of_folders_are_read(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("one\tthe one\ntwo\tthe two\n")
    for name in ("one", "two"):
        shutil.copytree(DIGITS / name, tmp_path / "digits" / name)
    data = ztune.Dataset.from_folder(tmp_path / "digits", names=names)
    assert data.classes == ("the one", "the two")
    paths = [next((tmp_path / "digits" / name).iterdir()) for name in ("one", "two")]
    manifest = tmp_path / "list.csv"
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}_digit" for path in paths]
    manifest.write_text("\n".join(["path,label", *rows, ""]))
    data = ztune.Dataset.from_manifest(manifest)
    assert (data.classes, len(data)) == (("one digit", "two digit"), 2)


def test_a_model_encodes_images_and_texts(model: Model, test: Any) -> None:
    paths = [path for path, _ in test.items[:9]]
    images = model.encode_images(paths)
    assert images.shape == (9, model.bundle.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    texts = model.encode_texts([TEMPLATE.format(name) for name in test.classes])
    zero_shot = model.zero_shot((TEMPLATE,), test.classes)
    guessed = (images @ texts.T).argmax(axis=1)
    np.testing.assert_array_equal(guessed, zero_shot.logits(images).argmax(axis=1))


def test_a_closed_model_says_so(train: Any, test: Any, tmp_path: Path) -> None:
    paths = [path for path, _ in test.items[:3]]
    with ztune.load(MINI, provider="cpu", threads=1) as model:
        features = model.encode_images(paths)
        model.encode_texts(["a digit"])  # its graph is open
        fitted = classifier(model, "gda").fit(train, run_dir=tmp_path / "run")
        used = classifier(model, "gda").fit(train)
        expected = used.predict(paths)  # its tower is open
        copy = replace(model, held={})
    asked: dict[str, Any] = {
        "images": lambda: model.encode_images(paths),
        "texts": lambda: model.encode_texts(["a digit"]),
        "fit": lambda: classifier(model, "gda").fit(train),
        "fit that is finished": lambda: fitted.fit(train, run_dir=tmp_path / "run"),
        "predict first": lambda: fitted.predict(paths),
        "predict": lambda: used.predict(paths),
        "score": lambda: used.score(test),
        "copy": lambda: copy.encode_texts(["a digit"]),
    }
    for ask in asked.values():
        with pytest.raises(ClosedError, match=r'bundle ".*mini" is closed: load it again with ztu'):
            ask()
    np.testing.assert_array_equal(used.predict(features), expected)  # no forward pass
    model.close()


def test_labels_to_score_by_are_checked(
    model: Model, train: Any, test: Any, tmp_path: Path
) -> None:
    fitted = classifier(model, "gda").fit(train)
    paths = [path for path, _ in test.items[:2]]
    with pytest.raises(DataError, match="`X` has 2 images and `y` 1 labels"):
        fitted.score(paths, ["seven"])
    with pytest.raises(DataError, match="`X` is one image"):
        fitted.predict(str(paths[0]))
    fitted.save(tmp_path / "artifact")
    loaded = classifier(model, "gda").load_artifact(tmp_path / "artifact")
    names = [test.classes[label] for label in test.labels[:2]]
    assert loaded.score(paths, names) == fitted.score(paths, names)


@pytest.mark.parametrize(
    ("X", "y", "more", "error", "message"),
    [
        ("images", [1.5] * 4, {}, DataError, "label 1.5 is float, expected class names or indices"),
        ("images", [0, 0, 1, 1], {}, DataError, "pass class names, or add `class_names`"),
        ("images", [0, 0, 1, 7], {"class_names": ["a", "b"]}, DataError, "label 7 is out of range"),
        (
            "images",
            ["a", "b"],
            {},
            DataError,
            "got 4 `images` and 2 `labels`, expected equal numbers",
        ),
        ("images", ["a"] * 4, {}, DataError, "expected at least two"),
        ("images", None, {}, DataError, "`y` is missing"),
        (
            "floats",
            ["a", "a", "b", "b"],
            {},
            DataError,
            r"float64\[8, 8, 3\], expected u8\[H, W, 3\]",
        ),
        ("words", ["a", "a", "b", "b"], {}, DataError, "no-such-file"),
        ("numbers", ["a", "a", "b", "b"], {}, DataError, "is int, expected a path"),
        (
            "narrow",
            ["a", "a", "b", "b"],
            {},
            DataError,
            "features of 3 values, expected the model's 128",
        ),
        ("infinite", ["a", "a", "b", "b"], {}, DataError, "not finite"),
    ],
)
def test_input_that_cannot_be_fitted(
    model: Model, X: str, y: Any, more: dict[str, Any], error: type[ZtuneError], message: str
) -> None:
    random = np.random.default_rng(0)
    given: Any = {
        "images": [*random.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)],
        "floats": [*random.random((4, 8, 8, 3))],
        "words": ["no-such-file.png"] * 4,
        "numbers": [1, 2, 3, 4],
        "narrow": random.random((4, 3)),
        "infinite": np.full((4, 128), np.nan),
    }[X]
    with pytest.raises(error, match=message):
        classifier(model, "gda").fit(given, y, **more)


def test_names_that_do_not_exist(model: Model, train: Any) -> None:
    with pytest.raises(ConfigError, match=r'unknown method "zap" \(did you mean zip\?\)'):
        ztune.FewShotClassifier(model, method="zap").fit(train)
    with pytest.raises(ConfigError, match=r'no setting "step_sise" \(did you mean step_size\?\)'):
        classifier(model, "zip", step_sise=1).fit(train)
    with pytest.raises(DataError, match=r"`X` is one path, .* Dataset\.from_folder"):
        classifier(model, "gda").fit(str(DIGITS))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        classifier(model, "zip").predict(["a.png"])
    with pytest.raises(DataError, match="`shots`"):
        ztune.Dataset.from_folder(FEW_DIGITS).split(shots=5000)
    with pytest.raises(ZtuneError, match=r"does not exist|is not a folder"):
        ztune.load("no-such-bundle")
    with pytest.raises(ConfigError, match="`token_file` requires a server"):
        ztune.load(MINI, token_file="x")


def test_what_was_loaded_scores_and_remembers_nothing(
    model: Model, train: Any, test: Any, tmp_path: Path
) -> None:
    classifier(model, "zip").fit(train).save(tmp_path / "prompt.safetensors")
    loaded = classifier(model, "zip").load_artifact(tmp_path / "prompt.safetensors")
    paths = [path for path, _ in test.items[:20]]
    names = [test.classes[label] for label in test.labels[:20]]
    assert 0 <= loaded.score(paths, names) <= 1
    assert (loaded.history_, loaded.cost_) == ([], {})
    with pytest.raises(DataError, match="`X` is one image, expected a list"):
        loaded.predict(paths[0])


def test_the_length_of_features_does_not_matter(model: Model, train: Any) -> None:
    paths = [path for path, _ in train.split.items("train")]
    y = [train.classes[label] for label in train.split.labels("train")]
    features = model.encode_images(paths)
    fitted = classifier(model, "gda").fit(features, y)
    scaled, plain = fitted.predict_proba(3 * features), fitted.predict_proba(features)
    np.testing.assert_allclose(scaled, plain, atol=1e-4)


def test_a_resumable_fit_has_its_history(model: Model, train: Any, tmp_path: Path) -> None:
    fitted = classifier(model, "zip").fit(train, run_dir=tmp_path / "run")
    assert fitted.history_[-1]["queries"] == 60
    assert fitted.cost_["queries"] == 60


def test_what_is_not_fitted_says_so_to_scikit_learn_too(model: Model) -> None:
    fresh = classifier(model, "gda")
    assert not hasattr(fresh, "classes_")
    exceptions = pytest.importorskip("sklearn.exceptions")
    with pytest.raises(exceptions.NotFittedError, match="not fitted yet"):
        fresh.predict(["a.png"])
    with pytest.raises(NotFittedError):
        fresh.score(["a.png"], ["a"])


def test_a_finished_run_is_read_back_for_the_same_alone(
    model: Model, train: Any, tmp_path: Path
) -> None:
    classifier(model, "zip").fit(train, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="started with other settings"):
        classifier(model, "zip", step_size=0.5).fit(train, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="started with other method"):
        classifier(model, "gda").fit(train, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="started with other reject"):
        classifier(model, "zip", reject=0.05).fit(train, run_dir=tmp_path)
    head = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**head, "bundle_digest": "0" * 64}))
    with pytest.raises(ConfigError, match="started with other model"):
        classifier(model, "zip").fit(train, run_dir=tmp_path)


def test_a_refused_run_is_not_gone_on_with(train: Any, tmp_path: Path) -> None:
    int8 = quantize_bundle(load_bundle(MINI), tmp_path / "int8", "int8").path
    with ztune.load(int8, provider="cpu", threads=1) as model:
        weak = classifier(model, "zip", perturbation=1e-5)
        for _ in range(2):
            with pytest.raises(ZtuneError, match="below the limit"):
                weak.fit(train, run_dir=tmp_path / "run")
        weak.set_params(force=True)
        with pytest.warns(ZtuneWarning, match="below the limit"):
            weak.fit(train, run_dir=tmp_path / "run")
        assert weak.predict([*DIGITS.glob("one/*")][:2]).shape == (2,)


@pytest.mark.parametrize("kind", ["paths", "arrays", "features"])
def test_what_is_no_folder_goes_on_too(kind: str, model: Model, train: Any, tmp_path: Path) -> None:
    paths = [path for path, _ in train.split.items("train")]
    y = [train.classes[label] for label in train.split.labels("train")]
    X: Any = paths
    if kind == "arrays":
        X = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    if kind == "features":
        X = model.encode_images(paths)
        X, y = np.concatenate([X, X[:1]]), [*y, y[0]]  # one of them twice

    class StopAt:
        """Listens, and stops after some steps."""

        def remark(self, text: str) -> None:
            pass

        def activity(self, what: str, total: int) -> Any:
            self.what = what
            return self

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, done: int, text: str = "", unit: str = "") -> None:
            if self.what == "tuning" and done >= 30:
                raise KeyboardInterrupt

    whole = classifier(model, "zip").fit(X, y, run_dir=tmp_path / "whole")
    stopping = replace(model, progress=StopAt())
    with pytest.raises(KeyboardInterrupt):
        classifier(stopping, "zip").fit(X, y, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    again = classifier(model, "zip").fit(X, y, run_dir=tmp_path / "run")
    assert saved(again, tmp_path / "a") == saved(whole, tmp_path / "b")


def test_a_failed_fit_leaves_the_old_one(model: Model, train: Any) -> None:
    paths = [path for path, _ in train.split.items("train")]
    labels = train.split.labels("train")
    fitted = classifier(model, "gda").fit(paths, labels, class_names=train.classes)
    before = fitted.score(paths, labels)
    with pytest.raises(ZtuneError):
        fitted.fit(["gone.png"] * 2, [0, 1], class_names=["b", "a"])
    assert fitted.score(paths, labels) == before
    fitted.set_params(model=None, method="zip")  # from the next fit on
    assert fitted.score(paths, labels) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries": "60"}, "`queries` is '60', expected an integer"),
        ({"seed": -1}, "`seed` is -1, expected an integer"),
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"step_size": object()}, "`step_size` is object"),
        ({"augment": 2}, "`augment` makes views of images"),
    ],
)
def test_values_that_are_none(
    given: dict[str, Any], message: str, model: Model, train: Any
) -> None:
    features = model.encode_images([path for path, _ in train.split.items("train")])
    y = [train.classes[label] for label in train.split.labels("train")]
    with pytest.raises(ConfigError, match=re.escape(message)):
        classifier(model, "zip", **given).fit(features, y)
    plain = classifier(model, "zip", seed=np.int64(1), queries=np.int64(20)).fit(features, y)
    assert plain.cost_["queries"] == 20


def test_labels_of_all_kinds(model: Model, train: Any) -> None:
    paths = [path for path, _ in train.split.items("train")]
    features, labels = model.encode_images(paths), train.split.labels("train")
    expected = classifier(model, "gda").fit(features, labels, class_names=train.classes)
    names = np.array(train.classes)
    given: tuple[tuple[Any, Any], ...] = (
        (list(labels), names),
        ([int(label) for label in labels], list(train.classes)),
        (names[labels], None),
        (names[labels].astype(object), None),
        (tuple(names[labels].tolist()), names),
    )
    for y, class_names in given:
        fitted = classifier(model, "gda").fit(features, y, class_names=class_names)
        np.testing.assert_array_equal(
            fitted.predict_proba(features), expected.predict_proba(features)
        )
    wrong: tuple[tuple[Any, str], ...] = (
        (["a", "a"], "has a duplicate"),
        ([1, 2], "are not strings"),
        ("ab", "str is not a list"),
    )
    for class_names, message in wrong:
        with pytest.raises(DataError, match=message):
            classifier(model, "gda").fit(features, labels % 2, class_names=class_names)
    with pytest.raises(DataError, match="equal features in two classes"):
        classifier(model, "gda").fit(features[[0, 0, 1, 1]], ["a", "b", "a", "b"])
    with pytest.raises(DataError, match="not finite, or a row of zeros"):
        expected.predict(np.zeros((2, 128), np.float32))
    with pytest.raises(DataError, match="generator is not a list"):
        expected.predict(cast("Any", (path for path in paths)))
    with pytest.raises(DataError, match="is a training set, expected the test images"):
        expected.predict(train)


def test_a_model_is_shared_and_not_pickled(model: Model) -> None:
    assert copy.deepcopy(model) is model
    with pytest.raises(TypeError, match="open sessions"):
        pickle.dumps(model)
    assert model.encode_texts(["a", "a"]).shape == (2, 128)
    wrong: tuple[Any, ...] = ("a", [])
    for texts in wrong:
        with pytest.raises(DataError, match="`texts`"):
            model.encode_texts(texts)
    with pytest.raises(DataError, match="`images` is one path"):
        model.encode_images("a.png")


def test_scikit_learn_scores_two_classes_and_encoded_labels(model: Model) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    train, _ = ztune.Dataset.from_folder(FEW_DIGITS).split(shots=8, seed=1)
    items, labels = train.split.items("train"), train.split.labels("train")
    paths = [path for (path, _), label in zip(items, labels, strict=True) if label < 2]
    two, names = labels[labels < 2], train.classes[:2]
    features = model.encode_images(paths)
    gda = classifier(model, "gda", class_names=names)
    scores = selection.cross_val_score(
        gda, features, np.array(names)[two], cv=2, scoring="roc_auc", error_score="raise"
    )
    assert scores.min() > 0.5
    found = selection.cross_val_predict(gda, features, two, cv=2, method="predict_proba")
    assert found.shape == (len(two), 2)
    margin = gda.fit(features, two).decision_function(features)
    assert margin.shape == (len(two),)
    np.testing.assert_array_equal(gda.predict(features), np.array(names)[(margin > 0).astype(int)])

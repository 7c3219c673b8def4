"""All images of a class by default: which are held back, and which accuracy is told."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ztune as face
from tests.conftest import DIGITS, MINI, Command, Result, copy_digits
from ztune.data.split import Split
from ztune.errors import ConfigError, DataError
from ztune.io.files import read_json

pytestmark = pytest.mark.usefixtures("quick_figures")

CLASSES = ("five", "four", "nine")
TEMPLATE = ("--template", "a photo of the digit {}.")


def digits(folder: Path, counts: Mapping[str, int]) -> Path:
    for name, n in counts.items():
        copy_digits(folder, n, [name])
    return folder


def sizes(run: Path) -> list[int]:
    split = Split.from_json(read_json(run / "split.json", "split"), "split")
    return [len(split.entries_of(role)) for role in ("train", "val", "test")]


@pytest.fixture
def tuned(ztune: Command, tmp_path: Path) -> Any:
    """Return a function that tunes on so many digits of each class."""

    def tune(*counts: int, words: tuple[object, ...] = ()) -> tuple[Result, Path]:
        data = digits(tmp_path / "photos", dict(zip(CLASSES, counts, strict=True)))
        out = tmp_path / "run"
        return ztune("tune", MINI, "--data", data, *TEMPLATE, *words, "--out", out), out

    return tune


def test_20_images_per_class(tuned: Any, ztune: Command) -> None:
    done, run = tuned(20, 20, 16)
    assert done.code == 0, done.err
    assert sizes(run) == [56, 0, 0]
    assert "before 5000 queries" not in done.out + done.err
    line = next(one for one in done.out.splitlines() if one.startswith("cross-validated"))
    assert line.startswith("cross-validated on 56 training images: accuracy ")
    report = json.loads((run / "run.json").read_text())
    told, before = report["cross_validation"], report["hand_written"]
    low, high = told["interval"]
    assert f"{told['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}); zero-shot " in line
    assert (told["n"], before["n"]) == (56, 56)

    repeated = ztune("eval", run)
    assert (repeated.code, repeated.out.strip()) == (0, f"no test images; {line}")
    found = ztune("eval", run, "--json").json
    assert found == {
        "accuracy": told["accuracy"],
        "interval": told["interval"],
        "n": 56,
        "split": "cross-validation",
        "zero_shot_accuracy": before["accuracy"],
        "zero_shot_interval": before["interval"],
        "method": "auto",
        "run": str(run),
    }
    assert ztune("eval", run, "--split", "all", "--json").json["n"] == 56

    # The hand-written prompt has not seen the training images, so that is its accuracy on them.
    (scored,) = (
        ztune(
            "eval", MINI, "--data", run.parent / "photos", "--split", "all", *TEMPLATE, "--json"
        ).json[name]
        for name in ("accuracy",)
    )
    assert before["accuracy"] == pytest.approx(scored)


def test_no_gain_is_told_without_validation_images(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztune.training.score", lambda *given: _Fixed(given[0]))
    done, _ = tuned(16, 16, 16, words=("--queries", 20))
    assert "does not beat the hand-written prompt (50.0%) cross-validated" in done.err


class _Fixed:
    """A score of one half."""

    accuracy, interval = 0.5, (0.4, 0.6)

    def __init__(self, logits: np.ndarray):
        self.n = len(logits)


@pytest.mark.parametrize(("counts", "word"), [((15, 20, 20), "15"), ((1, 30, 3), "1")])
def test_too_few_images_for_any_accuracy(
    counts: tuple[int, ...], word: str, tuned: Any, ztune: Command
) -> None:
    done, run = tuned(*counts)
    assert done.code == 0, done.err
    assert sizes(run) == [sum(counts), 0, 0]
    told = (
        f'no test accuracy: the run has no test images, and class "five" has {word} for training, '
        "too few to cross-validate (add images: half of a class of 40 is for testing, 16 of every "
        "class are enough for --method auto to cross-validate; or tune with --test-data)"
    )
    assert told in done.out
    assert "ztune eval" not in done.out
    assert "accuracy " not in done.out.replace(told, "")
    refused = ztune("eval", run)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.endswith(f'error: run "{run}": {told}\n')


def test_classes_without_test_images_are_told(tuned: Any, ztune: Command) -> None:
    done, run = tuned(60, 5, 50)
    assert done.code == 0, done.err
    assert 'four"' in next(line for line in done.err.splitlines() if "no test images" in line)
    n_train, n_val, n_test = sizes(run)
    assert (n_train + n_test, n_val) == (115, 0)
    assert "cross-validated" not in done.out
    scored = ztune("eval", run)
    assert 'warning: classes without images here: "four"' in scored.err
    found = ztune("eval", run, "--json").json
    assert found["classes_without_images"] == ["four"]
    assert (found["n"], sorted(found["per_class"])) == (n_test, ["five", "nine"])


def test_methods_without_cross_validation_hold_images_back(tuned: Any, ztune: Command) -> None:
    done, run = tuned(20, 19, 10, words=("--method", "zip", "--queries", 20))
    assert done.code == 0, done.err
    assert sizes(run) == [49 - 7, 7, 0]
    assert "validation: 0 to 4 images per class instead of 4" in done.err
    assert "accuracy on 7 validation images" in done.out
    assert 'class "nine" has 10 for training' in ztune("eval", run).err


@pytest.mark.parametrize("words", [("--keep", "best"), ("--patience", 1)])
def test_steering_validation_has_images(words: tuple[object, ...], tuned: Any) -> None:
    done, run = tuned(20, 20, 20, words=("--method", "spsa", "--queries", 20, *words))
    assert done.code == 0, done.err
    assert sizes(run)[1] == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shots", 0), "--shots is 0, expected all, or a number of at least 1"),
        (("--shots", "all", "--val", -1), "--val is -1"),
        (("--shots", "all", "--keep", "best", "--method", "spsa"), "need validation images (--val"),
    ],
)
def test_wrong_numbers(words: tuple[object, ...], message: str, tuned: Any) -> None:
    done, _ = tuned(9, 9, 9, words=words)
    assert (done.code, done.out) == (1, "")
    assert message in done.err


def test_comparisons_need_a_number(ztune: Command, tmp_path: Path) -> None:
    words = ("--data", DIGITS, "--shots", "all", "--out", tmp_path / "out")
    done = ztune("compare", MINI, *words)
    assert done.code == 2
    assert "argument --shots" in done.err


def test_equal_images_of_a_class_are_one(ztune: Command, tmp_path: Path) -> None:
    data = digits(tmp_path / "photos", {"five": 20, "four": 1})
    (image,) = (data / "four").iterdir()
    for i in range(50):
        shutil.copy(image, data / "four" / f"copy-{i}.png")
    done = ztune("tune", MINI, "--data", data, "--method", "gda", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "exact duplicates of another image, omitted: 50" in done.err
    assert sizes(tmp_path / "run") == [21, 0, 0]


def test_the_face(tmp_path: Path) -> None:
    data = face.Dataset.from_folder(digits(tmp_path, {"five": 48, "four": 3}))
    with pytest.warns(UserWarning, match='1 of 2 classes have no test images.*: "four"'):
        train, test = data.split()
    assert len(train) + len(test) == 51
    assert not train.split.entries_of("val")
    wrong: Any = "most"
    with pytest.raises(ConfigError, match='`shots` is "most", expected all'):
        data.split(wrong)


def test_a_split_without_test_images_is_not_scored(tmp_path: Path) -> None:
    data = face.Dataset.from_folder(digits(tmp_path, {"five": 4, "four": 3}))
    with pytest.warns(UserWarning, match="no test set"):
        train, test = data.split()
    clf = face.FewShotClassifier(face.load(MINI), "gda").fit(train)
    with pytest.raises(DataError, match="`X` has no test images, expected at least one"):
        clf.score(test)


def test_an_estimator_has_its_cross_validated_accuracy() -> None:
    model = face.load(MINI)
    paths = [path for name in ("one", "two") for path in sorted((DIGITS / name).iterdir())[:16]]
    labels = [path.parent.name for path in paths]
    clf = face.FewShotClassifier(model, method="gda").fit(paths, labels)
    assert clf.cross_validation_ is not None
    accuracy = clf.cross_validation_["accuracy"]
    assert clf.cross_validation_["n"] == 32
    assert isinstance(accuracy, float)
    assert accuracy > 0.6
    clf.fit(paths[1:], labels[1:])
    assert clf.cross_validation_ is None

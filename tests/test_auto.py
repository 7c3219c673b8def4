"""The default method from end to end: few images, other class names, what it says of itself."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ztune
from runtimes.ort import OrtPromptEncoder
from tests.conftest import DIGITS, MINI, Command, copy_digits
from ztune.artifact import EnsembleArtifact, MixtureArtifact, read_artifact
from ztune.methods.registry import METHODS
from ztune.run_config import RunConfig

CLASSES = ("five", "four", "nine", "one")
TEMPLATE = "a photo of the digit {}."
Labelled = tuple[list[Path], list[str]]


@pytest.fixture(scope="module")
def model() -> ztune.Model:
    return ztune.load(MINI)


def digits(counts: Mapping[str, int], first: int = 0) -> Labelled:
    paths, labels = [], []
    for name, count in counts.items():
        own = sorted((DIGITS / name).glob("*.png"))[first : first + count]
        paths += own
        labels += [name] * count
    return paths, labels


def fitted(model: ztune.Model, counts: Mapping[str, int], run: Path) -> ztune.FewShotClassifier:
    clf = ztune.FewShotClassifier(model, queries=40, templates=TEMPLATE)
    return clf.fit(*digits(counts), run_dir=run)


def document(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "run.json").read_text())
    return found


def test_it_is_the_default(model: ztune.Model) -> None:
    assert RunConfig.method == ztune.FewShotClassifier(model).method == "auto" in METHODS


@pytest.mark.parametrize(
    "counts", [(1, 1, 1, 1), (1, 1, 1, 9), (2, 2, 2, 2), (1, 5, 5, 5), (15, 16, 16, 30), (16,) * 4]
)
def test_few_images(counts: tuple[int, ...], model: ztune.Model, tmp_path: Path) -> None:
    clf = fitted(model, dict(zip(CLASSES, counts, strict=True)), tmp_path / "run")
    assert clf.score(*digits(dict.fromkeys(CLASSES, 20), 60)) > 0.3
    # An accuracy is only said where each class has enough images to hold out.
    said = document(tmp_path / "run").get("cross_validation")
    if min(counts) < 16:
        assert said is None
    else:
        assert said is not None
        assert said["n"] == sum(counts)


def test_its_cross_validation_sees_no_held_out_label(model: ztune.Model, tmp_path: Path) -> None:
    paths, labels = digits(dict.fromkeys(CLASSES, 16))
    mixed = [str(name) for name in np.random.default_rng(0).permutation(labels)]
    # With hardly any ridge the prompts fit any labels: those of a fold must not be among them.
    clf = ztune.FewShotClassifier(model, queries=100, templates=TEMPLATE, ridge=1e-4)
    clf.fit(paths, mixed, run_dir=tmp_path / "run")
    assert document(tmp_path / "run")["cross_validation"]["accuracy"] < 0.34
    assert np.mean(clf.predict_proba(paths).max(axis=1)) < 0.4


def test_what_it_says_of_its_accuracy_is_so(
    ztune: Command, tmp_path: Path, few_digits: Path
) -> None:
    done = ztune(
        "tune", MINI, "--data", few_digits, "--template", TEMPLATE, "--out", tmp_path / "run"
    )
    assert done.code == 0, done.err
    assert "stopped before" not in done.out
    n = json.loads((tmp_path / "run" / "run.json").read_text())["image_forwards"]
    assert 190 < n < 250  # half of all
    assert f"cross-validated on {n} training images: accuracy " in done.out
    told = document(tmp_path / "run")["cross_validation"]["accuracy"]
    measured = ztune("eval", tmp_path / "run", "--json").json["accuracy"]
    assert told == pytest.approx(measured, abs=0.1)


def test_class_names(ztune: Command, model: ztune.Model, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fitted(model, dict.fromkeys(CLASSES, 4), run)
    whole = read_artifact(run)
    assert isinstance(whole, EnsembleArtifact)
    assert model.refresh(whole) is whole
    fewer = model.refresh(whole, ("one", "five"))
    assert isinstance(fewer, EnsembleArtifact)
    features = model.encode_images(digits(dict.fromkeys(CLASSES, 2), 60)[0])
    logits = whole.classifier().logits(features)
    np.testing.assert_array_equal(fewer.classifier().logits(features), logits[:, [3, 0]])

    names = ("one", "five", "eleven")
    with pytest.warns(UserWarning, match="the heads know only the classes"):
        other = model.refresh(whole, names)
    assert isinstance(other, MixtureArtifact)
    mixed, templates = model.mix(whole.mixture, names), model.encode_templates([TEMPLATE], names)
    length = max(1, np.linalg.norm(mixed, axis=1).mean())
    blended = 0.2 * mixed / length + 0.8 * templates
    np.testing.assert_allclose(other.text_features, blended, atol=1e-6)
    assert np.abs(mixed - templates).max() > 0.01


@pytest.fixture
def black(tmp_path: Path) -> Path:
    """Return images of three classes that differ in size and in nothing else."""
    for c, name in enumerate(CLASSES[:3]):
        (tmp_path / "black" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("L", (24 + 4 * c + i, 24 + 4 * c + i))
            image.save(tmp_path / "black" / name / f"{i}.png")
    return tmp_path / "black"


def test_images_without_any_difference(black: Path, ztune: Command, tmp_path: Path) -> None:
    run, packed = tmp_path / "run", tmp_path / "classifier.onnx"
    words = ("--data", black, "--shots", 4, "--val", 0, "--queries", 20)
    done = ztune("tune", MINI, *words, "--out", run)
    assert done.code == 0, done.err
    done = ztune("pack", MINI, "--prompt", run, "--out", packed)
    assert done.code == 0, done.err
    found = ztune("predict", packed, black, "--json")
    assert found.code == 0, found.err


def test_too_many_images_for_kernels_are_said(
    model: ztune.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztune.ensemble.MOST_KEYS", 15)
    with pytest.warns(
        UserWarning, match="16 training images of 4 classes are too many for kernels"
    ):
        fitted(model, dict.fromkeys(CLASSES, 4), tmp_path / "run")
    found = read_artifact(tmp_path / "run")
    assert isinstance(found, EnsembleArtifact)
    assert found.head.kernel is None


def tuned_again(ztune: Command, data: Path, out: Path, *more: object) -> tuple[Path, list[int]]:
    """Tune on a folder; return the result, and forwards and those found: of texts and images."""
    words = ("--template", TEMPLATE, "--queries", 20, "--shots", 8, "--val", 0, *more)
    done = ztune("tune", MINI, "--data", data, *words, "--out", out, "--quiet", "--json")
    assert done.code == 0, done.err
    assert done.json["queries"] == 20
    names = ("text_forwards", "text_forwards_cached", "image_forwards", "image_forwards_cached")
    return out / "prompt.safetensors", [done.json.get(name, 0) for name in names]


def test_tuning_again_encodes_only_what_is_new(
    ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cold(n: int, data: Path, *more: object) -> bytes:
        """Return the result without anything in the cache."""
        with monkeypatch.context() as patched:
            patched.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{n}"))
            path, costs = tuned_again(ztune, data, tmp_path / f"cold-{n}", *more)
        assert costs[1] == costs[3] == 0
        return path.read_bytes()

    data = copy_digits(tmp_path / "data", 20, CLASSES)
    first, costs = tuned_again(ztune, data, tmp_path / "first")
    assert costs == [20 * 4, 0, 32, 0]
    again, costs = tuned_again(ztune, data, tmp_path / "again")
    assert costs == [0, 20 * 4, 0, 32]
    assert again.read_bytes() == first.read_bytes()
    # A class more; one less; another number of images.
    copy_digits(data, 20, ["two"])
    more, costs = tuned_again(ztune, data, tmp_path / "more")
    assert costs == [20, 20 * 4, 8, 32]
    assert more.read_bytes() == cold(1, data)
    shutil.rmtree(data / "one")
    less, costs = tuned_again(ztune, data, tmp_path / "less", "--shots", 9)
    assert (costs[:2], costs[2] + costs[3]) == ([0, 20 * 4], 36)
    assert less.read_bytes() == cold(2, data, "--shots", 9)
    # Another seed has other prompts; a named cache is another one.
    assert tuned_again(ztune, data, tmp_path / "seed", "--seed", 2)[1][:2] == [20 * 4, 0]
    named = ("--cache", tmp_path / "named")
    assert tuned_again(ztune, data, tmp_path / "named-1", *named)[1][:2] == [20 * 4, 0]
    assert tuned_again(ztune, data, tmp_path / "named-2", *named)[1] == [0, 20 * 4, 0, 32]


def test_templates_are_kept_too(
    ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copy_digits(tmp_path / "data", 20, CLASSES)
    words = ("--template", TEMPLATE, "--method", "gda", "--quiet", "--out")
    assert ztune("tune", MINI, "--data", data, *words, tmp_path / "a").code == 0

    def refuse(*_: object) -> None:
        raise AssertionError("a text was encoded")

    monkeypatch.setattr(OrtPromptEncoder, "encode", refuse)
    assert ztune("tune", MINI, "--data", data, *words, tmp_path / "b").code == 0
    names = [tmp_path / run / "prompt.safetensors" for run in ("a", "b")]
    assert names[0].read_bytes() == names[1].read_bytes()

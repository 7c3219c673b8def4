"""Probabilities that follow the classes' shares of the training images."""

import json
from pathlib import Path

import numpy as np
import pytest

import ztune as face
from tests.conftest import DIGITS, MINI, Command, copy_digits
from ztune.artifact import EnsembleArtifact, HeadArtifact, read_artifact
from ztune.calibration import log_prior_ratios
from ztune.errors import ConfigError
from ztune.logits import log_probabilities
from ztune.run_config import RunConfig

pytestmark = pytest.mark.usefixtures("quick_figures")

COUNTS = {"five": 30, "four": 18, "nine": 16}
TEMPLATE = "a photo of the digit {}."


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for name, n in COUNTS.items():
        copy_digits(folder, n, [name])
    return folder


@pytest.fixture(scope="module")
def model() -> face.Model:
    return face.load(MINI)


def test_log_prior_ratios() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    found = log_prior_ratios(labels, 3)
    np.testing.assert_allclose(np.exp(found) / 3, [3 / 6, 1 / 6, 2 / 6])
    np.testing.assert_allclose(log_prior_ratios(np.array([0, 1, 2]), 3), 0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "gda", "tip-adapter"])
def test_probabilities_follow_the_shares(
    method: str, data: Path, model: face.Model, ztune: Command, tmp_path: Path
) -> None:
    words = ("--data", data, "--template", TEMPLATE, "--method", method, "--queries", 100)
    for priors in ("uniform", "data"):
        done = ztune("tune", MINI, *words, "--priors", priors, "--out", tmp_path / priors)
        assert done.code == 0, done.err
    uniform, other = (read_artifact(tmp_path / name) for name in ("uniform", "data"))
    assert isinstance(other, EnsembleArtifact | HeadArtifact)
    T = uniform.temperature
    assert T is not None
    assert other.temperature == T
    recorded = other.chosen if isinstance(other, EnsembleArtifact) else other.provenance.config
    assert recorded["priors"] == "data"

    paths = sorted((DIGITS / "nine").iterdir())[60:70]
    features = model.encode_images(paths)
    before, after = (
        log_probabilities(one.classifier().logits(features), T) for one in (uniform, other)
    )
    shares = np.array(list(COUNTS.values())) / sum(COUNTS.values())
    expected = np.exp(before) * shares
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(after), expected, atol=1e-5)

    reports = [
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("uniform", "data")
    ]
    assert [one["run_config"]["priors"] for one in reports] == ["uniform", "data"]
    assert reports[0]["train_loss"] != reports[1]["train_loss"]
    packed = tmp_path / "classifier.onnx"
    assert ztune("pack", MINI, "--prompt", tmp_path / "data", "--out", packed).code == 0
    found = face.load_classifier(packed).predict_proba(paths)
    np.testing.assert_allclose(found, np.exp(after), atol=1e-3)


def test_the_face_has_them(data: Path, model: face.Model) -> None:
    train = face.Dataset.from_folder(data).whole()
    fits = [
        face.FewShotClassifier(model, "gda", priors=priors).fit(train)
        for priors in ("uniform", "data")
    ]
    images = sorted((DIGITS / "nine").iterdir())[60:64]
    uniform, other = (clf.predict_proba(images) for clf in fits)
    assert (other[:, 0] > uniform[:, 0]).all()
    assert fits[1].get_params()["priors"] == "data"


@pytest.mark.parametrize("method", ["zip", "ogn", "bar"])
def test_prompts_have_one_bias(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} tunes prompts, .* leave out `priors`"):
        RunConfig("", "", method, priors="data").check_method()
    with pytest.raises(ConfigError, match='`priors` is "even", expected uniform or data'):
        RunConfig("", "", method, priors="even")

"""The main path on the embedded bundle and the real digits: tune, eval, pack, predict."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runtimes.providers import Execution
from tests.conftest import DIGITS, MINI, Command, copy_digits
from ztune import run as run_module
from ztune.artifact import ContextArtifact, HeadArtifact, read_artifact
from ztune.data.split import Split
from ztune.io.files import read_json, sha256
from ztune.model import open_model

pytestmark = pytest.mark.usefixtures("quick_figures")
Words = tuple[object, ...]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return enough digits for 16 shots, 4 images to validate on and 300 to test on."""
    return copy_digits(tmp_path_factory.mktemp("data") / "digits", 60)


@pytest.fixture
def tune(digits: Path) -> Words:
    return ("tune", MINI, "--data", digits, "--method", "zip", "--shots", 16, "--quiet")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_run_holds_what_it_promises(
    ztune: Command, tmp_path: Path, cache: Path, tune: Words
) -> None:
    out = tmp_path / "run"
    result = ztune(*tune, "--queries", 200, "--cache", cache, "--out", out, "--json")
    assert result.code == 0, result.err
    document = json.loads((out / "run.json").read_text())
    for key, value in result.json.items():
        assert document[key] == value
    names = {
        "method", "config", "seed", "queries", "text_forwards", "image_forwards", "seconds",
        "peak_memory_mb", "provider", "precision", "stop_reason", "train_loss", "val_accuracy",
        "versions",
    }  # fmt: skip
    assert names <= set(document)
    assert document["queries"] == 200
    assert document["signal"]["verdict"] == "not needed"
    assert document["probe_queries"] == 0
    assert document["text_forwards"] == 200 * 10
    assert document["image_forwards"] + document["image_forwards_cached"] == 10 * (16 + 4)
    assert document["stop_reason"] == "budget"
    assert document["config"]["n_pairs"] == 5
    assert {p.name for p in out.iterdir()} >= {
        "prompt.safetensors", "split.json", "run.json", "history.jsonl", "curve.png",
    }  # fmt: skip
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [line["queries"] for line in history] == list(range(10, 201, 10))
    artifact = read_artifact(out / "prompt.safetensors")
    assert isinstance(artifact, ContextArtifact)
    assert artifact.context.shape == (8, 64)
    assert len(artifact.tuning_images) == 200

    again = ztune("tune", "--resume", out, "--json")
    assert again.code == 0
    assert "finished" in again.err
    assert again.json["queries"] == 200


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    ztune: Command, tmp_path: Path, cache: Path, tune: Words
) -> None:
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        done = ztune(*tune, "--queries", 40, "--seed", seed, "--cache", cache, "--out", out)
        assert done.code == 0, done.err
        contents.append((out / "prompt.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize("method", ["zip", "gda"])
def test_classifier_predicts_what_the_run_predicts(
    method: str,
    ztune: Command,
    tmp_path: Path,
    cache: Path,
    tune: Words,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    assert (
        ztune(*tune, "--method", method, "--queries", 300, "--cache", cache, "--out", out).code == 0
    )
    monkeypatch.undo()  # this one draws its figures
    scored = ztune("eval", out, "--quiet", "--json")
    assert scored.code == 0, scored.err
    measured = scored.json
    assert {"accuracy", "interval", "n", "split", "per_class", "zero_shot_accuracy"} <= set(
        measured
    )
    assert measured["interval"][0] <= measured["accuracy"] <= measured["interval"][1]
    assert measured["tuning_images"] == 0
    assert (out / "confusion.png").stat().st_size > 1000

    prompt, packed = out / "prompt.safetensors", out / "classifier.onnx"
    assert ztune("pack", MINI, "--prompt", prompt, "--out", packed).code == 0
    again = ztune("eval", packed, "--split-file", out / "split.json", "--quiet", "--json").json
    for key in ("accuracy", "n", "per_class", "split"):
        assert again[key] == measured[key]
    split = Split.from_json(read_json(out / "split.json", "split"), "split")
    images = [split.file(entry) for entry in split.entries_of("test")]
    model = open_model(MINI, Execution())
    classifier = model.refresh(read_artifact(prompt)).classifier()
    items = [(image, sha256(image)) for image in images]
    features = model.features(items, cache, what="images").values[0]
    expected = [split.classes[c] for c in classifier.logits(features).argmax(axis=1)]
    predicted = ztune("predict", packed, *images, "--json").json["predictions"]
    assert [p["image"] for p in predicted] == [str(image) for image in images]
    assert [p["class"] for p in predicted] == expected
    if method == "gda":
        assert isinstance(read_artifact(prompt), HeadArtifact)
        assert measured["accuracy"] > measured["zero_shot_accuracy"]

    resizing = out / "resizing.onnx"
    assert ztune("pack", MINI, "--prompt", prompt, "--out", resizing, "--resize").code == 0
    third = ztune("eval", resizing, "--split-file", out / "split.json", "--quiet", "--json").json
    assert third["accuracy"] == pytest.approx(measured["accuracy"], abs=0.005)


def test_classifier_runs_with_plain_onnxruntime(
    ztune: Command, tmp_path: Path, cache: Path, tune: Words
) -> None:
    import onnxruntime

    out = tmp_path / "run"
    assert ztune(*tune, "--queries", 10, "--cache", cache, "--out", out).code == 0
    packed = tmp_path / "classifier.onnx"
    assert ztune("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed).code == 0
    session = onnxruntime.InferenceSession(packed, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"])[0] == "eight"
    pixels = np.zeros((3, 24, 24, 3), dtype=np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"pixels": pixels})
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert session.get_inputs()[0].type == "tensor(uint8)"

    predicted = ztune("predict", packed, DIGITS / "three", "--limit", 2, "--json").json
    assert len(predicted["predictions"]) == 2
    assert len(predicted["predictions"][0]["top"]) == 3
    shown = ztune("predict", packed, DIGITS / "three", "--limit", 2)
    assert shown.code == 0
    assert "three" in shown.out


def test_a_context_serves_other_class_names(
    ztune: Command, tmp_path: Path, cache: Path, tune: Words, digits: Path
) -> None:
    out = tmp_path / "run"
    assert ztune(*tune, "--queries", 10, "--cache", cache, "--out", out).code == 0
    names = tmp_path / "names.txt"
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "star")
    names.write_text("\n".join(words))
    done = ztune(
        "eval", MINI, "--data", digits, "--split", "all", "--classes", names,
        "--prompt", out / "prompt.safetensors", "--json", "--cache", cache,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["n"] == 600 - done.json["broken_images"]
    assert done.json["tuning_images"] == 200
    assert "200 of these 600 images were used for tuning" in done.err
    assert done.json["candidates"] == 11
    assert f"candidates: 11 classes (of {names})" in done.err

    two, other = tmp_path / "two", tmp_path / "other"
    for name, called in (("one", "one"), ("three", "three"), ("four", "IV")):
        shutil.copytree(DIGITS / name, other / called)
        if called == name:
            shutil.copytree(DIGITS / name, two / called)
    prompt = ("--split", "all", "--prompt", out / "prompt.safetensors", "--json", "--cache", cache)
    for folder, n, whose in ((two, 10, "of the prompt"), (other, 3, "of the images")):
        done = ztune("eval", MINI, "--data", folder, *prompt)
        assert done.code == 0, done.err
        assert done.json["candidates"] == n
        assert f"candidates: {n} classes ({whose})" in done.err

    few = tmp_path / "few.txt"
    few.write_text("zero\none\n")
    refused = ztune("eval", MINI, "--data", digits, "--split", "all", "--classes", few)
    assert refused.code == 1
    assert 'class "eight" of the images is not among' in refused.err


def test_cached_views_are_drawn_for_training(ztune: Command, tmp_path: Path, tune: Words) -> None:
    out = tmp_path / "run"
    done = ztune(
        *tune, "--shots", 2, "--queries", 20, "--preset", "published", "--out", out, "--json"
    )
    assert done.code == 0, done.err
    assert done.json["image_forwards"] == 10 * 2 * 16 + 10 * 2
    assert done.json["run_config"]["augment"] == 16


def test_words_start_the_context_where_asked(
    ztune: Command, tmp_path: Path, cache: Path, tune: Words
) -> None:
    out = tmp_path / "run"
    done = ztune(
        *tune, "--queries", 10, "--init", "a photo of the digit", "--cache", cache, "--out", out
    )
    assert done.code == 0, done.err
    artifact = read_artifact(out / "prompt.safetensors")
    assert isinstance(artifact, ContextArtifact)
    assert len(artifact.context) == 5


def test_a_second_run_takes_features_from_the_cache(
    ztune: Command, tmp_path: Path, tune: Words
) -> None:
    shared = tmp_path / "cache"
    first = ztune(*tune, "--queries", 10, "--cache", shared, "--out", tmp_path / "a", "--json").json
    second = ztune(
        *tune, "--queries", 10, "--cache", shared, "--out", tmp_path / "b", "--json"
    ).json
    assert (first["image_forwards"], first["image_forwards_cached"]) == (200, 0)
    assert (second["image_forwards"], second["image_forwards_cached"]) == (0, 200)


def start(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ztune.cli.main", *(str(word) for word in words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    kind: signal.Signals, ztune: Command, tmp_path: Path, tune: Words
) -> None:
    out = tmp_path / "run"
    process = start(*tune, "--queries", 20000, "--out", out)
    deadline = time.monotonic() + 60
    while not (out / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(kind)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == (
        f"error: stopped (resume with: ztune tune --resume {out})"
    )


def test_resume_refuses_changed_images_and_another_bundle(ztune: Command, tmp_path: Path) -> None:
    data, bundle, out = tmp_path / "data", tmp_path / "bundle", tmp_path / "run"
    for name in ("one", "two", "three"):
        (data / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:6]:
            shutil.copy(image, data / name)
    shutil.copytree(MINI, bundle)
    done = ztune("tune", bundle, "--data", data, "--shots", 4, "--queries", 10, "--out", out)
    assert done.code == 0, done.err
    document = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**document, "status": "running"}))

    entries = json.loads((out / "split.json").read_text())["entries"]
    changed = data / next(e["path"] for e in entries if e["role"] == "train")
    original = changed.read_bytes()
    changed.write_bytes(next((DIGITS / "nine").iterdir()).read_bytes())
    refused = ztune("tune", "--resume", out)
    assert refused.code == 1
    assert "has changed since the split was made" in refused.err
    changed.write_bytes(original)
    assert ztune("tune", "--resume", out).code == 0

    (out / "run.json").write_text(json.dumps({**document, "status": "running"}))
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "created_by": "someone"}))
    refused = ztune("tune", "--resume", out)
    assert refused.code == 1
    assert "is not the one that the run was started with" in refused.err


def test_a_run_goes_on_and_is_evaluated_where_its_bundle_has_moved(
    ztune: Command, tmp_path: Path, cache: Path, digits: Path
) -> None:
    bundle, moved, out = tmp_path / "bundle", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(MINI, bundle)
    words = ("--data", digits, "--queries", 20, "--cache", cache, "--out", out)
    assert ztune("tune", bundle, *words).code == 0
    bundle.rename(moved)
    lost = ztune("eval", out)
    assert lost.code == 1
    assert "--bundle DIR" in lost.err
    assert ztune("eval", out, "--bundle", moved).code == 0
    document = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**document, "status": "running"}))
    before = (out / "prompt.safetensors").read_bytes()
    lost = ztune("tune", "--resume", out)
    assert lost.code == 1
    assert "ztune tune BUNDLE --resume" in lost.err
    assert ztune("tune", moved, "--resume", out).code == 0
    assert (out / "prompt.safetensors").read_bytes() == before
    refused = ztune("tune", "--resume", out, "--queries", 9000)
    assert refused.code == 1
    assert "--queries does not apply to --resume" in refused.err


@pytest.mark.parametrize("method", ["zip", "ogn"])
def test_a_run_is_finished_once_its_curve_is_there(
    method: str,
    ztune: Command,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    digits: Path,
) -> None:
    out = tmp_path / "run"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = ("tune", MINI, "--data", digits, "--method", method, "--queries", 40, "--cache", cache)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "draw_curve", full)
        stopped = ztune(*words, "--out", out, "--quiet")
    assert stopped.code == 1
    assert "--resume" in stopped.err
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    done = ztune("tune", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert done.json["queries"] == 40
    curve, prompt = out / "curve.png", out / "prompt.safetensors"
    whole = [curve.read_bytes(), prompt.read_bytes()]

    for missing in (curve, prompt):
        missing.unlink()
        again = ztune("tune", "--resume", out, "--json")
        assert again.code == 0, again.err
        assert again.json["queries"] == 40
        assert [curve.read_bytes(), prompt.read_bytes()] == whole


def test_a_fit_without_steps_whose_result_is_missing_is_made_again(
    ztune: Command, tmp_path: Path, cache: Path, digits: Path
) -> None:
    out = tmp_path / "run"
    words = ("tune", MINI, "--data", digits, "--method", "gda", "--cache", cache, "--out", out)
    assert ztune(*words).code == 0
    prompt = out / "prompt.safetensors"
    whole = prompt.read_bytes()
    prompt.unlink()
    done = ztune("tune", "--resume", out)
    assert done.code == 0, done.err
    assert prompt.read_bytes() == whole

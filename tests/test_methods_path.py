"""Every method of the table from images to a deployed classifier, on the embedded bundle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtimes import decoder
from runtimes.providers import Execution
from tests.conftest import DIGITS, MINI, Command
from ztune.artifact import (
    Artifact,
    ContextArtifact,
    EnsembleArtifact,
    HeadArtifact,
    MixtureArtifact,
    VisualArtifact,
    read_artifact,
)
from ztune.dataset import Dataset
from ztune.deployed import load_classifier
from ztune.errors import ConfigError
from ztune.estimator import FewShotClassifier
from ztune.io.files import sha256
from ztune.loop import Tuning
from ztune.methods.base import HeadMethod, TunedMethod
from ztune.methods.gda import fit_gda
from ztune.methods.registry import METHODS
from ztune.model import Model, load, open_model
from ztune.run import RunFolder, SaveSchedule
from ztune.run_document import run_report
from ztune.types import F32, Evaluation

pytestmark = pytest.mark.usefixtures("quick_figures")

CLASSES = ("one", "two", "three")
N_TRAIN, N_VAL, N_TEST = 6, 3, 17
# Settings that keep a step small, and what two steps of them cost.
SMALL: dict[str, tuple[tuple[str, ...], int]] = {
    "auto": (("n_prompts=2",), 4),
    "ogn": (("n_prompts=2",), 4),
    "ogn-context": (("n_directions=3",), 1 + 2 * (3 + 3)),
    "zip": ((), 20),
    "sharpzo": (("intrinsic_dim=20", "population=4"), 2 * (2 * 20 + 4)),
    "bptvlm": (("text_dim=40", "vision_dim=30"), 30),
    "cma": (("intrinsic_dim=40",), 40),
    "spsa": ((), 20),
    "spsa-gc": ((), 20),
    "rgf": ((), 12),
    "blackvip": ((), 20),
    "bar": ((), 12),
}
TUNED = [name for name, method in METHODS.items() if isinstance(method, TunedMethod)]
HEADS = [name for name, method in METHODS.items() if isinstance(method, HeadMethod)]
PIXELS = ("bptvlm", "blackvip", "bar")
LOGIT_METHODS = ("auto", "ogn", "ogn-context")
TEXTS = tuple(name for name in TUNED if name not in ("blackvip", "bar"))
# They live off differences of losses, which are measured first.
# One method of each kind of artifact, with its settings.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "context": ("zip", ()),
    "mixture": ("ogn", ()),
    "ensemble": ("auto", ()),
    "head": ("gda", ()),
    "kernel": ("proker", ()),
    "border": ("bar", ()),
    "decoder": ("blackvip", ()),
    "tokens": ("bptvlm", ("part=vision",)),
    "tokens and context": ("bptvlm", ("part=both",)),
}


def settings(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three classes of twelve digits, about half of which are kept for testing."""
    root = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        (root / name).mkdir()
        for image in sorted((DIGITS / name).iterdir())[:12]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


Tune = Callable[..., dict[str, Any]]


@pytest.fixture
def tune(ztune: Command, data: Path, shared: Path) -> Tune:
    """Run `ztune tune OUT` with a method's small settings; return run.json."""

    def command(out: Path, method: str, *more: object, own_cache: bool = False) -> dict[str, Any]:
        small, queries = SMALL.get(method, ((), 1))
        cache = () if own_cache else ("--cache", shared / "cache")
        done = ztune(
            "tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5,
            "--method", method, "--queries", queries, *settings(*small), *cache, *more,
            "--out", out, "--quiet", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        return document(out)

    return command


@pytest.fixture
def run(tune: Tune, shared: Path) -> Callable[..., Path]:
    """Return the folder of a finished run, tuned once for all tests."""

    def finished(method: str, *words: str) -> Path:
        out = shared / "-".join([method, *words])
        if not out.exists():
            tune(out, method, *settings(*words))
        return out

    return finished


def document(out: Path) -> dict[str, Any]:
    value = json.loads((out / "run.json").read_text())
    assert isinstance(value, dict)
    return value


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def tensors(artifact: Artifact) -> list[np.ndarray]:
    """Return what was tuned or fitted."""
    if isinstance(artifact, ContextArtifact):
        return [artifact.context]
    if isinstance(artifact, MixtureArtifact):
        return [artifact.tokens, artifact.weights]
    if isinstance(artifact, EnsembleArtifact):
        kernel = artifact.head.kernel
        assert kernel is not None
        return [artifact.head.weight, kernel.keys, kernel.values, artifact.mixture.tokens]
    if isinstance(artifact, HeadArtifact):
        kernel = artifact.kernel
        return [artifact.weight] if kernel is None else [kernel.keys, kernel.values]
    return [artifact.visual, *([] if artifact.context is None else [artifact.context])]


@pytest.fixture
def model() -> Model:
    return open_model(MINI, Execution())


def test_every_method_is_tried_here() -> None:
    assert set(SMALL) == set(TUNED)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_counts_exactly_what_it_did(method: str, run: Callable[..., Path]) -> None:
    run("zero-shot")  # the first run encodes the images
    out = run(method)
    found = document(out)
    assert found["method"] == method
    assert found["status"] == "finished"
    assert found["result_bytes"] == (out / "prompt.safetensors").stat().st_size
    assert found["classes"] == len(CLASSES)
    queries = SMALL[method][1] if method in SMALL else 0
    assert found["queries"] == queries
    assert found["stop_reason"] == ("budget" if method in SMALL else "closed form")
    assert found["probe_queries"] == 0
    n_texts = queries * len(CLASSES) if method in TEXTS else 0
    assert found["text_forwards"] + found.get("text_forwards_cached", 0) == n_texts
    n_cached = 0 if method == "zero-shot" else N_TRAIN + N_VAL
    assert found["image_forwards_cached"] == n_cached
    n_changed = queries * N_TRAIN if method in PIXELS else 0
    assert found["image_forwards"] + n_cached == N_TRAIN + N_VAL + n_changed
    words = dict(word.split("=") for word in SMALL.get(method, ((), 0))[0])
    assert {key: str(found["config"][key]) for key in words} == words
    artifact = read_artifact(out / "prompt.safetensors")
    assert artifact.provenance.method == method
    assert artifact.provenance.queries == queries
    assert dict(artifact.provenance.config) == found["config"]


def test_images_of_a_batch_are_charged_and_those_of_a_run_with_its_own_cache(
    tune: Tune, tmp_path: Path
) -> None:
    found = tune(tmp_path / "a", "blackvip", "--set", "batch_size=4", own_cache=True)
    assert found["image_forwards_cached"] == 0
    assert found["image_forwards"] == N_TRAIN + N_VAL + 20 * 4
    found = tune(tmp_path / "b", "bptvlm", "--set", "part=vision", "--augment", 2, own_cache=True)
    # The validation images' centre crops are in the cache that runs share.
    assert (found["image_forwards"], found["image_forwards_cached"]) == (32 * N_TRAIN, N_VAL)
    assert found["text_forwards"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    method: str, run: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    first, again, other = run(method), tmp_path / "again", tmp_path / "other"
    tune(again, method)
    name = "prompt.safetensors"
    assert (again / name).read_bytes() == (first / name).read_bytes()
    tune(other, method, "--seed", 2)
    # The file also has the seed, so compare the tuned values.
    found, others = (tensors(read_artifact(out / name))[0] for out in (first, other))
    # Zero-shot looks at no image.
    assert np.array_equal(found, others) == (method == "zero-shot")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in dict(KINDS.values())])
def test_every_other_run_is_scored_on_its_test_images(
    method: str, run: Callable[..., Path], ztune: Command
) -> None:
    done = ztune("eval", run(method), "--quiet", "--json")
    assert done.code == 0, done.err
    assert done.json["n"] == N_TEST
    assert done.json["method"] == method
    assert done.json["tuning_images"] == 0
    assert 0 <= done.json["accuracy"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_classifier_sees_what_the_run_sees(
    kind: str, run: Callable[..., Path], ztune: Command, tmp_path: Path
) -> None:
    method, words = KINDS[kind]
    out, packed = run(method, *words), tmp_path / "classifier.onnx"
    artifact = read_artifact(out / "prompt.safetensors")
    if isinstance(artifact, VisualArtifact):
        assert artifact.program == kind.split()[0]
        assert (artifact.context is not None) == kind.endswith("context")
        assert (artifact.statistics is not None) == (kind == "decoder")
    if isinstance(artifact, HeadArtifact):
        assert (artifact.kernel is not None) == (kind == "kernel")
    measured = ztune("eval", out, "--quiet", "--json").json
    done = ztune("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed)
    assert done.code == 0, done.err
    again = ztune("eval", packed, "--split-file", out / "split.json", "--quiet", "--json")
    assert again.code == 0, again.err
    for key in ("accuracy", "n", "per_class"):
        assert again.json[key] == measured[key]
    predicted = ztune("predict", packed, DIGITS / "two", "--limit", 3, "--json")
    assert predicted.code == 0, predicted.err
    assert [len(one["top"]) for one in predicted.json["predictions"]] == [3, 3, 3]
    whole = ztune(
        "eval", MINI, "--prompt", out / "prompt.safetensors", "--split-file", out / "split.json",
        "--quiet", "--json",
    )  # fmt: skip
    assert whole.code == 0, whole.err
    assert whole.json["per_class"] == measured["per_class"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_serve_other_class_names_and_heads_refuse(
    kind: str, run: Callable[..., Path], ztune: Command, data: Path, tmp_path: Path
) -> None:
    method, words = KINDS[kind]
    prompt = run(method, *words) / "prompt.safetensors"
    names, packed = tmp_path / "names.txt", tmp_path / "classifier.onnx"
    names.write_text("\n".join((*CLASSES, "four")))
    scored = ztune(
        "eval", MINI, "--data", data, "--split", "all", "--prompt", prompt, "--classes", names,
        "--quiet", "--json",
    )  # fmt: skip
    done = ztune(
        "pack", MINI, "--prompt", prompt, "--classes", names, "--out", packed, "--quiet", "--json"
    )
    method_row = METHODS[method]
    if not method_row.serves_new_classes():
        for refused in (scored, done):
            assert refused.code == 1
            (line,) = (o for o in refused.err.splitlines() if not o.startswith("warning: "))
            assert "a head serves only the classes it was fitted on" in line
        return
    assert scored.code == 0, scored.err
    assert scored.json["candidates"] == 4
    assert scored.json["n"] == 36
    assert scored.json["tuning_images"] == N_TRAIN + N_VAL
    assert done.code == 0, done.err
    assert done.json["classes"] == [*CLASSES, "four"]
    for warned in (scored, done):
        assert ("worse than the hand-written prompt" in warned.err) == (kind == "mixture")
    again = ztune("eval", packed, "--data", data, "--split", "all", "--quiet", "--json")
    assert again.json["accuracy"] == scored.json["accuracy"]


# Kills itself as the n-th state is to be saved: the history is then ahead of the state before.
KILLED = """
import os, signal, sys
from ztune.cli.main import main
from ztune.run import RunFolder, SaveSchedule
SaveSchedule.due = lambda pace: True
save, left = RunFolder.save, [int(sys.argv[1])]
def dying(folder, now):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, now)
RunFolder.save = dying
main(sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize(
    ("method", "queries"),
    [("blackvip", 40), ("bptvlm", 60), ("sharpzo", 100), ("ogn", 16), ("ogn-context", 40)],
)
def test_a_killed_run_goes_on_to_the_same_bytes_and_the_same_costs(
    method: str, queries: int, ztune: Command, tune: Tune, data: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    batch = ("--set", "batch_size=4") + (("--set", "keep=mean") if method == "bptvlm" else ())
    views = () if method in LOGIT_METHODS else ("--augment", 2)
    drawn = ("--queries", queries, *batch, *views, "--snapshots", 4)
    expected = tune(whole, method, *drawn, own_cache=True)
    words = [
        "tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5,
        "--method", method, *settings(*SMALL[method][0]), *drawn, "--out", out, "--quiet",
    ]  # fmt: skip
    command = [sys.executable, "-c", KILLED, "3", *(str(word) for word in words)]
    process = subprocess.run(command, capture_output=True, env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(history(out)) == 3
    assert not (out / "prompt.safetensors").exists()
    done = ztune("tune", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert "resuming after" in done.err
    found = document(out)
    for key in ("queries", "probe_queries", "train_loss"):
        assert found[key] == expected[key], key
    # What the first run has encoded is in the cache.
    for key in ("text_forwards", "image_forwards"):
        assert expected.get(f"{key}_cached", 0) == 0
        assert found[key] + found.get(f"{key}_cached", 0) == expected[key], key
    untimed = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in history(run)]
        for run in (whole, out)
    ]
    assert untimed[0] == untimed[1]
    files = sorted(path.relative_to(whole) for path in (whole / "snapshots").iterdir())
    assert files == sorted(path.relative_to(out) for path in (out / "snapshots").iterdir())
    for name in (Path("prompt.safetensors"), *files):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_seconds_only_increase_up_to_the_result(
    ztune: Command, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history and the result count from the same start, without the baselines."""
    log = RunFolder.log

    def slow(*arguments: Any) -> Any:
        time.sleep(0.4)
        return fit_gda(*arguments)

    def stop(folder: RunFolder, now: Tuning, evaluation: Evaluation) -> None:
        if now.step == 3:
            raise KeyboardInterrupt
        log(folder, now, evaluation)

    monkeypatch.setattr("ztune.training.fit_gda", slow)
    monkeypatch.setattr(SaveSchedule, "due", lambda _: True)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    tune(whole, "zip", "--queries", 60)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", stop)
        with pytest.raises(AssertionError, match="stopped"):
            tune(out, "zip", "--queries", 60)
    assert ztune("tune", "--resume", out).code == 0
    for run in (whole, out):
        report = run_report(document(run), "run.json")
        seconds = [*(line["seconds"] for line in history(run)), report.own_seconds]
        assert len(seconds) == 7
        assert seconds == sorted(seconds)
        assert seconds[-1] - seconds[-2] < 0.3
        assert report.report_seconds > 0.4
        assert report.seconds == pytest.approx(report.own_seconds + report.report_seconds)
    head = tmp_path / "head"
    tune(head, "gda")
    assert run_report(document(head), "run.json").own_seconds >= 0


@pytest.mark.parametrize("method", ["zip", "bptvlm", "bar", "blackvip"])
def test_validation_passes_that_steer_are_charged_and_the_best_is_kept(
    method: str, tune: Tune, tmp_path: Path
) -> None:
    step = {"zip": 10, "bptvlm": 15, "bar": 6, "blackvip": 10}[method]
    out = tmp_path / "run"
    found = tune(
        out, method, "--queries", 4 * step + 3, "--keep", "best", "--validate-every", 2 * step,
        *(("--set", "step_size=0.5") if method == "blackvip" else ()),
    )  # fmt: skip
    lines = history(out)
    rounds = "".join("v" if "validation" in line else "p" for line in lines)
    assert rounds == "ppvppv"
    assert {line["validation"] for line in lines if "validation" in line} == {True}
    costs = np.diff([0, *(line["queries"] for line in lines)])
    assert costs.tolist() == [step, step, 1, step, step, 1]
    assert found["queries"] == 4 * step + 2
    assert found["stop_reason"] == "budget"
    if method == "zip":
        n_texts = (found["queries"] + found["probe_queries"]) * len(CLASSES)
        assert found["text_forwards"] == n_texts
    else:
        assert found["image_forwards"] == 4 * step * N_TRAIN + 2 * N_VAL
    validated = [line["accuracy"] for line in lines if "validation" in line]
    assert found["val_accuracy"] == pytest.approx(max(validated), abs=1e-6)


def test_validation_waits_for_the_end_of_a_gauss_newton_step(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = tune(out, "ogn-context", "--queries", 23, "--keep", "best", "--validate-every", 4)
    lines = history(out)
    assert "".join("v" if "validation" in line else "p" for line in lines) == "ppvppvppv"
    costs = np.diff([0, *(line["queries"] for line in lines)])
    assert costs.tolist() == [4, 3, 1, 3, 3, 1, 3, 3, 1]
    assert (found["queries"], found["stop_reason"]) == (22, "budget")
    validated = [line["accuracy"] for line in lines if "validation" in line]
    assert found["val_accuracy"] == pytest.approx(max(validated), abs=1e-6)


def test_the_best_is_not_the_last(tune: Tune, tmp_path: Path) -> None:
    # Steps so long that the point wanders: the last is seldom the best.
    words = ("--val", 4, "--queries", 110, "--set", "step_size=3", "--validate-every", 10)
    results = {}
    for keep in ("best", "last"):
        out = tmp_path / keep
        found = tune(out, "zip", *words, "--keep", keep, "--patience", 100)
        results[keep] = tensors(read_artifact(out / "prompt.safetensors"))[0]
        validated = [line["accuracy"] for line in history(out) if "validation" in line]
        assert len(validated) == 10
        wanted = max(validated) if keep == "best" else validated[-1]
        assert found["val_accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert not np.array_equal(results["best"], results["last"])


def test_early_stop_says_so_and_leaves_the_rest_of_the_budget(tune: Tune, tmp_path: Path) -> None:
    found = tune(
        tmp_path / "run", "zip", "--queries", 400, "--patience", 2, "--validate-every", 10,
        "--set", "step_size=1e-9",
    )  # fmt: skip
    assert found["stop_reason"] == "early stop: no gain in 2 validations"
    assert found["queries"] == 3 * 11
    artifact = read_artifact(tmp_path / "run" / "prompt.safetensors")
    assert artifact.provenance.stop_reason == found["stop_reason"]


def test_a_mixture_does_what_its_history_says(tune: Tune, tmp_path: Path, model: Model) -> None:
    out = tmp_path / "run"
    found = tune(out, "ogn", "--queries", 9, "--set", "most_prompts=8", own_cache=True)
    assert (found["stop_reason"], found["queries"]) == ("prompts", 8)
    # What was encoded once is remembered: the result costs no forward.
    assert found["text_forwards"] == 8 * len(CLASSES)
    assert found["signal"]["verdict"] == "not needed"
    lines = history(out)
    assert [line["queries"] for line in lines if "result_loss" in line] == [2, 4, 8]
    assert lines[-1]["result_loss"] == pytest.approx(found["train_loss"], abs=1e-4)
    assert found["train_loss"] < min(line["loss"] for line in lines)
    artifact = read_artifact(out / "prompt.safetensors")
    assert isinstance(artifact, MixtureArtifact)
    words = model.tokenizer.encode("a photo of a")
    assert artifact.tokens[0].tolist() == list(words)
    assert artifact.tokens.shape == (8, len(words))
    assert artifact.at_once == 2
    assert artifact.weights.sum() == pytest.approx(1, abs=1e-5)
    again = model.mix(artifact, artifact.classes)
    np.testing.assert_array_equal(artifact.text_features, again)


def test_a_mixture_is_encoded_again_for_another_bundle_or_other_classes_alone(
    run: Callable[..., Path], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = read_artifact(run("ogn") / "prompt.safetensors")
    assert isinstance(artifact, MixtureArtifact)
    elsewhere = replace(
        artifact, provenance=replace(artifact.provenance, bundle_digest="of an int8 bundle")
    )
    classes, turned_classes = artifact.classes, artifact.classes[::-1]
    encoded: list[tuple[str, ...]] = []
    mix = Model.mix

    def watched(model: Model, given: MixtureArtifact, classes: tuple[str, ...]) -> F32:
        encoded.append(classes)
        return mix(model, given, classes)

    monkeypatch.setattr(Model, "mix", watched)
    assert model.refresh(artifact) is artifact
    assert model.refresh(artifact, classes) is artifact
    assert encoded == []
    again = model.refresh(elsewhere)
    assert isinstance(again, MixtureArtifact)
    np.testing.assert_array_equal(again.text_features, artifact.text_features)
    turned = model.refresh(artifact, turned_classes)
    assert isinstance(turned, MixtureArtifact)
    assert turned.classes == turned_classes
    np.testing.assert_allclose(turned.text_features, artifact.text_features[::-1], atol=1e-5)
    assert encoded == [classes, turned_classes]


def test_a_mixture_that_takes_no_more_prompts_says_so(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    given = (
        "tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5,
        *settings("n_prompts=2", "most_prompts=8"), "--quiet",
    )  # fmt: skip
    ended = "the method's limit is reached (most_prompts)"
    done = ztune(*given, "--queries", 100, "--snapshots", 2, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert f"stopped before 100 queries: {ended}" in done.out
    # Marks are of what is spent: a fourth of it, not of the budget.
    files = [file.name for file in (tmp_path / "run" / "snapshots").iterdir()]
    assert files == ["000000002.safetensors"]
    done = ztune(*given, "--queries", 7, "--out", tmp_path / "short")
    assert done.code == 0, done.err
    assert document(tmp_path / "short")["queries"] == 6
    assert "stopped before" not in done.out
    early = settings("n_prompts=50", "least_gain=100")
    words = (*given[:-5], *early, "--quiet", "--queries", 400)
    done = ztune(*words, "--out", tmp_path / "early")
    assert done.code == 0, done.err
    assert "ended after 150 queries: the held-out loss stalled (least_gain)" in done.out
    assert document(tmp_path / "early")["stop_reason"] == "held-out loss"


def test_a_run_that_tries_no_more_candidates_says_so(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    given = (
        "tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5,
        "--method", "cma", *settings("population=4", "most_candidates=6"), "--quiet",
    )  # fmt: skip
    ended = "the method's limit is reached (most_candidates)"
    for name, queries, reason, spent in (("run", 9, "candidates", 6), ("short", 5, "budget", 5)):
        done = ztune(*given, "--queries", queries, "--out", tmp_path / name)
        assert done.code == 0, done.err
        found = document(tmp_path / name)
        assert (found["stop_reason"], found["queries"]) == (reason, spent)
        assert (f"stopped before 9 queries: {ended}" in done.out) == (reason == "candidates")


def test_the_less_an_endpoint_tells_the_other_the_result(
    tune: Tune, run: Callable[..., Path], tmp_path: Path
) -> None:
    whole = tensors(read_artifact(run("ogn") / "prompt.safetensors"))
    for answers, same in (("top-3", True), ("top-99", True), ("top-2", True), ("label", False)):
        tune(tmp_path / answers, "ogn", "--set", f"answers={answers}")
        tokens, weights = tensors(read_artifact(tmp_path / answers / "prompt.safetensors"))
        np.testing.assert_array_equal(tokens, whole[0])
        # Three classes: the probabilities of two tell the third's, and as much as logits do.
        assert np.allclose(weights, whole[1], atol=1e-3) == same, answers


def test_losses_alone_are_tuned_by_steps(ztune: Command, data: Path, tmp_path: Path) -> None:
    done = ztune(
        "tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5,
        "--method", "ogn", "--set", "answers=loss", "--queries", 10, "--out", tmp_path / "run",
        "--quiet", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = document(tmp_path / "run")
    assert found["method"] == "ogn"
    assert found["signal"]["verdict"] == "not needed"
    assert found["config"]["intrinsic_dim"] == 500
    assert isinstance(read_artifact(tmp_path / "run" / "prompt.safetensors"), ContextArtifact)


def test_snapshots_make_a_curve(tune: Tune, ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A kill and a snapshot of a visual prompt are tried above.
    tune(out, "zip", "--queries", 90, "--snapshots", 3)
    files = sorted((out / "snapshots").iterdir())
    # Denser at the beginning: after 1/9 and 4/9 of the budget, the result itself is the third.
    assert [file.name for file in files] == ["000000010.safetensors", "000000040.safetensors"]
    for file, queries in zip(files, (10, 40), strict=True):
        provenance = read_artifact(file).provenance
        assert (provenance.queries, provenance.stop_reason) == (queries, "snapshot")
    done = ztune("eval", out, "--snapshots", "--quiet", "--json")
    assert done.code == 0, done.err
    curve = done.json["curve"]
    assert [point["queries"] for point in curve] == [10, 40]
    assert all(0 <= point["accuracy"] <= 1 and point["seconds"] >= 0 for point in curve)
    assert "curve" not in ztune("eval", out, "--quiet", "--json").json
    # What a snapshot is worth is what the same file is worth anywhere.
    alone = ztune(
        "eval", MINI, "--prompt", files[0], "--split-file", out / "split.json", "--quiet", "--json"
    )
    assert alone.json["accuracy"] == curve[0]["accuracy"]


def test_snapshots_at_named_queries(tune: Tune, ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tune(out, "zip", "--queries", 50, "--snapshots", "40,15,20")
    done = ztune("eval", out, "--snapshots", "--quiet", "--json")
    # A step costs 10: 15 and 20 are both reached after 20.
    assert [point["queries"] for point in done.json["curve"]] == [20, 40]


def test_several_templates_are_averaged(tune: Tune, tmp_path: Path, model: Model) -> None:
    templates = ("a photo of a {}.", "the digit {}, written by hand.")
    words = [word for template in templates for word in ("--template", template)]
    tune(tmp_path / "run", "zero-shot", *words)
    artifact = read_artifact(tmp_path / "run" / "prompt.safetensors")
    assert isinstance(artifact, HeadArtifact)
    # As each of them alone gives it: rows of length `logit_scale`.
    each = []
    for number, template in enumerate(templates):
        tune(tmp_path / str(number), "zero-shot", "--template", template)
        alone = read_artifact(tmp_path / str(number) / "prompt.safetensors")
        assert isinstance(alone, HeadArtifact)
        each.append(alone.weight.astype(np.float64) / model.bundle.logit_scale)
    assert not np.allclose(each[0], each[1])
    np.testing.assert_allclose(np.linalg.norm(each[0], axis=1), 1, atol=1e-5)
    mean = each[0] + each[1]
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(artifact.weight, model.bundle.logit_scale * mean, atol=1e-4)


def test_templates_reach_visual_prompts_and_are_kept(
    tune: Tune, ztune: Command, tmp_path: Path, model: Model
) -> None:
    templates = ("a photo of a {}.", "the digit {}, written by hand.")
    words = [word for template in templates for word in ("--template", template)]
    tune(tmp_path / "run", "bar", *words)
    artifact = read_artifact(tmp_path / "run" / "prompt.safetensors")
    assert isinstance(artifact, VisualArtifact)
    assert artifact.templates == templates
    expected = model.encode_templates(templates, artifact.classes)
    np.testing.assert_allclose(artifact.text_features, expected, atol=1e-6)
    done = ztune("eval", tmp_path / "run", "--quiet", "--json")
    assert done.json["templates"] == list(templates)


def test_presets_change_the_configuration(
    run: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    method = METHODS["sharpzo"]
    assert isinstance(method, TunedMethod)
    plain = document(run("sharpzo"))["config"]
    tuned = tune(tmp_path / "tuned", "sharpzo", "--preset", "tuned")["config"]
    changed = {key: value for key, value in tuned.items() if value != plain[key]}
    assert changed == dict(method.presets["tuned"].settings) != {}
    over = tune(tmp_path / "over", "sharpzo", "--preset", "tuned", "--set", "warmup_steps=7")
    assert over["config"] == {**tuned, "warmup_steps": 7}


def write_extractor(path: Path, kernel: int = 8) -> None:
    """Write a network that takes 24 px images and gives their pooled pixels."""
    nodes = [
        helper.make_node(
            "AveragePool", ["x"], ["p"], kernel_shape=[kernel] * 2, strides=[kernel] * 2
        ),
        helper.make_node("Flatten", ["p"], ["y"], axis=1),
    ]
    n = 3 * (24 // kernel) ** 2
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", n])],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def test_a_decoder_sees_another_extractors_features(
    tune: Tune, run: Callable[..., Path], ztune: Command, data: Path, tmp_path: Path
) -> None:
    extractor, wrong, out = tmp_path / "e.onnx", tmp_path / "wrong.onnx", tmp_path / "run"
    write_extractor(extractor)
    write_extractor(wrong, 12)
    found = tune(out, "blackvip", "--set", f"extractor={extractor}", own_cache=True)
    # Both networks see every image once.
    assert found["image_forwards"] == 2 * (N_TRAIN + N_VAL) + 20 * N_TRAIN
    prompt, packed = out / "prompt.safetensors", tmp_path / "classifier.onnx"
    artifact = read_artifact(prompt)
    assert isinstance(artifact, VisualArtifact)
    assert artifact.extractor == sha256(extractor)
    assert artifact.visual.shape == (decoder.n_values(27, 24),)
    # An artifact names the extractor by its content, so that equal runs have equal artifacts.
    assert artifact.provenance.config["extractor"] == sha256(extractor)
    assert found["config"] == artifact.provenance.config
    assert found["run_config"]["settings"]["extractor"] == str(extractor)

    measured = ztune("eval", out, "--quiet", "--json")
    assert measured.code == 0, measured.err
    # The run next to the prompt says where its extractor is.
    bare = tmp_path / "alone" / "prompt.safetensors"
    bare.parent.mkdir()
    shutil.copy(prompt, bare)
    for place in (out, prompt, bare):
        verbs: tuple[tuple[object, ...], ...] = (
            ("eval", MINI, "--data", data, "--split", "all", "--prompt", place),
            ("pack", MINI, "--prompt", place, "--out", packed, "--force"),
        )
        for words in verbs:
            done = ztune(*words, "--quiet")
            assert (done.code == 0) == (place != bare), done.err
            if place == bare:
                (line,) = done.err.splitlines()
                assert f'no run.json next to "{bare}"' in line
                assert "ztune eval RUN" in line
    again = ztune("eval", packed, "--split-file", out / "split.json", "--quiet", "--json")
    assert again.json["per_class"] == measured.json["per_class"]

    # It has to be there, and the same.
    moved = extractor.rename(tmp_path / "moved.onnx")
    for words in (("eval", out), ("eval", MINI, "--data", data, "--split", "all", "--prompt", out)):
        gone = ztune(*words, "--quiet")
        assert gone.code == 1
        (line,) = gone.err.splitlines()
        assert f'"{extractor}", which does not exist or has changed' in line
    shutil.copy(wrong, extractor)
    assert "has changed (expected SHA-256" in ztune("eval", out, "--quiet").err
    moved.rename(extractor)
    assert ztune("eval", out, "--quiet").code == 0

    # The bundle's own tower under another name is the default in disguise.
    shutil.copy(MINI / "image.onnx", extractor)
    tune(tmp_path / "own", "blackvip", "--set", f"extractor={extractor}")
    own = read_artifact(tmp_path / "own" / "prompt.safetensors")
    plain = read_artifact(run("blackvip") / "prompt.safetensors")
    assert isinstance(own, VisualArtifact)
    assert isinstance(plain, VisualArtifact)
    assert own.extractor == sha256(MINI / "image.onnx")
    assert plain.extractor == ""
    np.testing.assert_allclose(own.visual, plain.visual, atol=1e-3)


@pytest.mark.usefixtures("cells_here")
def test_an_extractor_in_python_and_in_comparisons(
    ztune: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, prompt = tmp_path / "e.onnx", tmp_path / "alone" / "prompt.safetensors"
    write_extractor(extractor)
    prompt.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    train, test = Dataset.from_folder(data).split(shots=2, seed=1)
    with load(MINI, provider="cpu", threads=1) as model:
        classifier = FewShotClassifier(model, method="blackvip", queries=20, extractor="e.onnx")
        expected = classifier.fit(train).predict_proba(test)
        classifier.save(prompt)
        with pytest.raises(ConfigError, match=r"no run\.json next to"):
            FewShotClassifier(model, method="blackvip").load_artifact(prompt)
        loaded = FewShotClassifier(model, method="blackvip", extractor=extractor)
        loaded.load_artifact(prompt)
        np.testing.assert_array_equal(loaded.predict_proba(test), expected)
        accuracy = loaded.score(test)
        loaded.export_onnx(tmp_path / "classifier.onnx")
        with load_classifier(tmp_path / "classifier.onnx", provider="cpu") as packed:
            np.testing.assert_allclose(packed.predict_proba(test.images), expected, atol=1e-4)
    compared = ztune(
        "compare", MINI, "--data", data, "--shots", 2, "--queries", 20, "--seeds", 1, "--methods",
        "blackvip", "--set", "blackvip.extractor=e.onnx", "--out", "out", "--provider", "cpu",
        "--threads", 1, "--quiet", "--json",
    )  # fmt: skip
    assert compared.code == 0, compared.err
    (cell,) = compared.json["cells"]
    assert cell["accuracy"] == accuracy


def test_extractors_that_do_not_fit_are_refused(ztune: Command, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_text("no graph")
    out = tmp_path / "run"
    words = ("tune", MINI, "--data", data, "--shots", 2, "--val", 1, "--test-fraction", 0.5)
    for method, extractor, parts in (
        ("zip", MINI / "image.onnx", ('method "zip" has no setting "extractor"',)),
        ("gda", MINI / "image.onnx", ('method "gda" has no setting "extractor"',)),
        ("blackvip", MINI / "text.onnx", ("text.onnx", "expected one input f32[N, 3, 24, 24]")),
        ("blackvip", MINI / "image_prompted.onnx", ("expected one input f32[N, 3, 24, 24]",)),
        ("blackvip", broken, ("broken.onnx", "cannot be opened")),
        ("blackvip", tmp_path / "none.onnx", ("none.onnx", "does not exist")),
    ):
        refused = ztune(
            *words, "--method", method, "--set", f"extractor={extractor}", "--out", out, "--quiet"
        )
        assert refused.code == 1
        (line,) = refused.err.splitlines()
        for part in parts:
            assert part in line, line
        assert not out.exists()

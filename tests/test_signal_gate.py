"""The signal gate of `ztune tune` and its report by `ztune doctor`, on the embedded bundle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from export.quantize import quantize_bundle
from runtimes import reference
from runtimes.bundle import load_bundle
from tests.conftest import DIGITS, MINI, Command, copy_digits
from ztune import training

TUNE = ("tune", MINI, "--data", "digits", "--method", "zip", "--shots", 4, "--queries", 40)
WEAK = ("--set", "perturbation=1e-9")
# Below a tenth of the published value a run in fp32 measures its signal too.
MEASURED = ("--set", "perturbation=5e-5")


@pytest.fixture(autouse=True)
def _digits_in_the_working_folder(few_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(few_digits.parent)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_bundle(load_bundle(MINI), tmp_path_factory.mktemp("b") / "int8", "int8").path


def document(out: Path) -> dict[str, Any]:
    value = json.loads((out / "run.json").read_text())
    assert isinstance(value, dict)
    return value


def test_a_run_in_fp32_measures_nothing(
    ztune: Command, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_PROGRAM", "raise SystemExit('it was asked')")
    done = ztune(*TUNE, "--cache", cache, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert "signal-to-noise" not in done.err
    found = done.json["signal"]
    assert (found["verdict"], found["forced"]) == ("not needed", False)
    assert found["reason"].startswith("the signal in fp32 is far above the limit")
    assert (done.json["probe_queries"], done.json["text_forwards"]) == (0, 400)


def test_a_run_says_its_signal_and_counts_its_cost(
    ztune: Command, tmp_path: Path, cache: Path
) -> None:
    out = tmp_path / "run"
    done = ztune(*TUNE, *MEASURED, "--cache", cache, "--out", out)
    assert done.code == 0, done.err
    (line,) = (line for line in done.err.splitlines() if "directions" in line)
    assert "in fp32 (10 directions, perturbation 5e-05; limit" in line
    run = document(out)
    found = run["signal"]
    assert found["verdict"] == "passed"
    assert found["ratio"] == found["signal"] / found["error"] > 1000
    assert (found["probe_queries"], found["reference_forwards"]) == (20, 200)
    assert found["reference"] == "own graph in fp64"
    assert not found["forced"]
    # The method's budget is its own.
    assert (run["queries"], run["probe_queries"], run["text_forwards"]) == (40, 20, 600)
    assert f"signal-to-noise {found['ratio']:.2g} in" in line


def test_the_gate_changes_no_byte_of_a_result(
    ztune: Command, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        *TUNE,
        *MEASURED,
        "--set",
        "batch_size=16",
        "--augment",
        2,
    )  # batches and views are drawn
    assert ztune(*words, "--out", tmp_path / "with").code == 0
    monkeypatch.setattr(training, "require_signal", lambda *_, **__: {"verdict": "not measured"})
    assert ztune(*words, "--out", tmp_path / "without").code == 0
    assert "ratio" in document(tmp_path / "with")["signal"]
    assert "ratio" not in document(tmp_path / "without")["signal"]
    contents = [(tmp_path / n / "prompt.safetensors").read_bytes() for n in ("with", "without")]
    assert contents[0] == contents[1]


def test_a_weak_signal_refuses_the_run_and_the_folder_may_be_used_again(
    ztune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused = ztune(*TUNE, *WEAK, "--out", out, "--quiet")
    assert refused.code == 1
    (line,) = refused.err.splitlines()
    ratio = document(out)["signal"]["ratio"]
    assert line.startswith(f"error: signal-to-noise is {ratio:.2g} in fp32, below the limit of ")
    assert "--set perturbation=" in line
    assert "--force" in line
    assert document(out)["status"] == "refused"
    assert not (out / "history.jsonl").exists()
    stuck = ztune("tune", "--resume", out)
    assert stuck.code == 1
    assert "was refused before its first step" in stuck.err

    advised = line.partition("--set ")[2].partition(")")[0]
    done = ztune(*TUNE, "--set", advised, "--shots", 5, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["signal"]["verdict"] == "not needed"  # it is the published one
    assert done.json["status"] == "finished"
    split = json.loads((out / "split.json").read_text())
    assert sum(entry["role"] == "train" for entry in split["entries"]) == 50
    again = ztune(*TUNE, "--out", out)
    assert again.code == 1
    assert "is a finished run" in again.err


def test_force_goes_on_and_is_recorded(ztune: Command, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    done = ztune(*TUNE, *WEAK, "--force", "--cache", cache, "--out", out, "--quiet")
    assert done.code == 0, done.err
    assert "warning: signal-to-noise is " in done.err
    found = document(out)["signal"]
    assert (found["verdict"], found["forced"]) == ("too weak", True)
    assert document(out)["queries"] == 40


def test_a_resumed_run_keeps_what_was_measured(
    ztune: Command, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert ztune(*TUNE, *MEASURED, "--cache", cache, "--out", out).code == 0
    finished = document(out)
    started = {k: v for k, v in finished.items() if k not in ("queries", "text_forwards")}
    other = {**started["calls"], "candidates": 2}
    (out / "run.json").write_text(json.dumps({**started, "status": "running", "calls": other}))
    for name in ("state.safetensors", "prompt.safetensors"):
        (out / name).unlink(missing_ok=True)  # killed right behind the gate
    monkeypatch.setattr(reference, "_PROGRAM", "raise SystemExit(1)")
    resumed = ztune("tune", "--resume", out)
    assert resumed.code == 0, resumed.err
    assert "signal-to-noise" not in resumed.err
    assert "a round is split into other calls" in resumed.err
    run = document(out)
    assert run["signal"] == finished["signal"]
    assert run["calls"] == finished["calls"]
    assert (run["probe_queries"], run["text_forwards"]) == (20, 600)
    refused = ztune("tune", "--resume", out, "--force")
    assert refused.code == 1
    assert "--force does not apply to --resume" in refused.err


def test_a_measurement_that_fails_stops_a_run_unless_forced(
    ztune: Command, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_PROGRAM", "raise SystemExit('no memory left')")
    out = tmp_path / "run"
    words = (*TUNE, *MEASURED, "--cache", cache, "--out", out, "--quiet")
    failed = ztune(*words)
    assert failed.code == 1
    (line,) = failed.err.splitlines()
    assert line.endswith("in higher precision: no memory left (continue without it with --force)")
    assert document(out)["status"] == "refused"
    assert ztune(*words, "--force").code == 0
    found = document(out)["signal"]
    assert (found["verdict"], found["forced"]) == ("not measured", True)
    assert "no memory left" in found["reason"]


def test_int8_is_measured_against_its_own_or_the_true_weights(
    int8: Path, ztune: Command, tmp_path: Path, cache: Path
) -> None:
    # Of fewer digits, int8 leaves too little signal.
    words = ("tune", int8, "--data", DIGITS, *TUNE[4:], "--cache", cache, "--json")
    own = ztune(*words, "--out", tmp_path / "own")
    assert own.code == 0, own.err
    true = ztune(*words, "--force", "--reference", MINI, "--out", tmp_path / "true")
    assert true.code == 0, true.err
    assert own.json["signal"]["reference"] == "own graph in fp32"
    assert true.json["signal"]["reference"] == str(MINI)
    ratios = [run.json["signal"]["ratio"] for run in (own, true)]
    assert ratios[0] != ratios[1]  # the rounding of the weights is another error
    assert max(ratios) < 1000  # where fp32 has more
    weak = ztune(*words, "--set", "perturbation=1e-5", "--out", tmp_path / "weak", "--quiet")
    assert weak.code == 1
    assert "in int8, below the limit" in weak.err
    assert "or the fp32 bundle" in weak.err


def test_a_reference_must_be_finer_and_of_the_same_model(
    int8: Path, ztune: Command, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(MINI, other)
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps({**manifest, "model_id": "another"}))
    for bundle, named, message in (
        (int8, other, "has another model"),
        (int8, int8, "is int8 for a bundle in int8, expected fp32"),
        (MINI, MINI, "is fp32 for a bundle in fp32"),
        (int8, tmp_path / "gone", "does not exist, expected a bundle"),
    ):
        out = tmp_path / "run"
        refused = ztune("tune", bundle, *TUNE[2:], "--reference", named, "--out", out, "--quiet")
        assert refused.code == 1
        (line,) = refused.err.splitlines()
        assert message in line
        assert not out.exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals as POSIX has them")
def test_an_interruption_ends_the_measuring_process_too(tmp_path: Path, cache: Path) -> None:
    pid, out = tmp_path / "pid", tmp_path / "run"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    program = (
        "import sys; from runtimes import reference; from ztune.cli.main import main; "
        f"reference._PROGRAM = {f'{child}; time.sleep(60)'!r}; sys.exit(main(sys.argv[1:]))"
    )
    words = [*TUNE, *MEASURED, "--cache", cache, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # to this process alone
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("error: stopped (resume with: ztune tune --resume")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert document(out)["status"] == "running"


def test_a_closed_form_has_no_gate(ztune: Command, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    done = ztune(*TUNE, "--method", "gda", "--cache", cache, "--out", out, "--json")
    assert done.code == 0, done.err
    assert "signal" not in done.json
    assert "signal-to-noise" not in done.err
    assert done.json["probe_queries"] == 0
    other = ztune(*TUNE, "--method", "gda", "--force", "--cache", cache, "--out", tmp_path / "b")
    assert other.code == 1
    assert "gda has no steps and no signal to measure: leave out" in other.err


def test_a_killed_process_takes_the_measuring_one_and_its_folder_along(tmp_path: Path) -> None:
    folder, pid = tmp_path / "folder", tmp_path / "pid"
    folder.mkdir()
    child = (
        "import os, pathlib, sys, time; from runtimes import reference; "
        "reference._answer = lambda folder: time.sleep(60); "
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); "
        f"sys.exit(reference.main({str(folder)!r}))"
    )
    program = (
        "import sys; from runtimes import reference; "
        f"reference._run_process([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folder.exists()


def test_a_damaged_reference_is_told_before_anything_is_written(
    int8: Path, ztune: Command, tmp_path: Path
) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "run"
    shutil.copytree(MINI, damaged)
    with (damaged / "prompt.onnx").open("rb+") as file:
        file.write(b"x")
    words = ("tune", int8, *TUNE[2:], "--reference", damaged, "--force", "--out", out, "--quiet")
    refused = ztune(*words)
    assert refused.code == 1
    assert "error: --reference: bundle" in refused.err
    assert "SHA-256 differs" in refused.err
    assert not out.exists()


def test_a_resumed_run_needs_its_reference_no_more(
    int8: Path, ztune: Command, tmp_path: Path, cache: Path
) -> None:
    reference_bundle, out = tmp_path / "fp32", tmp_path / "run"
    shutil.copytree(MINI, reference_bundle)
    words = ("tune", int8, *TUNE[2:], "--reference", reference_bundle, "--cache", cache)
    assert ztune(*words, "--force", "--out", out).code == 0
    (out / "run.json").write_text(json.dumps({**document(out), "status": "running"}))
    shutil.rmtree(reference_bundle)
    resumed = ztune("tune", "--resume", out)
    assert resumed.code == 0, resumed.err


def test_the_doctor_takes_an_int8_bundle_for_what_it_is(int8: Path, ztune: Command) -> None:
    report = ztune("doctor", int8, "--data", "digits", "--shots", 4, "--json")
    assert report.code == 0, report.err
    assert report.json["ok"]
    assert report.json["bundle"]["provider"] == "cpu"
    assert report.json["signal"]["precision"] == "int8"


def test_the_doctor_says_why_no_provider_runs_a_precision(ztune: Command, tmp_path: Path) -> None:
    half = quantize_bundle(load_bundle(MINI), tmp_path / "half", "fp16").path
    report = ztune("doctor", half, "--data", "digits")
    assert report.code == 1
    assert "an fp16 bundle cannot run on cpu" in report.err
    assert "prompt.onnx" in report.out
    assert "signal-to-noise ratio: not measured" in report.out


def test_the_doctor_measures_what_the_run_does(ztune: Command, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "run"
    settings = ("--shots", 4, "--seed", 3, *MEASURED)
    asked = ("--method", "zip", "--queries", 10, "--cache", cache)
    run = ("tune", MINI, "--data", "digits", *settings, *asked)
    assert ztune(*run, "--out", out).code == 0
    report = ztune("doctor", MINI, "--data", "digits", *settings, "--json")
    assert report.code == 0, report.err
    measured = {k: v for k, v in document(out)["signal"].items() if k not in ("seconds", "forced")}
    assert {k: report.json["signal"][k] for k in measured} == measured
    assert report.json["ok"]

    weak = ztune("doctor", MINI, "--data", "digits", "--shots", 4, *WEAK)
    assert weak.code == 0
    assert "too weak" in weak.out
    assert "--set perturbation=" in weak.out
    lonely = ztune("doctor", MINI, "--seed", 3)
    assert lonely.code == 1
    assert "--seed needs a BUNDLE and --data FOLDER" in lonely.err


def test_a_method_that_takes_no_differences_has_no_gate(
    ztune: Command, tmp_path: Path, cache: Path
) -> None:
    words = (*TUNE, "--method", "ogn", "--cache", cache)
    done = ztune(*words, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert "signal-to-noise" not in done.err
    found = done.json["signal"]
    assert (found["verdict"], found["forced"]) == ("not needed", False)
    assert "uses no differences of losses" in found["reason"]
    assert done.json["probe_queries"] == 0
    assert done.json["text_forwards"] == 40 * 10
    report = ztune("doctor", MINI, "--data", "digits", "--shots", 4, "--method", "ogn")
    assert report.code == 1
    message = "ogn uses no differences of losses, so its signal cannot be measured"
    assert message in report.err
    report = ztune("doctor", MINI, "--data", "digits", "--shots", 4, "--method", "gda")
    assert "gda has no steps, so its signal cannot be measured" in report.err


def test_directions_in_the_space_of_logits_are_differences(
    ztune: Command, tmp_path: Path, cache: Path
) -> None:
    words = (*TUNE, "--method", "ogn-context", "--cache", cache, "--quiet")
    done = ztune(*words, *MEASURED, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    found = done.json["signal"]
    assert (found["verdict"], found["setting"]) == ("passed", "perturbation")
    assert done.json["probe_queries"] == 20
    weak = ztune(*words, *WEAK, "--out", tmp_path / "weak")
    assert weak.code == 1
    assert "error: signal-to-noise is " in weak.err


def test_losses_alone_are_gated_as_the_steps_that_are_taken(
    ztune: Command, tmp_path: Path, cache: Path
) -> None:
    words = (*TUNE, "--method", "ogn", "--set", "answers=loss", "--cache", cache)
    done = ztune(*words, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert "warning: answers=loss leaves no logits to fit" in done.err
    # It takes zip's steps, whose perturbation is the published one.
    assert done.json["signal"]["reason"].startswith("the signal in fp32")


def test_texts_of_a_whole_call_are_found_in_low_precision(
    int8: Path, ztune: Command, tmp_path: Path
) -> None:
    data = copy_digits(tmp_path / "data", 12, ("four", "nine", "one"))

    def tuned(out: str) -> tuple[bytes, list[int]]:
        words = ("--queries", 20, "--shots", 4, "--val", 0, "--quiet", "--json")
        done = ztune("tune", int8, "--data", data, *words, "--out", tmp_path / out)
        assert done.code == 0, done.err
        costs = [done.json.get(name, 0) for name in ("text_forwards", "text_forwards_cached")]
        return (tmp_path / out / "prompt.safetensors").read_bytes(), costs

    first, costs = tuned("first")
    assert costs == [20 * 3, 0]
    assert tuned("again") == (first, [0, 20 * 3])
    # An activation's scale is that of its call, so a class more changes all features.
    copy_digits(data, 12, ["two"])
    assert tuned("more")[1] == [20 * 4, 0]

"""Processes that a verb starts: what they import, and what they tell the world."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from tests.conftest import MINI, ROOT
from ztune.io.children import empty_working_folder, python_command

ZTUNE = Path(sys.executable).with_name("ztune")
# Modules that the standard library, numpy's or ours import late, so that no verb gets by without.
PLANTED = ("json", "csv", "sqlite3", "tempfile", "numpy", "ztune", "runtimes", "pickle", "signal")
PLAN = """
title = "Plan"
seeds = [1, 2]
queries = 20
[models]
mini = "{mini}"
[data.digits]
path = "{data}"
template = "a photo of the digit {{}}."
[methods]
gda = {{}}
[[protocols]]
kind = "few-shot"
shots = [1]
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Return a folder with a module of each name that leaves a trace when it is imported."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for name in PLANTED:
        trace = f"open({str(tmp_path / 'imported')!r}, 'a').write({name + chr(10)!r})"
        (folder / f"{name}.py").write_text(trace)
    return folder


def imported(tmp_path: Path) -> list[str]:
    trace = tmp_path / "imported"
    return sorted(set(trace.read_text().split())) if trace.exists() else []


def run_in(folder: Path, *words: object) -> None:
    done = subprocess.run(
        [str(ZTUNE), *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_a_plain_child_would_import_what_is_planted(planted: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "json.tool", "--help"], cwd=planted, capture_output=True)
    assert "json" in imported(tmp_path)


def test_compare_imports_nothing_from_the_working_folder(
    planted: Path, few_digits: Path, tmp_path: Path
) -> None:
    words = ("--methods", "gda", "--shots", 1, "--seeds", 1, "--out", tmp_path / "out", "--quiet")
    run_in(planted, "compare", MINI, "--data", few_digits, *words)
    assert imported(tmp_path) == []


def test_tune_measures_its_signal_without_the_working_folder(
    planted: Path, few_digits: Path, tmp_path: Path
) -> None:
    words = ("--method", "zip", "--queries", 10, "--shots", 1, "--val", 0, "--quiet")
    int8 = quantize_bundle(load_bundle(MINI), tmp_path / "int8", "int8").path
    out = tmp_path / "out"
    run_in(planted, "tune", int8, "--data", few_digits, *words, "--force", "--out", out)
    assert "signal" in json.loads((out / "run.json").read_text())
    assert imported(tmp_path) == []


@pytest.mark.parametrize("workers", [("--workers", 2), ("--ray", "local", "--provider", "cpu")])
def test_workers_import_nothing_from_the_working_folder(
    planted: Path, few_digits: Path, tmp_path: Path, workers: tuple[object, ...]
) -> None:
    pytest.importorskip("ray" if "--ray" in workers else "joblib")
    # A relative plan and root: workers do not run where the command does.
    (planted / "plan.toml").write_text(PLAN.format(mini=MINI, data=few_digits))
    run_in(planted, "bench", "plan.toml", "--out", "../out", *workers, "--quiet")
    assert imported(tmp_path) == []


def test_a_child_has_the_path_of_its_parent_without_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(other), *sys.path])
    command = python_command("print(sys.argv[1:]); print(sys.path)", "a", "b c")
    words, path = subprocess.check_output(command, text=True).splitlines()
    assert words == str(["a", "b c"])
    assert path == str([str(other), *(entry for entry in sys.path[3:] if entry)])


def test_ztune_is_found_where_it_lies_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    command = python_command("import ztune; print(ztune.__file__)")
    found = subprocess.check_output(command, text=True).strip()
    assert Path(found).is_relative_to(ROOT)


def test_workers_start_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with empty_working_folder():
        inside = Path.cwd()
        assert inside != tmp_path
        assert list(inside.iterdir()) == []
    assert Path.cwd() == tmp_path
    assert not inside.exists()


# ONNX Runtime 1.32 looks up its telemetry host when a session opens, and again after 6 s.
SECONDS = 8
SESSION = f"""
import sys, time
sys.path[:0] = {[str(ROOT)]!r}
import numpy as np
from runtimes.bundle import load_bundle
from runtimes.providers import Execution, open_session
from pathlib import Path
bundle = load_bundle(Path({str(MINI)!r}))
session = open_session(bundle.file("image.onnx"), Execution("cpu"))
pixels = np.zeros((1, 3, bundle.image.size, bundle.image.size), np.float32)
end = time.monotonic() + {SECONDS}
while time.monotonic() < end:
    session.run(None, {{"pixels": pixels}})
    time.sleep(0.2)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a home of its own that does not name the variable."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {
        k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    return kept | {"HOME": str(home)}


def traced(tmp_path: Path, environment: dict[str, str], program: str) -> str:
    """Run a program under strace; return the lines in which it asked for the network."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "trace"
    command = [strace, "-f", "-qq", "-e", "trace=network", "-o", str(log)]
    done = subprocess.run(
        [*command, sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if "ptrace" in done.stderr or "attach" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    calls = [line for line in log.read_text().splitlines() if re.search(r"^\d+ +\w+\(", line)]
    return "\n".join(calls)


def test_a_session_looks_up_no_host_and_keeps_no_file(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    assert traced(tmp_path, environment, SESSION) == ""
    assert [path for path in Path(environment["HOME"]).rglob("*") if path.is_file()] == []


def test_the_trace_sees_a_socket(tmp_path: Path, environment: dict[str, str]) -> None:
    program = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()"
    assert "socket(AF_INET" in traced(tmp_path, environment, program)


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_an_environment_that_sets_the_variable_is_respected(
    environment: dict[str, str], given: str | None
) -> None:
    program = (
        "import os; from runtimes.providers import onnxruntime; onnxruntime(); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    own = {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    said = subprocess.check_output(python_command(program), env=environment | own, text=True)
    assert said.strip() == (given or "1")

"""A method of another package in tune, compare and bench: the example, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, MINI, ROOT
from tests.plugins import install_example
from ztune.methods import plugins

PLAN = """
title = "Two methods"
seeds = [1]
queries = 40
[models]
mini = "{bundle}"
[data]
digits = {{ path = "{data}" }}
[methods]
zip = {{}}
random-search = {{ settings = {{ n_neighbours = 4 }} }}
[[protocols]]
kind = "few-shot"
data = ["digits"]
shots = [2]
methods = ["zip", "random-search"]
"""
PROGRAM = "import sys; from ztune.cli.main import main; sys.exit(main())"
Ztune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    install_example(place)
    return place


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return three classes of twelve digits."""
    root = tmp_path / "digits"
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:12]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture
def run(site: Path, tmp_path: Path) -> Ztune:
    """Run `ztune` in a process that finds the example."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}

    def command(*words: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, words)],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    return command


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def told(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


def test_it_is_tuned_and_scored(run: Ztune, site: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (
        "tune", MINI, "--data", data, "--method", "random-search", "--shots", 2, "--queries", 120,
        "--provider", "cpu", "--quiet", "--out", out,
    )  # fmt: skip
    assert run(*words).returncode == 0
    document = read(out / "run.json")
    assert document["package"] == "ztune-random-search 0.1.0"
    assert document["queries"] == 120
    losses = [json.loads(line)["loss"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert document["train_loss"] < losses[0]  # on all training images, in every round
    assert json.loads(run("eval", out, "--json").stdout)["n"] > 0

    # Stopped, and another version installed in between.
    (out / "run.json").write_text(json.dumps({**document, "status": "running"}))
    install_example(site, "0.2.0")
    told(
        run("tune", "--resume", out), "was started with random-search of ztune-random-search 0.1.0",
        "but ztune-random-search 0.2.0 is installed (install that version, or start a new run)",
    )  # fmt: skip
    shutil.rmtree(site)
    told(
        run("tune", "--resume", out), "search 0.1.0, but no such package is installed (install that"
    )


def test_it_is_compared(run: Ztune, site: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    words = (
        "compare", MINI, "--data", data, "--methods", "zip,random-search", "--seeds", 1,
        "--shots", 2, "--queries", 20, "--provider", "cpu", "--quiet", "--out", out,
    )  # fmt: skip
    done = run(*words)
    assert done.returncode == 0, done.stderr
    cells = {cell["method"]: cell for cell in read(out / "compare.json")["cells"]}
    assert list(cells) == ["zip", "random-search"]
    assert cells["random-search"]["queries"] == 20
    assert "random-search needs losses" in (out / "compare.md").read_text()
    install_example(site, "0.2.0")
    other = run(*words[:-3], "--out", out)  # other code: other results
    assert "2 requested: 1 finished, 1 to do" in other.stderr
    shutil.rmtree(site)
    told(run(*words), 'unknown method "random-search"')
    assert run(*words[:4], "--methods", "zip", *words[6:]).returncode == 0


def test_versions_are_results_of_their_own_in_a_bench(
    run: Ztune, site: Path, data: Path, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN.format(bundle=MINI, data=data))
    words = ("bench", plan, "--out", out, "--provider", "cpu", "--quiet")
    runs = []
    for version, more in (
        ("0.1.0", ("--workers", 2)), ("0.1.0", ("--resume",)), ("0.2.0", ("--resume",)),
    ):  # fmt: skip
        install_example(site, version)
        done = run(*words, *more)
        assert done.returncode == 0, done.stderr
        runs.append({place.name for place in (out / "runs").iterdir()})
    assert len(runs[0]) == 2
    assert runs[1] == runs[0]
    assert len(runs[2] - runs[0]) == 1
    (new,) = runs[2] - runs[0]
    document = read(out / "runs" / new / "run" / "run.json")
    assert (document["method"], document["package"]) == (
        "random-search", "ztune-random-search 0.2.0",
    )  # fmt: skip


def test_the_environment_of_these_tests_has_no_other_methods() -> None:
    assert plugins.entry_points() == {}

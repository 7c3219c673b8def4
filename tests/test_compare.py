"""`ztune compare` and `ztune methods` on the embedded bundle and a few real digits."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, MINI, Command
from ztune.cli.main import main
from ztune.experiments.cell_process import CellError, exit_reason, run_cell
from ztune.experiments.compare_config import CompareConfig
from ztune.experiments.compare_run import workload_of
from ztune.experiments.comparison import Workload
from ztune.methods.base import HeadMethod
from ztune.methods.registry import METHODS, find_method, method_config, tuned_config
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.types import Json

CELLS = [(method, seed) for method in ("zip", "gda") for seed in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three classes of sixteen digits: 2 shots, 2 for validation, 8 to test on."""
    root = tmp_path_factory.mktemp("data") / "digits"
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:16]:
            shutil.copy(image, root / name)
    return root


def words(data: Path, out: Path, *more: object, methods: str = "zip,gda") -> list[str]:
    common = ("compare", MINI, "--data", data, "--out", out, "--shots", 2, "--queries", 40)
    return [str(w) for w in (*common, "--methods", methods, "--seeds", "1,2", *more)]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison of two methods that can run and one whose first step costs too much."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    assert main(words(data, out, "--quiet", methods="zip,sharpzo,gda")) == 1
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def cells_of(out: Path) -> dict[tuple[str, int], Any]:
    return {(c["method"], c["seed"]): c for c in read(out / "compare.json")["cells"]}


def test_every_number_of_a_cell_is_its_runs(finished: Path, ztune: Command) -> None:
    cells = cells_of(finished)
    for method, seed in CELLS:
        cell, path = cells[method, seed], finished / "runs" / f"{method}-{seed}"
        run = read(path / "run.json")
        assert (run["method"], run["seed"], run["status"]) == (method, seed, "finished")
        for name in ("queries", "text_forwards", "image_forwards", "result_bytes", "stop_reason"):
            assert cell[name] == run[name], name
        tuning = run["seconds"] - run["report_seconds"]
        assert cell["own_seconds"] == pytest.approx(tuning, abs=0.001)
        scored = ztune("eval", path, "--quiet", "--json").json
        assert cell["accuracy"] == scored["accuracy"]
        assert cell["zero_shot_accuracy"] == scored["zero_shot_accuracy"]
        assert cell["n_test"] == scored["n"] == 24
    assert cells["zip", 1]["queries"] == 40
    assert cells["gda", 1]["queries"] == cells["gda", 1]["text_forwards"] == 0


def test_images_are_encoded_once_and_charged_to_all(finished: Path) -> None:
    document = read(finished / "compare.json")
    (first, second) = document["images"]
    assert first["image_forwards"] == 3 * 4
    n_encoded = first["image_forwards"] + second["image_forwards"]
    rate = (first["image_seconds"] + second["image_seconds"]) / n_encoded
    for cell in (cells_of(finished)[key] for key in CELLS):
        assert cell["image_forwards"] == 0
        assert cell["image_forwards_needed"] == 3 * 4
        assert cell["seconds"] == pytest.approx(cell["own_seconds"] + 12 * rate, abs=0.002)
        peak = max(cell["own_peak_memory_mb"], *(one["peak_memory_mb"] for one in (first, second)))
        assert cell["peak_memory_mb"] == peak


def test_methods_share_a_seeds_images(finished: Path) -> None:
    splits = {
        key: read(finished / "runs" / f"{key[0]}-{key[1]}" / "split.json")["entries"]
        for key in CELLS
    }
    assert splits["zip", 1] == splits["gda", 1]
    assert splits["zip", 2] == splits["gda", 2]
    assert splits["zip", 1] != splits["zip", 2]


def test_the_curve_ends_in_the_result(finished: Path) -> None:
    cell = cells_of(finished)["zip", 2]
    queries = [point["queries"] for point in cell["curve"]]
    assert queries == sorted(set(queries)) == [10, 20, 30, 40]
    assert cell["curve"][-1]["accuracy"] == cell["accuracy"]
    assert cells_of(finished)["gda", 1]["curve"] == []


def test_the_table_is_sorted_and_says_what_failed(finished: Path) -> None:
    document = read(finished / "compare.json")
    rows = document["table"]
    assert {row["method"] for row in rows[:2]} == {"zip", "gda"}
    assert rows[0]["accuracy"] >= rows[1]["accuracy"]
    assert rows[2]["method"] == "sharpzo"
    assert rows[2]["accuracy"] is None
    assert [one["seed"] for one in rows[2]["failures"]] == [1, 2]
    assert "costs 1064" in rows[2]["failures"][0]["reason"]
    assert not (finished / "runs" / "sharpzo-1").exists()
    text = (finished / "compare.md").read_text()
    listed = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert listed == ["method", "---", *(row["method"] for row in rows)]
    assert "| sharpzo | failed | 0 of 2 |" in text
    assert "- sharpzo failed with seeds 1, 2: " in text
    assert "- gda needs text features, image features." in text
    assert f"`ztune compare {MINI}" in text
    for name in ("accuracy-queries.png", "accuracy-seconds.png"):
        assert (finished / name).stat().st_size > 10_000


def test_the_same_command_goes_on(ztune: Command, data: Path, copied: Path) -> None:
    before = cells_of(copied)
    prompt = copied / "runs" / "zip-2" / "prompt.safetensors"
    bytes_before = prompt.read_bytes()
    untouched = copied / "runs" / "zip-1" / "run.json"
    written = untouched.stat().st_mtime_ns
    shutil.rmtree(prompt.parent)
    result = ztune(*words(data, copied, "--json"))
    assert result.code == 0, result.err
    assert "[1/1] zip, seed 2" in result.err
    assert prompt.read_bytes() == bytes_before
    assert untouched.stat().st_mtime_ns == written
    after = {(c["method"], c["seed"]): c for c in result.json["cells"]}
    assert after["zip", 1] == before["zip", 1]
    assert after["zip", 2]["accuracy"] == before["zip", 2]["accuracy"]
    assert after["zip", 2]["image_forwards_needed"] == 12
    assert result.json == read(copied / "compare.json")
    lines = ztune(*words(data, copied)).out.splitlines()
    shown = [line.split()[0] for line in lines[2 : 2 + len(result.json["table"])]]
    assert shown == [row["method"] for row in result.json["table"]]


def test_a_failed_cell_is_told_and_tried_again(ztune: Command, data: Path, copied: Path) -> None:
    run = copied / "runs" / "gda-1" / "run.json"
    whole = run.read_text()
    run.write_text("{")
    result = ztune(*words(data, copied, "--quiet"))
    assert result.code == 1
    (error,) = result.err.splitlines()
    assert error.startswith("error: 1 of 4 cell(s) failed")
    assert "gda failed with seed 1: " in result.out
    cell = cells_of(copied)["gda", 1]
    assert cell["status"] == "failed"
    assert "cannot be read as JSON" in cell["reason"]
    (row,) = (r for r in read(copied / "compare.json")["table"] if r["method"] == "gda")
    assert row["seeds"] == [2]
    assert row["deviation"] is None
    run.write_text(whole)
    assert ztune(*words(data, copied, "--quiet")).code == 0
    assert cells_of(copied)["gda", 1]["status"] == "finished"


def test_a_cell_of_another_process_is_left_alone(ztune: Command, data: Path, copied: Path) -> None:
    document = read(copied / "compare.json")
    document["cells"] = [c for c in document["cells"] if (c["method"], c["seed"]) != ("gda", 1)]
    (copied / "compare.json").write_text(json.dumps(document))
    with RunFolder(copied / "runs" / "gda-1").locked():
        result = ztune(*words(data, copied))
    assert result.code == 1
    assert "gda, seed 1: skipped, run " in result.err
    assert result.err.splitlines()[-1] == (
        "error: 1 of 4 cell(s) are running in another process (retry with the same command)"
    )
    assert "failed" not in "".join(line for line in result.out.splitlines() if "gda" in line)
    assert ("gda", 1) not in cells_of(copied)
    assert ztune(*words(data, copied, "--quiet")).code == 0
    assert cells_of(copied)["gda", 1]["status"] == "finished"


def test_a_method_that_compare_json_names_is_no_path(
    ztune: Command, data: Path, copied: Path
) -> None:
    document = read(copied / "compare.json")
    (first, *_) = document["cells"]
    for name in ("../../up", "/up", ".."):
        cells = [*document["cells"], {**first, "method": name}]
        (copied / "compare.json").write_text(json.dumps({**document, "cells": cells}))
        before = set(copied.parent.rglob("*"))
        result = ztune(*words(data, copied, "--quiet"))
        assert result.code == 1
        assert f'has results of method "{name}", which is not installed' in result.err
        assert set(copied.parent.rglob("*")) == before
        assert len(cells_of(copied)) == len(cells)


def test_methods_and_seeds_may_be_added(ztune: Command, data: Path, copied: Path) -> None:
    more = ("--methods", "zero-shot,gda", "--seeds", "2,3", "--quiet", "--json")
    result = ztune(*words(data, copied)[:-4], *more)
    assert result.code == 0, result.err
    rows = {row["method"]: row for row in result.json["table"]}
    assert rows["zero-shot"]["seeds"] == [2, 3]
    assert rows["gda"]["seeds"] == [1, 2, 3]
    assert rows["zip"]["seeds"] == [1, 2]
    (cell,) = (c for c in result.json["cells"] if (c["method"], c["seed"]) == ("zero-shot", 2))
    assert cell["accuracy"] == cell["zero_shot_accuracy"]


def test_another_request_is_refused(
    ztune: Command, data: Path, copied: Path, tmp_path: Path
) -> None:
    before = (copied / "compare.json").read_bytes()

    def refused(*more: object, images: Path = data) -> str:
        result = ztune(*words(images, copied, *more, "--quiet"))
        assert result.code == 1
        assert (copied / "compare.json").read_bytes() == before
        (line,) = result.err.splitlines()
        return line

    assert "queries was 40, now 60" in refused("--queries", 60)
    assert "pixel_queries was 40, now 10" in refused("--pixel-queries", 10)
    assert "settings was {}, now {'zip': {'rank': '2'}}" in refused("--set", "zip.rank=2")
    other = Path(shutil.copytree(data, tmp_path / "other"))
    assert "data was " in refused(images=other)
    image = next(iter((data / "one").iterdir()))
    content = image.read_bytes()
    try:
        shutil.copy(next(iter((DIGITS / "nine").iterdir())), image)
        assert "was started with other images" in refused()
    finally:
        image.write_bytes(content)


def test_what_the_bundle_does_not_give_fails_without_a_run(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(MINI, tmp_path / "bundle"))
    manifest = read(bundle / "bundle.json")
    del manifest["visual"], manifest["files"]["image_prompted.onnx"]
    del manifest["parity"]["image_prompted"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    (bundle / "image_prompted.onnx").unlink()
    out = tmp_path / "out"
    options = ("--shots", 2, "--seeds", 1, "--methods", "bptvlm", "--quiet")
    result = ztune("compare", bundle, "--data", data, "--out", out, *options)
    assert result.code == 1
    assert "bptvlm failed with seed 1: " in result.out
    assert "extra tokens in the image tower" in result.out
    assert list((out / "runs").iterdir()) == []


def test_access_is_that_of_the_settings(ztune: Command, data: Path, tmp_path: Path) -> None:
    options = ("--shots", 2, "--seeds", 1, "--methods", "bptvlm", "--queries", 15, "--quiet")
    out, text_alone = tmp_path / "out", ("--set", "bptvlm.part=text")
    result = ztune("compare", MINI, "--data", data, "--out", out, *options, *text_alone, "--json")
    assert result.code == 0, result.err
    assert result.json["capabilities"] == {"bptvlm": "losses, text prompts as embeddings"}
    assert result.json["cells"][0]["image_forwards_needed"] == 12


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_interrupted_cell_is_taken_up_again(
    ztune: Command, data: Path, tmp_path: Path, name: str
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    out = tmp_path / "out"
    common = ("--shots", 2, "--queries", 60_000, "--seeds", 1, "--methods", "zip")
    command = ["compare", MINI, "--data", data, "--out", out, *common]
    compare = subprocess.Popen(
        [sys.executable, "-m", "ztune.cli.main", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
    )
    history, deadline = out / "runs" / "zip-1" / "history.jsonl", time.monotonic() + 120
    while not (history.exists() and history.stat().st_size > 5000):
        assert compare.poll() is None, compare.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(compare.pid, getattr(signal, name))
    _, said = compare.communicate(timeout=120)
    assert compare.returncode == 130
    assert said.splitlines()[-1] == "error: stopped (resume with the same command)"
    assert read(out / "runs" / "zip-1" / "run.json")["status"] == "running"
    log = (out / "logs" / "zip-1.log").read_text()
    assert log.endswith("stopped\n")  # it was interrupted, not killed
    result = ztune(*command, "--quiet", "--json")
    assert result.code == 0, result.err
    assert result.json["cells"][0]["queries"] == 60_000
    assert f"\nresume {out / 'runs' / 'zip-1'}\n" in (out / "logs" / "zip-1.log").read_text()


def job(method: str, **settings: Json) -> Workload:
    found = find_method(method)
    config = tuned_config(found, method_config(found, settings, "published"))
    assert config is not None
    run_config = RunConfig(str(MINI), "photos", method=method, queries=3000, snapshots=2)
    return workload_of(config, run_config, n_train=20, n_test=50)


def test_a_cell_is_estimated_by_what_it_sends() -> None:
    text = job("bptvlm", part="text")
    assert (text.changes_texts, text.images_per_query, text.n_scored) == (True, 0, 0)
    vision = job("bptvlm", part="vision")
    assert (vision.changes_texts, vision.images_per_query, vision.n_scored) == (False, 20, 100)
    assert job("bptvlm").changes_texts
    assert job("zip").changes_texts
    assert not job("bar").changes_texts
    full = job("cma", covariance="full")
    assert full.own_seconds > 10 * job("cma", covariance="separable").own_seconds > 0
    assert job("zip").own_seconds == 0
    assert (job("zip").queries, job("ogn").queries) == (3000, 1000)
    assert job("ogn", most_prompts=None).queries == 3000


def test_a_gate_is_forced_where_there_is_one() -> None:
    base = RunConfig(str(MINI), "photos", force=True)
    config = CompareConfig(base, ("ogn", "zip", "gda"), (1,), 15, {})
    for method, force in (("ogn", False), ("gda", False), ("zip", True), ("ogn-context", True)):
        assert config.run_config(method, 1).force == force


def test_a_preset_has_its_views() -> None:
    config = CompareConfig(
        RunConfig(str(MINI), "photos", preset="published"), ("zip", "gda"), (1,), 15, {}
    )
    assert config.run_config("zip", 1).augment == 16
    assert config.run_config("gda", 1).augment == 0


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--methods", "zip,best"), ('unknown method "best"', "zip, sharpzo")),
        (("--methods", "zip,,gda"), ("--methods", "zip,,gda")),
        (("--methods", ""), ("--methods",)),
        (("--methods", "zip,zip"), ("--methods: duplicate zip",)),
        (("--seeds", "1,2,1"), ("--seeds: duplicate 1",)),
        (("--seeds", "1,01"), ("has a duplicate seed",)),
        (("--seeds", ""), ("--seeds",)),
        (("--seeds", "-1"), ('--seeds: invalid seed "-1"',)),
        (("--seeds", "1,b"), ('--seeds: invalid seed "b"',)),
        (("--queries", 0), ("--queries is 0",)),
        (("--pixel-queries", 0), ("--pixel-queries is 0",)),
        (("--shots", 0), ("--shots is 0",)),
        (("--snapshots", -1), ("--snapshots is -1",)),
        (("--preset", "best"), ('unknown preset "best"',)),
        (("--template", "a photo"), ('--template "a photo" has 0 {}, expected one',)),
        (("--set", "rank=3"), ('--set is "rank=3", expected METHOD.KEY=VALUE',)),
        (("--set", "zip.rnk=3"), ('no setting "rnk"', "rank")),
        (("--set", "zip.rank=0"), ("rank is 0",)),
        (("--set", "bar.focal_gamma=1"), ("--set bar", "bar is not among --methods")),
        (("--test-fraction", 0), ("leaves no test images",)),
        (("--data", "nowhere"), ("nowhere",)),
    ],
)
def test_a_wrong_request_starts_nothing(
    ztune: Command,
    data: Path,
    tmp_path: Path,
    more: Sequence[object],
    parts: Sequence[str],
) -> None:
    name, value = more
    result = ztune(*words(data, tmp_path / "out", f"{name}={value}", "--quiet"))
    assert result.code == 1
    (line,) = result.err.splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = ztune(*words(data, tmp_path / "out", "--quiet"))
    assert result.code == 1
    assert "is not empty" in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_why_a_process_failed() -> None:
    assert exit_reason(-9, "tuning: 3/40\n") == "killed by signal 9 (out of memory?)"
    assert exit_reason(-11, "") == "killed by signal 11"
    assert exit_reason(1, "Traceback\n  ...\nMemoryError\n\n") == "MemoryError"
    assert exit_reason(3, "") == "exit code 3"


def test_a_process_reports_its_own_error_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of an earlier process\n")
    run_config = RunConfig(str(tmp_path / "nowhere"), str(DIGITS), provider="cpu")
    with pytest.raises(CellError, match=r"^\".*nowhere\" does not exist, expected a bundle"):
        run_cell(tmp_path / "run", run_config, log)
    first, *_, last = log.read_text().splitlines()
    assert first == "error: of an earlier process"
    assert last.startswith('error: "')


def test_a_process_that_ends_without_an_answer_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ztune.experiments.cell_process._PROGRAM", "import os; os.kill(os.getpid(), 9)"
    )
    run_config = RunConfig(str(MINI), str(DIGITS), provider="cpu")
    with pytest.raises(CellError, match=r"^killed by signal 9 \(out of memory\?\)$"):
        run_cell(tmp_path / "run", run_config, tmp_path / "log")


def test_methods_lists_the_whole_table(ztune: Command) -> None:
    result = ztune("methods", "--json")
    assert result.code == 0
    documents = {document["name"]: document for document in result.json["methods"]}
    assert list(documents) == list(METHODS)
    for name, document in documents.items():
        method = METHODS[name]
        assert document["settings"] == dataclasses.asdict(method.config())
        assert document["paper"] == method.paper
        assert document["needs"]
        assert document["serves_new_classes"] is not isinstance(method, HeadMethod)
    assert documents["sharpzo"]["first_step_queries"] == 1064
    assert documents["bar"]["encodes_images_every_query"]
    assert not documents["zip"]["encodes_images_every_query"]
    assert documents["zip"]["presets"]["published"] == {"augment": 16}
    listed = [line.split()[0] for line in ztune("methods").out.splitlines() if line]
    assert listed[1 : 1 + len(METHODS)] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_shows_one_with_every_setting(ztune: Command, name: str) -> None:
    text = ztune("methods", name).out
    assert text.startswith(f"{name}: {METHODS[name].title}\n")
    for setting in dataclasses.fields(METHODS[name].config):
        assert f"\n{setting.name} " in text


def test_methods_knows_no_other(ztune: Command) -> None:
    result = ztune("methods", "best")
    assert result.code == 1
    assert result.err == f'error: unknown method "best"; known: {", ".join(METHODS)}\n'

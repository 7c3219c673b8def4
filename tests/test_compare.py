"""`ztune compare` and `ztune methods` on the embedded bundle and a few real digits."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, MINI, Command, copy_digits
from ztune.cli.main import main
from ztune.experiments.compare import CompareConfig, plan_of
from ztune.experiments.isolated import exit_reason
from ztune.experiments.prepare import CellFilter, Preparation
from ztune.methods.base import HeadMethod
from ztune.methods.registry import METHODS
from ztune.progress import SILENCE
from ztune.run_config import RunConfig

pytestmark = pytest.mark.usefixtures("quick_figures")

CELLS = [(method, seed) for method in ("zip", "gda") for seed in (1, 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three classes of sixteen digits: 2 shots, 2 for validation, 8 to test on."""
    return copy_digits(tmp_path_factory.mktemp("data") / "digits", 16, ("one", "two", "three"))


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


def run_of(out: Path, method: str, seed: int) -> Path:
    return out / str(cells_of(out)[method, seed]["run"])


def test_every_number_of_a_cell_is_its_runs(finished: Path, ztune: Command) -> None:
    cells = cells_of(finished)
    for method, seed in CELLS:
        cell, path = cells[method, seed], run_of(finished, method, seed)
        run = read(path / "run.json")
        assert (run["method"], run["seed"], run["status"]) == (method, seed, "finished")
        for name in ("queries", "text_forwards", "result_bytes", "stop_reason"):
            assert cell[name] == run[name], name
        assert cell["own_seconds"] == pytest.approx(run["seconds"] - run["report_seconds"], abs=0.1)
        assert run["peak_memory_mb"] <= cell["own_peak_memory_mb"] + 0.1
        split = next((finished / "splits").iterdir())
        words = ("eval", MINI, "--split-file", split, "--quiet", "--json")
        scored = ztune(*words, "--prompt", path).json
        assert cell["accuracy"] == scored["accuracy"]
        assert cell["zero_shot_accuracy"] == ztune(*words).json["accuracy"]
        assert cell["n_test"] == scored["n"] == 24
    assert cells["zip", 1]["queries"] == 40
    assert cells["gda", 1]["queries"] == cells["gda", 1]["text_forwards"] == 0


def test_images_are_encoded_once_and_charged_to_all(finished: Path) -> None:
    document = read(finished / "compare.json")
    rate, memory = (document["images"][k] for k in ("seconds_per_image", "peak_memory_mb"))
    assert rate > 0
    for cell in (cells_of(finished)[key] for key in CELLS):
        assert cell["image_forwards"] == cell["image_forwards_cached"] == 3 * 4
        assert cell["seconds"] == pytest.approx(cell["own_seconds"] + 12 * rate, abs=0.002)
        assert cell["peak_memory_mb"] == max(cell["own_peak_memory_mb"], memory)


def test_methods_share_a_seeds_images(finished: Path) -> None:
    splits = {key: read(run_of(finished, *key) / "split.json")["entries"] for key in CELLS}
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
    assert len([*(finished / "runs").iterdir()]) == len(CELLS)
    assert document["counts"] == {"classes": 3, "train": 6, "val": 6, "test": 24}
    text = (finished / "compare.md").read_text()
    listed = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert listed == ["method", "---", *(row["method"] for row in rows)]
    assert "| sharpzo | failed | – | – | – | 0 of 2 |" in text
    assert "- sharpzo failed with seeds 1, 2: " in text
    assert "- gda needs text features, image features." in text
    assert f"`ztune compare {MINI}" in text
    for name in ("accuracy-queries.png", "accuracy-seconds.png"):
        assert (finished / name).stat().st_size > 10_000


def test_the_same_command_goes_on(ztune: Command, data: Path, copied: Path) -> None:
    before = cells_of(copied)
    run = run_of(copied, "zip", 2)
    prompt = (run / "prompt.safetensors").read_bytes()
    untouched = run_of(copied, "zip", 1) / "run.json"
    written = untouched.stat().st_mtime_ns
    shutil.rmtree(run.parent)
    with contextlib.closing(sqlite3.connect(copied / "results.sqlite")) as store, store:
        store.execute("DELETE FROM cells WHERE outcome LIKE ?", [f"%{run.parent.name}%"])
    result = ztune(*words(data, copied, "--json"))
    assert result.code == 0, result.err
    assert "4 requested: 3 finished, 1 to do" in result.err
    assert "zip, seed 2: test " in result.err
    assert (run / "prompt.safetensors").read_bytes() == prompt
    assert untouched.stat().st_mtime_ns == written
    after = {(c["method"], c["seed"]): c for c in result.json["cells"]}
    assert after["zip", 1] == before["zip", 1]
    assert after["zip", 2]["accuracy"] == before["zip", 2]["accuracy"]
    assert result.json == read(copied / "compare.json")
    lines = ztune(*words(data, copied)).out.splitlines()
    shown = [line.split()[0] for line in lines[2 : 2 + len(result.json["table"])]]
    assert shown == [row["method"] for row in result.json["table"]]


@pytest.mark.usefixtures("cells_here")
def test_a_failed_cell_is_told_and_tried_again(ztune: Command, data: Path, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(data, tmp_path / "photos"))
    out = tmp_path / "out"
    whole = next((DIGITS / "four").iterdir()).read_bytes()
    for n in range(8):  # some are drawn for testing
        (photos / "one" / f"broken-{n}.png").write_bytes(whole[: 100 + n])
    result = ztune(*words(photos, out, "--quiet", "--test-fraction", 0.5))
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: 4 of 4 cell(s) failed")
    assert "gda failed with seed" in result.out
    cell = cells_of(out)["gda", 1]
    assert cell["status"] == "failed"
    assert "broken-" in cell["reason"]
    skipped = ztune(*words(photos, out, "--quiet", "--test-fraction", 0.5, "--skip-broken"))
    assert skipped.code == 0, skipped.err
    assert cells_of(out)["gda", 1]["status"] == "finished"


def test_a_killed_process_is_a_failed_cell(
    ztune: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    program = "ztune.experiments.isolated._PROGRAM"
    with monkeypatch.context() as patched:
        patched.setattr(program, "import os; os.kill(os.getpid(), 9)")
        result = ztune(*words(data, out, "--quiet", methods="gda"))
    assert result.code == 1
    assert "gda failed with seeds 1, 2: killed by signal 9 (out of memory?)" in result.out
    assert ztune(*words(data, out, "--quiet", methods="gda")).code == 0


@pytest.mark.usefixtures("cells_here")
def test_methods_and_seeds_may_be_added(ztune: Command, data: Path, copied: Path) -> None:
    more = ("--methods", "zip,zero-shot,gda", "--seeds", "1,2,3", "--json")
    result = ztune(*words(data, copied)[:-4], *more)
    assert result.code == 0, result.err
    assert "9 requested: 4 finished, 5 to do" in result.err
    rows = {row["method"]: row for row in result.json["table"]}
    assert [rows[name]["seeds"] for name in ("zip", "zero-shot", "gda")] == [[1, 2, 3]] * 3
    (cell,) = (c for c in result.json["cells"] if (c["method"], c["seed"]) == ("zero-shot", 2))
    assert cell["accuracy"] == cell["zero_shot_accuracy"]


@pytest.mark.usefixtures("cells_here")
def test_other_settings_and_images_are_other_cells(
    ztune: Command, data: Path, copied: Path, tmp_path: Path
) -> None:
    for more in (("--queries", 60), ("--set", "zip.rank=2")):
        result = ztune(*words(data, copied, *more, methods="zip"))
        assert result.code == 0, result.err
        assert "2 requested: 0 finished, 2 to do" in result.err
        assert "belong to no plan and are kept" in result.err
    again = ztune(*words(data, copied, methods="zip"))
    assert "2 requested: 2 finished, 0 to do" in again.err
    other = Path(shutil.copytree(data, tmp_path / "other"))
    next(iter((other / "one").iterdir())).unlink()
    result = ztune(*words(other, copied, methods="gda"))
    assert "2 requested: 0 finished, 2 to do" in result.err


@pytest.mark.usefixtures("cells_here")
def test_test_images_of_another_folder(ztune: Command, data: Path, tmp_path: Path) -> None:
    out, tested = tmp_path / "out", tmp_path / "tested"
    for name in ("one", "two", "three"):
        (tested / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[20:25]:
            shutil.copy(image, tested / name)
    result = ztune(*words(data, out, "--test-data", tested, "--json", methods="gda"))
    assert result.code == 0, result.err
    assert result.json["counts"] == {"classes": 3, "train": 6, "val": 6, "test": 15}
    run = tmp_path / "run"
    single = ("--method", "gda", "--shots", 2, "--seed", 1, "--test-data", tested, "--out", run)
    assert ztune("tune", MINI, "--data", data, *single).code == 0
    cell = next(c for c in result.json["cells"] if c["seed"] == 1)
    assert ztune("eval", run, "--json").json["accuracy"] == cell["accuracy"]


def test_a_comparison_of_an_older_version_is_left_alone(
    ztune: Command, data: Path, tmp_path: Path
) -> None:
    old = tmp_path / "compare.json"
    shutil.copy(Path(__file__).parent / "old_files" / "compare.json", old)
    before = old.read_bytes()
    result = ztune(*words(data, tmp_path, "--quiet"))
    assert result.code == 1
    assert "is a comparison of another version of ztune" in result.err
    assert "use another --out" in result.err
    assert [file.name for file in tmp_path.iterdir()] == ["compare.json"]
    assert old.read_bytes() == before


@pytest.mark.usefixtures("cells_here")
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
    assert not [*out.rglob("run.json")]


@pytest.mark.usefixtures("cells_here")
def test_capabilities_are_those_of_the_settings(ztune: Command, data: Path, tmp_path: Path) -> None:
    options = ("--shots", 2, "--seeds", 1, "--methods", "bptvlm", "--queries", 15, "--quiet")
    out, text_alone = tmp_path / "out", ("--set", "bptvlm.part=text")
    result = ztune("compare", MINI, "--data", data, "--out", out, *options, *text_alone, "--json")
    assert result.code == 0, result.err
    assert result.json["capabilities"] == {"bptvlm": "losses, text prompts as embeddings"}
    assert result.json["cells"][0]["image_forwards"] == 12


@pytest.mark.usefixtures("cells_here")  # not in the process that is interrupted
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_interrupted_cell_is_taken_up_again(
    ztune: Command, data: Path, tmp_path: Path, name: str
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    out = tmp_path / "out"
    common = ("--shots", 2, "--queries", 4000, "--seeds", 1, "--methods", "zip")
    command = ["compare", MINI, "--data", data, "--out", out, *common]
    compare = subprocess.Popen(
        [sys.executable, "-m", "ztune.cli.main", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size > 5000 for file in out.rglob("history.jsonl")):
        assert compare.poll() is None, compare.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(compare.pid, getattr(signal, name))
    _, said = compare.communicate(timeout=120)
    assert compare.returncode == 130
    assert said.splitlines()[-1] == "error: stopped (resume with the same command)"
    (run,) = out.rglob("run.json")
    assert read(run)["status"] == "running"  # it was interrupted, not killed
    n_steps = (run.parent / "history.jsonl").read_text().count("\n")
    assert not [*out.rglob("attempts")]
    result = ztune(*command, "--quiet", "--json")
    assert result.code == 0, result.err
    assert result.json["cells"][0]["queries"] == 4000
    assert read(run)["status"] == "finished"
    assert (run.parent / "history.jsonl").read_text().count("\n") > n_steps


def test_a_gate_is_forced_where_there_is_one(data: Path, tmp_path: Path) -> None:
    base = RunConfig(str(MINI), str(data), shots=2, force=True)
    config = CompareConfig(base, ("ogn", "zip", "gda", "ogn-context"), (1,), 15, {})
    plan = plan_of(config, tmp_path)
    jobs = Preparation(plan, CellFilter(), None, tmp_path, "cpu", SILENCE).prepare().jobs
    forced = {job.run_config.method: job.run_config.force for job in jobs}
    assert forced == {"ogn": False, "gda": False, "zip": True, "ogn-context": True}


def test_a_preset_has_its_views_and_pixels_their_budget() -> None:
    base = RunConfig(str(MINI), "photos", preset="published", queries=500)
    config = CompareConfig(base, ("zip", "gda", "bar"), (1,), 15, {})
    assert config.method_plan("zip").views == 16
    assert config.method_plan("gda").views == 10
    assert [config.method_plan(name).queries for name in ("zip", "bar")] == [500, 15]


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
        (("--test-fraction", 0), ("no test set: --test-fraction is 0",)),
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


def test_methods_shows_the_area_of_unusual_crops(ztune: Command) -> None:
    said = "crops of at least 0.5 of an image"
    assert f"\npreset published: augment 10, {said}\n" in ztune("methods", "gda").out
    assert said in ztune("methods", "sharpzo").out
    assert "crops" not in ztune("methods", "zip").out


def test_methods_knows_no_other(ztune: Command) -> None:
    result = ztune("methods", "best")
    assert result.code == 1
    assert result.err == f'error: unknown method "best"; known: {", ".join(METHODS)}\n'

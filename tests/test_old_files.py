"""Files of older versions, as written then (tests/old_files/): they read, score and resume."""

import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import DIGITS, MINI, Command
from ztune.data.parquet import extracted_below
from ztune.experiments.store import Store
from ztune.io.schema import current
from ztune.io.tensors import read_tensors, write_tensors
from ztune.types import Json

OLD = Path(__file__).parent / "old_files"
EXPECTED = json.loads((OLD / "expected.json").read_text())
KINDS = ["context", "mixture", "border", "decoder", "tokens", "head", "kernel"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the images that the old files were made with."""
    root = tmp_path_factory.mktemp("old") / "digits"
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:16]:
            shutil.copy(image, root / name)
    return root


def restored(name: str, data: Path, out: Path) -> Path:
    """Return a copy of an old file or folder whose paths lead to what is there now."""
    place = out / name
    if (OLD / name).is_dir():
        shutil.copytree(OLD / name, place)
    else:
        shutil.copy(OLD / name, place)
    for file in [place] if place.is_file() else place.rglob("*.json"):
        text = file.read_text()
        for word, path in (("@DATA@", data), ("@MINI@", MINI), ("@OUT@", out)):
            text = text.replace(word, str(path))
        file.write_text(text)
    return place


def require_equal(found: object, expected: object) -> None:
    """Compare figures; another processor may classify an image of the 24 in another way."""
    assert isinstance(found, dict)
    assert isinstance(expected, dict)
    assert found["n"] == expected["n"] == 24
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1.1 / 24)
    assert set(found["per_class"]) == set(expected["per_class"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_artifact_scores_as_it_did(
    kind: str, data: Path, ztune: Command, tmp_path: Path
) -> None:
    split = restored("split.json", data, tmp_path)
    prompt = OLD / "artifacts" / f"{kind}.safetensors"
    done = ztune("eval", MINI, "--prompt", prompt, "--split-file", split, "--quiet", "--json")
    assert done.code == 0, done.err
    require_equal(done.json, EXPECTED[kind])


def test_an_old_run_that_is_finished_scores_as_it_did(
    data: Path, ztune: Command, tmp_path: Path
) -> None:
    run = restored("finished", data, tmp_path)
    scored = ztune("eval", run, "--snapshots", "--quiet", "--json")
    assert scored.code == 0, scored.err
    require_equal(scored.json, EXPECTED["finished"])
    for found, expected in zip(scored.json["curve"], EXPECTED["finished"]["curve"], strict=True):
        assert (found["queries"], found["seconds"]) == (expected["queries"], expected["seconds"])
    again = ztune("tune", "--resume", run, "--json")
    assert again.code == 0, again.err
    assert again.json["queries"] == 120


def test_an_old_run_that_was_stopped_resumes_to_the_same_result(
    data: Path, ztune: Command, tmp_path: Path
) -> None:
    run = restored("stopped", data, tmp_path)
    done = ztune("tune", "--resume", run, "--json")
    assert done.code == 0, done.err
    assert done.json["queries"] == 120
    found, _ = read_tensors(run / "prompt.safetensors", "resumed")
    expected, _ = read_tensors(OLD / "finished" / "prompt.safetensors", "expected")
    same_machine = "changed since the run started" not in done.err
    for name in ("context", "text_features", "logit_scale", "logit_bias"):
        if same_machine:
            assert np.array_equal(found[name], expected[name])
        assert np.allclose(found[name], expected[name], atol=1e-3)
    assert (run / "history.jsonl").read_text().count("\n") == (
        OLD / "finished" / "history.jsonl"
    ).read_text().count("\n")


def test_an_old_bench_reports_and_resumes(data: Path, ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(OLD / "bench", tmp_path, dirs_exist_ok=True)
    out.mkdir()
    shutil.move(tmp_path / "results.sqlite", out)
    shutil.copytree(data, tmp_path / "digits")
    shutil.copytree(MINI, tmp_path / "mini")
    reported = ztune("bench", "report", out)
    assert reported.code == 0, reported.err
    keys = Store(out / "results.sqlite").finished()
    before = Store(out / "results.sqlite").view("plan")
    assert len(keys) == 2
    words = ("bench", tmp_path / "plan.toml", "--out", out, "--provider", "cpu", "--resume")
    done = ztune(*words, "--json")
    assert done.code == 0, done.err
    assert (done.json["finished"], done.json["failed"]) == (4, 0)
    after = Store(out / "results.sqlite").view("plan")
    assert after.n_left_out == 2  # images are read by another rule now, so they are run again
    assert keys < Store(out / "results.sqlite").finished()
    kept = {result.cell: result.outcome for result in after.results}
    for result in before.results:
        now = kept[result.cell]
        assert now is not None
        if result.outcome is not None:
            found, expected = now.scores[0].accuracy, result.outcome.scores[0].accuracy
            assert found == pytest.approx(expected, abs=0.1)


def test_an_old_classifier_classifies(data: Path, ztune: Command, tmp_path: Path) -> None:
    new, old = tmp_path / "new.onnx", tmp_path / "old.onnx"
    prompt = OLD / "artifacts" / "context.safetensors"
    assert ztune("pack", MINI, "--prompt", prompt, "--out", new).code == 0
    model = onnx.load(str(new))
    (entry,) = (entry for entry in model.metadata_props if entry.key == "ztune")
    entry.value = (OLD / "classifier.json").read_text()
    assert model.metadata_props.pop().key == "sha256"  # which it did not have
    onnx.save(model, str(old))
    split = restored("split.json", data, tmp_path)
    figures = [
        ztune("eval", packed, "--split-file", split, "--split", "all", "--quiet", "--json").json
        for packed in (old, new)
    ]
    assert figures[0] == figures[1]
    test = ztune("eval", old, "--split-file", split, "--quiet", "--json").json
    require_equal(test, EXPECTED["context"])


def test_an_old_run_on_a_server_is_translated() -> None:
    old: dict[str, Json] = {
        "format": "ztune-run",
        "version": 1,
        "calls": {"candidates": 10, "pictures": "kept by the server"},
        "server": {"url": "triton://a/b", "gives": ["loss"]},
        "request": {"queries": 5},
    }
    assert current(old, "ztune-run", 2, "x") == {
        "calls": {"candidates": 10, "pictures": "kept by the server"},
        "server": {"url": "triton://a/b", "capabilities": ["loss"]},
        "run_config": {"queries": 5},
    }
    damaged: dict[str, Json] = {**old, "server": 3}
    assert current(damaged, "ztune-run", 2, "x")["server"] == 3  # named where it is read


def test_a_runs_extractor_moves_to_the_settings_of_its_method() -> None:
    def upgraded(run_config: Json) -> Json:
        old: dict[str, Json] = {"format": "ztune-run", "version": 2, "run_config": run_config}
        return current(old, "ztune-run", 3, "x")["run_config"]

    assert upgraded({"queries": 5, "extractor": None}) == {"queries": 5}
    assert upgraded({"extractor": "/e.onnx", "settings": {"clip": "true"}}) == {
        "settings": {"clip": "true", "extractor": "/e.onnx"}
    }
    assert upgraded(3) == 3  # named where it is read
    assert upgraded({"extractor": "x", "settings": 3}) == {"settings": 3}


def test_images_that_were_extracted_once_are_used(tmp_path: Path) -> None:
    assert extracted_below(tmp_path).name == "parquet-images"
    (tmp_path / "parquet-pictures").mkdir()
    assert extracted_below(tmp_path).name == "parquet-pictures"


def test_a_newer_version_is_refused_in_one_line(data: Path, ztune: Command, tmp_path: Path) -> None:
    run = restored("finished", data, tmp_path)
    bundle = Path(shutil.copytree(MINI, tmp_path / "bundle"))
    prompt = tmp_path / "prompt.safetensors"
    arrays, metadata = read_tensors(OLD / "artifacts" / "head.safetensors", "artifact")
    write_tensors(prompt, arrays, {**metadata, "version": 9})
    for file in (run / "run.json", bundle / "bundle.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 9}))
    split = restored("split.json", data, tmp_path)
    context = OLD / "artifacts" / "context.safetensors"
    packed = tmp_path / "newer.onnx"
    assert ztune("pack", MINI, "--prompt", context, "--out", packed).code == 0
    model = onnx.load(str(packed))
    (entry,) = (entry for entry in model.metadata_props if entry.key == "ztune")
    entry.value = json.dumps({**json.loads(entry.value), "version": 9})
    model.metadata_props.pop()  # the digest of the file
    onnx.save(model, str(packed))
    newer_split = tmp_path / "newer.json"
    newer_split.write_text(json.dumps({**json.loads(split.read_text()), "version": 9}))
    bench = Path(shutil.copytree(OLD / "bench", tmp_path / "bench"))
    with contextlib.closing(sqlite3.connect(bench / "results.sqlite")) as database:
        database.execute("PRAGMA user_version = 9")
    commands = (
        ("eval", run),
        ("predict", packed, data / "one"),
        ("eval", MINI, "--prompt", context, "--split-file", newer_split),
        ("bench", "report", bench),
        ("tune", "--resume", run),
        ("eval", bundle, "--data", data, "--split", "all"),
        ("eval", MINI, "--prompt", prompt, "--split-file", split),
    )
    for words in commands:
        done = ztune(*words)
        assert done.code == 1
        last = done.err.splitlines()[-1]
        assert re.search(r"format version 9 is newer than this ztune reads \(\d\); upgrade", last)

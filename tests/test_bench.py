"""`ztune bench`: plans run here, in processes and on Ray; killed, and resumed."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import MINI, ROOT, Command, copy_digits
from ztune.cli.main import main
from ztune.data.folders import read_dataset
from ztune.data.split import SplitSettings
from ztune.data.splitter import make_split
from ztune.dataset import Dataset
from ztune.errors import ConfigError
from ztune.experiments.bench import run_plan
from ztune.experiments.store import Result, Store
from ztune.experiments.worker import MAX_ATTEMPTS, _earlier_attempts
from ztune.run import RunFolder

PLAN = """
title = "Three digits"
seeds = [1, 2]
queries = 60
curve = 3
[models]
mini = "{bundle}"
[data]
digits = {{ path = "{data}", template = "a photo of the digit {{}}." }}
again = {{ path = "{data}", template = "the digit {{}}" }}
[methods]
zip = {{}}
gda = {{}}
ogn = {{}}
bar = {{ queries = 12 }}
[[protocols]]
kind = "few-shot"
data = ["digits"]
shots = [1, 2]
methods = ["zip", "gda", "ogn"]
[[protocols]]
kind = "base-to-new"
data = ["digits"]
shots = [2]
methods = ["zip", "gda", "bar"]
[[protocols]]
kind = "cross-data-set"
source = "digits"
targets = ["again"]
shots = [2]
methods = ["zip", "bar"]
[[protocols]]
kind = "out-of-distribution"
source = "digits"
targets = ["again"]
shots = [2]
methods = ["zip", "gda"]
"""
pytestmark = pytest.mark.usefixtures("quick_figures")
StartBench = Callable[..., "subprocess.Popen[str]"]
N_CELLS = 12 + 6 + 4 + 4
"""Few-shot, base-to-new and the two transfers."""
N_RUNS = 12 + 6 + 2
"""Transfers share runs with each other, and with few-shot where that has the method."""
WORKERS: list[tuple[object, ...]] = [("--workers", 2), ("--workers", 2, "--ray", "local")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return four classes of twelve digits."""
    names = ("one", "two", "three", "four")
    return copy_digits(tmp_path_factory.mktemp("data") / "digits", 12, names)


@pytest.fixture(scope="module")
def plan(data: Path) -> Path:
    path = data.parent / "plan.toml"
    path.write_text(PLAN.format(bundle=MINI, data=data))
    return path


@pytest.fixture(scope="module")
def serial(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the whole plan, run in this process."""
    out = tmp_path_factory.mktemp("bench") / "serial"
    assert main(["bench", str(plan), "--out", str(out), "--provider", "cpu", "--quiet"]) == 0
    return out


@pytest.fixture
def copied(serial: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(serial, tmp_path / "out"))


def results(out: Path) -> tuple[Result, ...]:
    return Store.existing(out / "results.sqlite").view("plan").results


def repeatable(out: Path) -> dict[str, object]:
    """Return all that must not differ between two ways to run a plan."""
    found: dict[str, object] = {}
    for one in results(out):
        assert one.outcome is not None, f"{one.cell}: {one.reason}"
        found[str(one.cell)] = one.outcome.repeatable()
    return found


def artifacts(out: Path) -> dict[str, bytes]:
    """Return the bytes of every run's result."""
    files = (out / "runs").glob("*/run/prompt.safetensors")
    return {file.parent.parent.name: file.read_bytes() for file in files}


def ended(out: Path) -> dict[str, int]:
    """Return when each run's result was written."""
    files = (out / "runs").glob("*/run/prompt.safetensors")
    return {file.parent.parent.name: file.stat().st_mtime_ns for file in files}


def words_of(plan: Path, out: Path, *more: object) -> list[str]:
    common = ("-m", "ztune.cli.main", "bench", plan, "--out", out, "--provider", "cpu")
    return [sys.executable, *(str(word) for word in (*common, *more))]


@pytest.fixture
def start_bench() -> Iterator[StartBench]:
    """Start benches in their own processes, killed after the test."""
    children: list[subprocess.Popen[str]] = []

    def begin(plan: Path, out: Path, *more: object) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            words_of(plan, out, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        children.append(child)
        return child

    yield begin
    for child in children:
        if child.poll() is None:
            _kill([child.pid])
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def wait_for(happens: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def n_finished(out: Path) -> int:
    path = out / "results.sqlite"
    return len(Store.existing(path).finished()) if path.exists() else 0


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def workers_of(pid: int) -> list[int]:
    """Return the processes below one that perform tasks."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.Error:
            continue
        # Ray's own processes name its workers too, among their options.
        if any("popen_loky" in word for word in words) or words[:1] == ["ray::Worker.perform"]:
            found.append(child.pid)
    return found


def test_every_cell_of_every_protocol_has_its_figures(serial: Path, plan: Path) -> None:
    found = results(serial)
    assert len(found) == N_CELLS
    assert len(artifacts(serial)) == N_RUNS
    n_tested = len(Dataset.from_folder(plan.parent / "digits").split(shots=1)[1])
    for one in found:
        outcome = one.outcome
        assert outcome is not None
        assert outcome.uses == one.cell.method
        parts = [score.part for score in outcome.scores]
        if one.cell.protocol == "base-to-new":
            assert parts == ["base", "new"]
            assert [score.classes for score in outcome.scores] == [2, 2]
            served = outcome.scores[1].accuracy is not None
            assert served == (one.cell.method != "gda"), "a head serves no new classes"
        else:
            assert parts == (["test"] if one.cell.protocol == "few-shot" else ["again"])
        if one.cell.protocol == "few-shot":
            assert outcome.n_train == 4 * one.cell.shots
            assert outcome.scores[0].n == n_tested
            steps = one.cell.method != "gda"
            assert len(outcome.curve) == (3 if steps else 0)
            assert outcome.queries == (60 if steps else 0)
            if steps:
                assert outcome.curve[-1].accuracy == outcome.scores[0].accuracy


def test_a_cell_is_what_tune_and_eval_say(serial: Path, ztune: Command) -> None:
    """The figures are those of the run's own files, scored again by another way."""
    for one in results(serial):
        outcome = one.outcome
        assert outcome is not None
        if one.cell.protocol != "few-shot" or one.cell.seed != 1:
            continue
        run = serial / "runs" / outcome.run / "run"
        said = ztune("eval", run, "--provider", "cpu", "--json", "--quiet").json
        assert said["accuracy"] == outcome.scores[0].accuracy
        assert said["n"] == outcome.scores[0].n


def test_resuming_a_finished_bench_does_nothing(copied: Path, plan: Path, ztune: Command) -> None:
    before = ended(copied)
    done = ztune("bench", plan, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 0, done.err
    assert f"{N_CELLS} finished, 0 to do" in done.err
    assert ended(copied) == before


@pytest.mark.parametrize("more", [(), *WORKERS])
def test_killed_drivers_and_workers_lose_nothing(
    serial: Path,
    plan: Path,
    tmp_path: Path,
    start_bench: StartBench,
    more: tuple[object, ...],
) -> None:
    """A driver is killed, then a worker of the one that resumes: the same bytes as in one go."""
    out = tmp_path / "out"
    child = start_bench(plan, out, *more)
    wait_for(lambda: n_finished(out) >= 3)
    _kill([child.pid])  # joblib's workers end what they are at, and are waited for
    child.wait()
    recorded = {one.cell: one for one in results(out) if one.outcome}
    times = {one.outcome.run: ended(out)[one.outcome.run] for one in results(out) if one.outcome}
    assert 3 <= len(recorded) < N_CELLS
    child = start_bench(plan, out, "--resume", *more)
    if more:
        wait_for(lambda: n_finished(out) >= len(recorded) + 2)
        victims = workers_of(child.pid)
        assert victims
        _kill(victims[:1])
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert f"{N_CELLS} requested: {len(recorded)} finished" in said
    assert repeatable(out) == repeatable(serial)
    assert artifacts(out) == artifacts(serial)
    later = ended(out)
    assert all(later[run] == moment for run, moment in times.items()), "a finished run ran again"
    for one in results(out):
        if one.cell in recorded:
            assert one == recorded[one.cell]


def test_a_run_that_was_killed_goes_on_from_its_state(
    plan: Path, tmp_path: Path, start_bench: StartBench, ztune: Command
) -> None:
    """A long run is not restarted: its history continues, and its seconds are those of both."""
    out, longer = tmp_path / "out", tmp_path / "plan.toml"
    head, few_shot, *_ = plan.read_text().split("[[protocols]]")
    longer.write_text(f"{head}[[protocols]]{few_shot}".replace("queries = 60", "queries = 4000"))
    only = ("--methods", "zip", "--shots", "2", "--seeds", "1")
    child = start_bench(longer, out, *only)
    wait_for(lambda: bool(list((out / "runs").glob("*/run/state.safetensors"))))
    _kill([child.pid])
    child.wait()
    (state,) = (out / "runs").glob("*/run/state.safetensors")
    run = state.parent
    n_before = len((run / "history.jsonl").read_text().splitlines())
    assert 0 < n_before < 400
    (attempts,) = (out / "runs").glob("*/attempts")
    assert len(attempts.read_text().splitlines()) == 1
    words = ("bench", longer, "--provider", "cpu", *only, "--out")
    assert ztune(*words, out, "--resume").code == 0
    assert not attempts.exists()
    whole = tmp_path / "whole"
    assert ztune(*words, whole).code == 0
    assert artifacts(out) == artifacts(whole)


def test_two_drivers_share_one_folder(
    serial: Path, plan: Path, tmp_path: Path, start_bench: StartBench
) -> None:
    """Each run is made by one of them; together they have all."""
    out = tmp_path / "out"
    first = start_bench(plan, out)
    wait_for((out / "results.sqlite").exists)
    second = start_bench(plan, out, "--resume")
    said = [child.communicate(timeout=300)[0] for child in (first, second)]
    assert repeatable(out) == repeatable(serial), said
    assert artifacts(out) == artifacts(serial)


def place_of(out: Path, method: str) -> Path:
    """Return the folder of the first run of a method."""
    one = next(one for one in results(out) if one.cell.method == method)
    assert one.outcome is not None
    return out / "runs" / one.outcome.run


def emptied(out: Path, method: str) -> Path:
    """Empty the folder of the first run of a method; return it."""
    place = place_of(out, method)
    shutil.rmtree(place)
    place.mkdir()
    return place


def forget(out: Path) -> None:
    """Leave the runs, as if a driver had been killed before it recorded anything."""
    (out / "results.sqlite").unlink()
    Store(out / "results.sqlite")


def test_a_run_that_another_process_is_at_is_waited_for(
    plan: Path, start_bench: StartBench, copied: Path
) -> None:
    place = emptied(copied, "bar")
    forget(copied)
    with RunFolder(place).locked():
        child = start_bench(plan, copied, "--resume")
        wait_for(lambda: n_finished(copied) == N_CELLS - 1)
        time.sleep(1.5)
        assert child.poll() is None, "it waits"
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert "waiting for another process that has 1 run(s)" in said
    assert all(one.outcome for one in results(copied))


def test_a_folder_without_locks_is_said(
    plan: Path, tmp_path: Path, ztune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ztune.run._lock", refuse)
    only = ("--methods", "gda", "--seeds", "1", "--shots", "1", "--provider", "cpu")
    done = ztune("bench", plan, "--out", tmp_path / "out", *only)
    assert done.code == 1
    assert "cannot be locked: No locks available" in done.out


def test_an_outcome_that_does_not_read_is_scored_again(
    copied: Path, plan: Path, ztune: Command, serial: Path
) -> None:
    for file in (copied / "runs").glob("*/*.json"):
        file.write_text("{}")
    forget(copied)
    times = ended(copied)
    assert ztune("bench", plan, "--out", copied, "--resume", "--provider", "cpu").code == 0
    assert repeatable(copied) == repeatable(serial)
    assert ended(copied) == times


def test_a_plan_of_the_same_name_takes_the_place_of_another(
    copied: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    other = tmp_path / "plan.toml"
    other.write_text(plan.read_text().replace("Three digits", "Other words"))
    done = ztune("bench", other, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 0
    assert '"Other words" replaces "Three digits" in the report' in done.err


def spoilt(data: Path) -> str:
    """Break an image so that seed 1 tunes with it and seed 2 does not; return its path."""
    path = "one/" + next((data / "one").iterdir()).name
    listing = read_dataset(data)
    for n in range(1000):
        (data / path).write_text(f"no image {n}")
        first, second = (
            {e.path: e.role for e in make_split(listing, SplitSettings(1, seed=seed)).entries}
            for seed in (1, 2)
        )
        if first.get(path) == "train" and path not in second:
            return path
    raise AssertionError("no content is drawn so")


def test_a_failed_cell_is_recorded_and_the_others_go_on(
    data: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "digits"))
    own = tmp_path / "plan.toml"
    own.write_text(plan.read_text().replace(str(data), str(broken)))
    path = spoilt(broken)
    out = tmp_path / "out"
    more = ("--shots", "1", "--provider", "cpu")
    done = ztune("bench", own, "--out", out, *more)
    assert done.code == 1
    failed = [one for one in results(out) if one.reason]
    assert {one.cell.seed for one in failed} == {1}
    assert all(path in one.reason for one in failed)
    assert sum(one.outcome is not None for one in results(out)) == 3
    assert f"failed: {failed[0].cell}" in done.out
    assert (out / "report" / "plan" / "report.md").read_text().count(failed[0].reason)
    shutil.copy(data / path, broken / path)
    done = ztune("bench", own, "--out", out, "--resume", *more)
    assert done.code == 0, done.err


def test_one_cells_failure_is_not_anothers(
    data: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    """Two cells share a run, and one of them has a target with a broken image."""
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    head = plan.read_text().split("[[protocols]]")[0]
    text = head.replace("[methods]", f'broken = {{ path = "{broken}" }}\n[methods]')
    for target in ("again", "broken"):
        kind = "cross-data-set" if target == "again" else "out-of-distribution"
        text += f'[[protocols]]\nkind = "{kind}"\nsource = "digits"\ntargets = ["{target}"]\n'
        text += 'shots = [2]\nseeds = [1]\nmethods = ["zip"]\n'
    own, out = tmp_path / "plan.toml", tmp_path / "out"
    own.write_text(text)
    for image in broken.rglob("*.png"):
        image.write_bytes(image.read_bytes()[:40] + image.name.encode())
    assert ztune("bench", own, "--out", out, "--provider", "cpu").code == 1
    good, bad = results(out)
    assert good.outcome is not None
    assert bad.reason
    assert len(list((out / "runs").iterdir())) == 1


def test_a_run_keeps_what_a_later_cell_draws_its_curve_from(
    plan: Path, tmp_path: Path, ztune: Command, serial: Path
) -> None:
    out, own = tmp_path / "out", tmp_path / "plan.toml"
    head, *protocols = plan.read_text().split("[[protocols]]")
    own.write_text("[[protocols]]".join([head, protocols[2]]))
    only = ("--methods", "zip", "--seeds", "1", "--provider", "cpu")
    assert ztune("bench", own, "--out", out, *only).code == 0
    times = ended(out)
    own.write_text(plan.read_text())
    done = ztune("bench", own, "--out", out, "--resume", "--shots", "2", *only)
    assert done.code == 0, done.err
    assert ended(out).items() >= times.items()
    expected = repeatable(serial)
    for one in results(out):
        if one.outcome:
            assert one.outcome.repeatable() == expected[str(one.cell)]


def test_names_are_no_part_of_a_result(copied: Path, plan: Path, ztune: Command) -> None:
    plan = Path(shutil.copy(plan, copied.parent / "plan.toml"))
    text = plan.read_text().replace("gda", "mine").replace("mine = {", 'mine = { uses = "gda" ')
    plan.write_text(text)
    words = ("--out", copied, "--resume", "--provider", "cpu", "--model", f"other={MINI}")
    done = ztune("bench", plan, *words)
    assert done.code == 0, done.err
    assert f"{N_CELLS} finished, 0 to do" in done.err
    assert {(one.cell.model, one.cell.method) for one in results(copied)} >= {("other", "mine")}


def test_plans_in_one_folder_have_reports_of_their_own(
    copied: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    second = tmp_path / "second.toml"
    text = plan.read_text().replace("Three digits", "Other words")
    second.write_text(text.replace("seeds = [1, 2]", "seeds = [2]"))
    done = ztune("bench", second, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 0, done.err
    assert f"{N_CELLS // 2} of {N_CELLS // 2} cells finished" in done.out
    done = ztune("bench", "report", copied)
    assert done.code == 0
    for name, title in (("plan", "Three digits"), ("second", "Other words")):
        text = (copied / "report" / name / "report.md").read_text()
        assert text.startswith(f"# {title}\n")
        assert str(copied / "report" / name / "report.md") in done.out


@pytest.mark.parametrize("name", ["{}", "../../victim", "", ".", "a/b", "a\\b", "x" * 300])
def test_a_plan_s_name_in_results_is_no_path(
    name: str, copied: Path, tmp_path: Path, ztune: Command
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for file in ("report.md", "accuracy-shots.png"):
        (victim / file).write_text("mine")
    rename(copied, name.format(victim))
    done = ztune("bench", "report", copied, "--out", tmp_path / "deep" / "er")
    assert done.code == 1
    assert done.err.startswith(f'error: report of "{copied}": ')
    assert "invalid file name" in done.err
    assert {file.read_text() for file in victim.iterdir()} == {"mine"}
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("link", ["report", "report/plan"])
def test_a_report_follows_no_link_out_of_its_folder(
    link: str, copied: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    victim = tmp_path / "victim"
    (victim / "plan").mkdir(parents=True)
    shutil.rmtree(copied / link)
    (copied / link).symlink_to(victim)
    again = ("bench", plan, "--out", copied, "--resume", "--provider", "cpu")
    for words in (("bench", "report", copied), again):
        done = ztune(*words)
        assert done.code == 1
        assert "is a link that leaves its folder" in done.err
    assert [path.name for path in victim.rglob("*")] == ["plan"]


def rename(out: Path, plan: str) -> None:
    """Give the one plan of a file of results another name."""
    with contextlib.closing(sqlite3.connect(out / "results.sqlite")) as database:
        database.execute("UPDATE plans SET name = ?", [plan])
        database.execute("UPDATE wanted SET plan = ?", [plan])
        database.commit()


def test_a_wrong_plan_leaves_nothing_behind(plan: Path, tmp_path: Path, ztune: Command) -> None:
    wrong, out = tmp_path / "plan.toml", tmp_path / "out"
    wrong.write_text(plan.read_text().replace("queries = 60", "queries = 1"))
    done = ztune("bench", wrong, "--out", out, "--provider", "cpu")
    assert done.code == 1
    assert "less than" in done.err
    assert not out.exists()


def test_the_smoke_plan_runs(tmp_path: Path, ztune: Command) -> None:
    """Only its fastest methods, with one seed: the whole takes half a minute."""
    out, some = tmp_path / "out", ("--methods", "gda,lp++", "--seeds", 1)
    done = ztune("bench", ROOT / "plans" / "smoke.toml", "--out", out, *some)
    assert done.code == 0, done.err
    found = Store.existing(out / "results.sqlite").view("smoke").results
    assert sum(one.outcome is not None for one in found) == 9
    assert (out / "report" / "smoke" / "report.md").is_file()


def test_a_run_that_always_kills_its_process_is_given_up(
    copied: Path, plan: Path, ztune: Command
) -> None:
    place = emptied(copied, "zip")
    (place / "attempts").write_text("0 as if killed\n" * MAX_ATTEMPTS)
    forget(copied)
    words = ("bench", plan, "--out", copied, "--resume", "--provider", "cpu")
    done = ztune(*words)
    assert done.code == 1
    reasons = [one.reason for one in results(copied) if one.reason]
    assert reasons
    assert all(f"died {MAX_ATTEMPTS} times" in reason for reason in reasons)
    assert ztune(*words).code == 0, "a repeated command tries it again"


def test_a_run_that_was_twice_killed_is_tried_alone(
    copied: Path, plan: Path, ztune: Command, serial: Path
) -> None:
    """It may have been another's doing: that of another worker."""
    place = emptied(copied, "zip")
    (place / "attempts").write_text("0 as if killed\n" * (MAX_ATTEMPTS - 1))
    forget(copied)
    done = ztune("bench", plan, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 0, done.err
    assert repeatable(copied) == repeatable(serial)


def test_attempts_that_get_further_are_not_counted(copied: Path, plan: Path) -> None:
    place = place_of(copied, "zip")
    (place / "attempts").write_text("0 as if killed\n" * MAX_ATTEMPTS)
    (place / "run" / "state.safetensors").write_bytes(b"saved since")
    assert _earlier_attempts(place) == []


def test_an_edited_plan_goes_on_with_what_it_shares(
    copied: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    before = ended(copied)
    edited = tmp_path / "plan.toml"
    edited.write_text(plan.read_text().replace("seeds = [1, 2]", "seeds = [2, 3]"))
    done = ztune("bench", edited, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 0, done.err
    assert f"{N_CELLS // 2} finished, {N_CELLS // 2} to do" in done.err
    assert {one.cell.seed for one in results(copied)} == {2, 3}
    later = ended(copied)
    assert all(later[run] == moment for run, moment in before.items())
    assert Store.existing(copied / "results.sqlite").view("plan").n_left_out == N_CELLS // 2


def test_only_some_cells(plan: Path, tmp_path: Path, ztune: Command) -> None:
    out = tmp_path / "out"
    only = ("--methods", "gda", "--seeds", "2", "--shots", "1", "--provider", "cpu")
    assert ztune("bench", plan, "--out", out, *only).code == 0
    done = [one.cell for one in results(out) if one.outcome]
    assert [(cell.method, cell.seed, cell.shots) for cell in done] == [("gda", 2, 1)]


def test_a_plan_runs_in_parts(serial: Path, plan: Path, tmp_path: Path, ztune: Command) -> None:
    """The cells of an earlier command stay in the report of a later one with fewer cells."""
    out = tmp_path / "out"
    only = ("--shots", "1", "--provider", "cpu")
    assert ztune("bench", plan, "--out", out, "--methods", "gda", *only).code == 0
    words = ("--methods", "zip", "--methods", "gda", "--seeds", "2")
    done = ztune("bench", plan, "--out", out, "--resume", *words, *only)
    assert "2 requested: 1 finished, 1 to do" in done.err
    found = {(one.cell.method, one.cell.seed) for one in results(out) if one.outcome}
    assert found == {("gda", 1), ("gda", 2), ("zip", 2)}
    assert f"3 of {N_CELLS} cells finished" in done.out
    assert len(results(out)) == N_CELLS


def test_a_report_mixes_no_results_of_other_images(
    data: Path, plan: Path, tmp_path: Path, ztune: Command
) -> None:
    """Images change, and a command requests some methods only: the others are left for later."""
    own = Path(shutil.copytree(data, tmp_path / "digits"))
    own_plan, out = tmp_path / "plan.toml", tmp_path / "out"
    own_plan.write_text(plan.read_text().replace(str(data), str(own)))
    words = ("bench", own_plan, "--out", out, "--provider", "cpu", "--shots", "1", "--seeds", "1")
    assert ztune(*words, "--methods", "gda,zip").code == 0
    image = sorted(own.rglob("*.png"))[0]
    image.with_name("new.png").write_bytes(image.read_bytes() + b" ")
    done = ztune(*words, "--methods", "gda", "--resume")
    assert done.code == 0
    assert [one.cell.method for one in results(out) if one.outcome] == ["gda"]
    assert "2 result(s) in results.sqlite belong to no plan" in done.err


def test_json_is_one_document(copied: Path, plan: Path, ztune: Command) -> None:
    words = ("--out", copied, "--resume", "--provider", "cpu", "--json", "--quiet")
    document = ztune("bench", plan, *words).json
    assert document["cells"] == document["finished"] == N_CELLS
    assert document["failed"] == 0
    assert all(Path(file).is_file() for file in document["report"])


def test_a_session_says_how_cells_were_made(serial: Path) -> None:
    (session,) = Store.existing(serial / "results.sqlite").view("plan").sessions.values()
    assert (session["executor"], session["workers"]) == ("serial", 1)
    assert isinstance(session["versions"], dict)
    assert "numpy" in session["versions"]


WRONG = [
    (("bench",), 2, "PLAN.toml"),
    (("bench", "no.toml", "--out", "x"), 1, 'plan "no.toml" does not exist'),
    (("bench", "{plan}"), 1, "--out OUT"),
    (("bench", "{plan}", "more", "--out", "x"), 1, "one plan"),
    (("bench", "{plan}", "--out", "{out}"), 1, "--resume"),
    (("bench", "{plan}", "--out", "{empty}/x", "--resume"), 1, "has no results.sqlite"),
    (("bench", "{plan}", "--out", "{empty}/x", "--workers", "0"), 1, "--workers is 0"),
    (
        ("bench", "{plan}", "--out", "{empty}/x", "--gpus", "0.5"),
        1,
        "--gpus applies only with --ray",
    ),
    (("bench", "{plan}", "--out", "{empty}/x", "--ray", "local"), 1, "--provider"),
    (("bench", "{plan}", "--out", "{empty}/x", "--methods", "rgf"), 1, "expected zip, gda"),
    (("bench", "{plan}", "--out", "{empty}/x", "--seeds", "7"), 1, "expected 1, 2"),
    (("bench", "{plan}", "--out", "{empty}/x", "--gpus", "nan", "--ray", "auto"), 1, "expected 0"),
    (("bench", "{plan}", "--out", "{empty}/x", "--gpus", "1.5", "--ray", "auto"), 1, "an integer"),
    (("bench", "{plan}", "--out", "{empty}/x", "--root", "{plan}"), 1, "is not a folder"),
    (("bench", "{plan}", "--out", "{empty}/x", "--model", "={data}"), 1, "invalid name"),
    (("bench", "{plan}", "--out", "{empty}/x", "--model", "a/b={data}"), 1, "invalid name"),
    (("bench", "{plan}", "--out", "{empty}/x", "--model", "a="), 1, "has no bundle"),
    (("bench", "{plan}", "--out", "{data}"), 1, "not empty"),
    (("bench", "report"), 1, "bench report OUT"),
    (
        ("bench", "report", "{empty}"),
        1,
        "is a folder without results.sqlite, expected a folder of results (make one with: ztune",
    ),
    (("bench", "report", str(MINI)), 1, "is a bundle, expected a folder of results"),
    (("bench", "report", "{out}", "--workers", "2"), 1, "leave out --workers"),
]


@pytest.mark.parametrize(("words", "code", "said"), WRONG)
def test_what_is_wrong_is_said(
    serial: Path,
    plan: Path,
    data: Path,
    tmp_path: Path,
    ztune: Command,
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    places = {"plan": plan, "out": serial, "empty": tmp_path, "data": data}
    done = ztune(*(word.format(**places) for word in words))
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err


def test_the_library_runs_parts_of_a_plan(plan: Path, tmp_path: Path) -> None:
    part: dict[str, Any] = {"data": ["digits"], "shots": [2], "seeds": [1], "provider": "cpu"}
    out, models = tmp_path / "out", {"other": MINI}
    results = run_plan(plan, out, methods=["gda"], models=models, **part)
    assert results.n_missing == 0
    rows = [row for row in results.rows() if row["status"] == "finished"]
    found = {(row["protocol"], row["model"], row["method"], row["shots"]) for row in rows}
    protocols = ("few-shot", "base-to-new", "out-of-distribution")
    assert found == {(protocol, "other", "gda", 2) for protocol in protocols}
    assert results.report[0] == out / "report" / "plan" / "report.md"
    with pytest.raises(ConfigError, match="already has results"):
        run_plan(plan, out, methods=["gda"], models=models, **part)
    more = run_plan(plan, out, methods=["gda", "zip"], models=models, resume=True, **part)
    assert {row["method"] for row in more.rows() if row["status"] == "finished"} == {"gda", "zip"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"methods": "gda"}, "`methods` is 'gda', expected a list"),
        ({"shots": 2}, "`shots` is 2, expected a list"),
        ({"seeds": [7]}, '`seeds`: the plan has no "7"'),
        ({"methods": []}, "no cell of the plan matches"),
        ({"models": {"a/b": MINI}}, '`models` "a/b": invalid name'),
        ({"models": {}}, "names no model: give `models`"),
        ({"workers": 0}, "`workers` is 0, expected at least 1"),
        ({"resume": True}, "has no results.sqlite"),
    ],
)
def test_wrong_arguments_of_the_library_run_nothing(
    wrong: dict[str, Any], said: str, plan: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_plan(plan, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_results_of_an_older_version_are_refused(copied: Path, plan: Path, ztune: Command) -> None:
    import sqlite3

    with sqlite3.connect(copied / "results.sqlite") as database:
        database.execute("PRAGMA user_version = 0")
    database.close()
    done = ztune("bench", plan, "--out", copied, "--resume", "--provider", "cpu")
    assert done.code == 1
    assert "version 0 is older" in done.err


def test_an_interrupted_bench_says_how_to_go_on(
    plan: Path, tmp_path: Path, start_bench: StartBench, serial: Path, ztune: Command
) -> None:
    out = tmp_path / "out"
    child = start_bench(plan, out, "--workers", 2)
    wait_for(lambda: n_finished(out) >= 3)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    assert ztune("bench", plan, "--out", out, "--resume", "--provider", "cpu").code == 0
    assert repeatable(out) == repeatable(serial)

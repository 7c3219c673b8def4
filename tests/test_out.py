"""Output folders of runs: existing content, concurrent processes, and full disks."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, FEW_DIGITS, MINI, Command, Result
from ztune.cli.main import main
from ztune.errors import ConfigError, StorageError
from ztune.experiments.store import Store
from ztune.io import files
from ztune.io.files import new_folder, write_bytes
from ztune.loop import Tuning
from ztune.run import RunFolder

pytestmark = pytest.mark.usefixtures("quick_figures")

TUNE = ("tune", MINI, "--data", FEW_DIGITS, "--shots", 2, "--queries", 10, "--quiet")
AWKWARD = "two  spaces, a quote's"


def told(result: Result, *parts: str) -> None:
    assert result.code == 1, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line, line


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")
            if p.is_file()}  # fmt: skip


def set_status(run: Path, status: str) -> None:
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "status": status}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with snapshots."""
    out = tmp_path_factory.mktemp("out") / "run"
    words = (*TUNE, "--out", out, "--queries", 40, "--snapshots", 3)
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / AWKWARD))


def test_a_finished_run_is_said_to_be_finished(ztune: Command, run: Path) -> None:
    before = contents(run)
    result = ztune(*TUNE, "--seed", 2, "--out", run)
    told(result, f'"{run}" is a finished run', "another --out", "replace it with --over")
    assert "--resume" not in result.err
    assert contents(run) == before


def test_an_unfinished_run_is_gone_on_with_or_replaced(ztune: Command, run: Path) -> None:
    set_status(run, "running")
    resume = f"ztune tune --resume {shlex.quote(str(run))}"
    told(ztune(*TUNE, "--out", run), "is an unfinished run", resume, "--overwrite")
    told(ztune("eval", run), "is not finished", resume)
    assert ztune(*shlex.split(resume)[1:], "--quiet").code == 0


def test_overwriting_gives_what_a_new_folder_gives(
    ztune: Command, run: Path, tmp_path: Path
) -> None:
    (run / "notes.txt").write_text("mine")
    (run / "snapshots" / "notes.txt").write_text("mine")
    other = tmp_path / "other"
    assert ztune(*TUNE, "--seed", 2, "--out", other).code == 0
    assert ztune(*TUNE, "--seed", 2, "--out", run, "--overwrite").code == 0
    name = "prompt.safetensors"
    assert (run / name).read_bytes() == (other / name).read_bytes()
    assert json.loads((run / "run.json").read_text())["seed"] == 2
    assert (run / "split.json").read_bytes() == (other / "split.json").read_bytes()
    left = {p.relative_to(run).as_posix() for p in run.rglob("*") if "cache" not in p.parts}
    own = {p.relative_to(other).as_posix() for p in other.rglob("*") if "cache" not in p.parts}
    assert left - own == {"notes.txt", "snapshots", "snapshots/notes.txt"}
    assert own <= left


def test_overwriting_makes_a_run_where_there_is_none(ztune: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ztune(*TUNE, "--out", tmp_path / "empty", "--overwrite").code == 0


def test_what_is_refused_replaces_nothing(ztune: Command, run: Path) -> None:
    before = contents(run)
    for words in (("--queries", 3), ("--shots", 9999), ("--set", "nothing=1")):
        assert ztune(*TUNE, "--out", run, "--overwrite", *words).code == 1
    assert contents(run) == before


def test_nothing_but_runs_is_overwritten(ztune: Command, run: Path, tmp_path: Path) -> None:
    plain, foreign, newer = (tmp_path / name for name in ("plain", "foreign", "newer"))
    shutil.copytree(DIGITS / "one", plain)
    shutil.copytree(DIGITS / "one", foreign)
    (foreign / "run.json").write_text('{"format": "other"}')
    shutil.copytree(run, newer)
    document = json.loads((newer / "run.json").read_text())
    (newer / "run.json").write_text(json.dumps({**document, "version": 99}))
    for folder, said in (
        (plain, "is not a run, and --overwrite only replaces runs"),
        (foreign, "not written by ztune"),
        (newer, "newer than this ztune reads"),
        (MINI, "is not a run"),
        (run / "run.json", "is not a run"),
    ):
        before = contents(folder)
        told(ztune(*TUNE, "--out", folder, "--overwrite"), said)
        assert contents(folder) == before


def test_a_run_that_another_process_is_at_is_left_alone(ztune: Command, run: Path) -> None:
    set_status(run, "running")
    before = contents(run)
    with RunFolder(run).locked():
        for more in ((), ("--overwrite",)):
            told(ztune(*TUNE, "--out", run, *more), "is in use by another process")
    assert contents(run) == before


def test_a_disk_that_is_full_from_the_first_leaves_the_former_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run)

    def full(folder: RunFolder, document: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunFolder, "write", full)
    with (
        pytest.raises(OSError, match="No space"),
        RunFolder(run).create_locked({}, {}, overwrite=True),
    ):
        pass
    assert contents(run) == before


def test_a_stop_while_replacing_is_told(
    ztune: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ztune.run.write_json", stopped_at("split.json"))
        assert ztune(*TUNE, "--seed", 2, "--out", run, "--overwrite").code == 130
    told(ztune("tune", "--resume", run), "was stopped while it was being replaced", "same command")
    assert ztune("eval", run).code == 1
    assert ztune(*TUNE, "--seed", 2, "--out", run).code == 0


def stopped_at(name: str) -> Callable[[Path, dict[str, Any]], None]:
    """Return what writes JSON files until one of that name, where Ctrl-C comes in between."""

    def write(path: Path, document: dict[str, Any]) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        files.write_json(path, document)

    return write


def test_a_new_run_does_not_take_the_signal_of_the_one_before(ztune: Command, run: Path) -> None:
    words = ("--method", "zip", "--queries", 100, "--reference", run / "nowhere")
    assert ztune(*TUNE, *words, "--out", run, "--overwrite").code == 1
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_two_that_begin_at_once(tmp_path: Path, ztune: Command) -> None:
    """The other has made the folder while this one was preparing its own."""
    out = tmp_path / "out"
    with (
        pytest.raises(
            ConfigError, match=r"created by another process \(try again, or name another"
        ),
        new_folder(out),
    ):
        out.mkdir()
        (out / "run.json").touch()
    assert (out / "run.json").exists()
    assert list(tmp_path.iterdir()) == [out]
    for content in ("file", "empty folder"):
        taken = tmp_path / content
        with contextlib.suppress(ConfigError), new_folder(taken) as work:
            (work / "own").touch()
            taken.touch() if content == "file" else taken.mkdir()
        assert taken.is_file() or (taken / "own").is_file()


def test_a_run_that_may_not_be_written(
    ztune: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.name == ".lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    told(ztune("tune", "--resume", run), "cannot be written: Permission denied", "permissions")
    told(ztune(*TUNE, "--out", run), "is a finished run")


ZIP = (*TUNE, "--method", "zip", "--queries", 30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that no full disk has stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([str(word) for word in (*ZIP, "--out", out)]) == 0
    return out


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["state", "prompt", "history", "cache"])
def test_a_full_disk_names_the_file_and_says_how_to_go_on(
    at: str, ztune: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / AWKWARD
    written = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if f".{at}." in path.name:
            full_disk()
        return written(path, content)

    with monkeypatch.context() as patched:
        patched.setattr("ztune.run.SaveSchedule.due", lambda _: True)
        if at == "history":
            patched.setattr(RunFolder, "log", naming_log)
        elif at == "cache":
            patched.setattr(os, "write", full_disk)
        else:
            patched.setattr(Path, "write_bytes", write)
        cache = ("--cache", tmp_path / "cache") if at == "cache" else ()
        result = ztune(*ZIP, *cache, "--out", out)
    name = {"state": "state.safetensors", "prompt": "prompt.safetensors", "history":
            "history.jsonl", "cache": ".features"}[at]  # fmt: skip
    again = f"ztune tune --resume {shlex.quote(str(out))}"
    told(result, name, "No space left on device", f"then resume with: {again})")
    assert ztune(*shlex.split(again)[1:], "--quiet").code == 0
    kept = "prompt.safetensors"
    assert (out / kept).read_bytes() == (whole / kept).read_bytes()


def naming_log(folder: RunFolder, tuning: Tuning, evaluation: object) -> None:
    """Write what a full disk takes of a line."""
    with files.naming(folder.history), folder.history.open("a") as file:
        file.write('{"half')
        file.flush()
        full_disk()


def test_errors_of_writing_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space") as caught:
        write_bytes(tmp_path / "x.json", b"")
    assert caught.value.filename == str(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError) as gone:
        write_bytes(tmp_path / "none" / "x.json", b"")
    assert gone.value.filename == str(tmp_path / "none" / "x.json")


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (("bench", "plans/smoke.toml", "--out"), "with the same command and --resume)"),
        (("compare", MINI, "--data", FEW_DIGITS, "--out"), "then resume with the same command)"),
        (("quantize", MINI, "--out"), "(free some space, then try again)"),
    ],
)
def test_a_full_disk_in_other_verbs(
    words: tuple[object, ...], again: str, ztune: Command, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = {"bench": "bench._run_plan", "compare": "compare._config"}.get(str(words[0]))
    target = f"ztune.cli.{module}" if module else "export.quantize.quantize_bundle"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    monkeypatch.setattr(target, full)
    told(ztune(*words, tmp_path / "x"), '"some/file": No space left on device (free some', again)


def test_a_full_disk_under_the_results_of_a_bench(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.sqlite")
    with (
        pytest.raises(StorageError, match=r"results.sqlite\": database or disk is full \(free som"),
        store._open(),
    ):
        raise sqlite3.OperationalError("database or disk is full")

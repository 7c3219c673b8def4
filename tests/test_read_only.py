"""Runs on a disk that cannot be written, and users without a home folder."""

import errno
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MINI, Command
from ztune.io.files import replacing, user_cache

if sys.platform == "win32":
    pytest.skip("no such file modes", allow_module_level=True)

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def finished(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ztune.cli.main import main

    out = tmp_path_factory.mktemp("finished") / "run"
    words = ("tune", MINI, "--data", few_digits, "--shots", 1, "--method", "zip", "--queries", 20)
    assert main([str(word) for word in (*words, "--quiet", "--out", out)]) == 0
    return out


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every change in a folder fail as on a read-only disk, also for root."""

    def guarded(name: str, is_change: Any) -> None:
        act = getattr(os, name)

        def guard(path: Any, *words: Any, **named: Any) -> Any:
            inside = isinstance(path, str | Path) and Path(path).is_relative_to(folder)
            if inside and is_change(*words):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return act(path, *words, **named)

        monkeypatch.setattr(os, name, guard)

    guarded("open", lambda flags, *_: flags & WRITING)
    for name in ("mkdir", "unlink", "replace", "rename", "truncate", "chmod"):
        guarded(name, lambda *_: True)


@pytest.mark.parametrize("cache", ["empty", "missing", "of the run"])
def test_a_finished_run_on_a_read_only_disk_is_evaluated(
    cache: str, finished: Path, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "disk" / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "disk" / "cache"))
    if cache == "empty":
        (tmp_path / "disk" / "cache" / "ztune" / "features").mkdir(parents=True)
    elif cache == "of the run":  # as earlier versions had it
        (out / "cache").mkdir()
    before = sorted(path for path in out.rglob("*"))
    with monkeypatch.context() as patched:
        make_read_only(tmp_path / "disk", patched)
        done = ztune("eval", out, "--json")
    assert done.code == 0, done.err
    assert done.err.count("features are not kept") == 1
    assert "confusion.png" in done.err
    assert sorted(path for path in out.rglob("*")) == before
    assert ztune("eval", out, "--json").json == done.json


def test_features_that_cannot_be_read_are_encoded_again(
    finished: Path, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = ztune("eval", out, "--json")
    for path in (tmp_path / "ztune" / "features").glob("*.features"):
        path.unlink()
        path.mkdir()
    again = ztune("eval", out, "--json")
    assert (again.code, again.json) == (0, first.json), again.err
    assert again.err.count("features are not kept") == 1


def test_an_evaluation_removes_what_a_killed_one_left(
    finished: Path, ztune: Command, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    left = out / ".confusion.png.ztune-ab12cd34"
    left.touch()
    with replacing(out / "confusion.png") as in_use:
        assert ztune("eval", out).code == 0
        assert in_use.exists()
    assert not left.exists()


HOMES = ("unset", "empty", "relative", "a file", "not there")


def home(kind: str, tmp_path: Path) -> str | None:
    (tmp_path / "file").touch()
    return {
        "unset": None, "empty": "", "relative": "home", "a file": str(tmp_path / "file"),
        "not there": "/proc/nowhere/home",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", HOMES)
def test_a_cache_without_a_home(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    value = home(kind, tmp_path)
    if value is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", value)
    folder = user_cache("clients")
    folder.mkdir()
    assert folder.is_absolute()
    private = tmp_path / f"ztune-{os.getuid()}"
    assert folder.parent == private
    assert private.stat().st_mode & 0o777 == 0o700
    assert user_cache("clients") == folder
    private.chmod(0o777)  # by another user
    assert user_cache("clients").parent != private


def test_a_home_is_used_if_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache("clients") == tmp_path / ".cache" / "ztune" / "clients"


@pytest.mark.parametrize("kind", ["unset", "a file"])
def test_a_run_without_a_home(kind: str, few_digits: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    if (value := home(kind, tmp_path)) is not None:
        environment["HOME"] = value
    words = ("tune", MINI, "--data", few_digits, "--shots", 1, "--val", 0, "--method", "zip",
             "--queries", 10, "--out", tmp_path / "run", "--quiet")  # fmt: skip
    command = [sys.executable, "-m", "ztune.cli.main", *(str(word) for word in words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Matplotlib" not in done.stderr
    assert (tmp_path / "run" / "curve.png").exists()

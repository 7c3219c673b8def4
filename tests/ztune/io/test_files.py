"""Files and JSON: whole or not at all, and nothing that a hostile file holds gets through."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign import NOT_REGULAR
from ztune.budget import Budget
from ztune.cli.run_settings import settings_from_words
from ztune.data.cache import FeatureLog
from ztune.data.manifests import read_class_list, read_names, read_text
from ztune.data.sources import read_source
from ztune.errors import ConfigError, DataError, FormatError, ZtuneError
from ztune.experiments.store import Store
from ztune.io.config import configured
from ztune.io.files import (
    inside,
    new_folder,
    open_regular,
    read_json,
    replacing,
    sha256,
    write_json,
)
from ztune.io.tensors import read_tensors
from ztune.journal import Journal
from ztune.methods.zip import ZipConfig
from ztune.run import RunFolder


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/etc", "../up", "a/b", "a/../../b", "a\\b", "..\\up", "a\0b", "\ud800",
     "x" * 256, "ü" * 128],
)  # fmt: skip
def test_a_name_of_a_file_makes_no_other_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"^somewhere: .*, expected no slash") as caught:
        inside(tmp_path, name, "somewhere")
    assert str(caught.value).isprintable()


def test_a_plain_name_stays_in_its_folder(tmp_path: Path) -> None:
    for name in ("a", "a.b", "..a", " a ", "ü" * 127, "x" * 255, "new"):
        assert inside(tmp_path / "new", name, "") == tmp_path / "new" / name
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "out").symlink_to(other)
    (folder / "up").symlink_to(tmp_path)
    (folder / "round").symlink_to(folder / "round")
    (folder / "own").symlink_to(folder / "a")
    assert inside(folder, "own", "") == folder / "own"
    for name in ("out", "up", "round"):
        with pytest.raises(FormatError, match=f'somewhere: ".*{name}" is a link that leaves'):
            inside(folder, name, "somewhere")
    # The folder itself may be one.
    (tmp_path / "linked").symlink_to(folder)
    assert inside(tmp_path / "linked", "a", "") == tmp_path / "linked" / "a"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(out) as work:
        (work / "file").touch()
        raise RuntimeError
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty one is taken
    with new_folder(out) as work:
        (work / "file").touch()
        assert not (out / "file").exists()
    assert [p.name for p in out.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match="not empty"), new_folder(out):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"[" * 200_000, b'{"a": ' * 100_000]
)
def test_hostile_json_is_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.json"):
        read_json(path, "test")


def test_settings_are_read_as_their_fields_type() -> None:
    words = ["rank=3", "clip=false", "step_size=1e-3", "init=a photo", "n-pairs=2"]
    config = configured(ZipConfig, settings_from_words(words), "zip")
    assert (config.rank, config.clip, config.step_size) == (3, False, 1e-3)
    assert (config.init, config.n_pairs) == ("a photo", 2)
    for word in ("rank=1.5", "clip=perhaps", "step_size=nan", "step_size=inf", "init_std=-inf"):
        with pytest.raises(ConfigError, match="expected"):
            configured(ZipConfig, settings_from_words([word]), "zip")


def test_a_run_is_worked_on_by_one_process(tmp_path: Path) -> None:
    folder, same = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.create({}, {})
    with folder.locked(), pytest.raises(ConfigError, match="another process"), same.locked():
        pass
    with same.locked():
        pass


READERS: list[Callable[[Path], object]] = [
    open_regular,
    sha256,
    lambda path: read_json(path, "test"),
    lambda path: read_text(path, "test"),
    read_names,
    lambda path: FeatureLog(path).read(),
    lambda path: Journal(path, Budget(1)),
    lambda path: read_tensors(path, "test"),
    Store,
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", NOT_REGULAR)
def test_only_regular_files_are_read(
    make: Callable[[Path], None], read: Callable[[Path], object], tmp_path: Path, in_time: None
) -> None:
    make(tmp_path / "a")
    with pytest.raises((OSError, ZtuneError)):
        read(tmp_path / "a")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    assert read_json(tmp_path / "b.json", "test") == {}
    assert sha256(tmp_path / "b.json") == sha256(tmp_path / "a.json")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


@pytest.mark.parametrize("name", ["state.safetensors", "history.jsonl", "sent.jsonl", ".lock"])
@pytest.mark.parametrize("make", NOT_REGULAR)
def test_a_run_of_pipes_and_devices_is_refused(
    make: Callable[[Path], None], name: str, tmp_path: Path, in_time: None
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({}, {})
    make(folder.path / name)
    with pytest.raises(FormatError, match=rf"{name} is not a regular file"), folder.locked():
        folder.read()


def piped(path: Path, text: str) -> Path:
    """Make a pipe and write to it what its first reader gets."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=(text,), daemon=True).start()
    return path


def test_a_file_that_a_person_names_may_be_a_pipe(tmp_path: Path, in_time: None) -> None:
    assert read_class_list(piped(tmp_path / "classes", "cat\ndog\n")) == ("cat", "dog")
    assert read_names(piped(tmp_path / "names", "a\tcat\n"), pipe=True) == {"a": "cat"}
    assert read_json(piped(tmp_path / "split.json", "{}"), "test", pipe=True) == {}


def test_names_that_a_plan_names_are_a_regular_file(tmp_path: Path, in_time: None) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").touch()
    os.mkfifo(tmp_path / "names")
    with pytest.raises(DataError, match="not a regular file"):
        read_source(str(tmp_path / "data"), None, tmp_path / "names", pipe=False)
